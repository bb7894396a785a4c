"""Optimizers whose states take 8 bits: `AdamW8bit`, `Adam8bit`, `Momentum8bit`."""

from arrondi.optim.optimizers import Adam8bit, AdamW8bit, Momentum8bit

__all__ = ["Adam8bit", "AdamW8bit", "Momentum8bit"]
