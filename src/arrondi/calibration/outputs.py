"""Second moments of the gradients of outputs, in blocks: `OutputMoment`."""

from __future__ import annotations

import torch

WIDEST = 1024
"""Outputs of a block; between blocks nothing is known. A layer's moments take 4 · 1024 bytes for every output at most."""


class OutputMoment:
    """Σ g gᵀ of gradients g with respect to what a layer gives, as the blocks of its diagonal.

    Attributes:
        blocks: float32 (k, k), at most `widest` wide, over all outputs in their order; none before the first gradient.
    """

    def __init__(self, widest: int = WIDEST) -> None:
        self.widest, self.blocks = widest, ()

    blocks: tuple[torch.Tensor, ...]

    def add(self, gradient: torch.Tensor) -> None:
        """Count gradients (…, m), any floating type."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        found = tuple((part.T @ part).cpu() for part in rows.split(self.widest, 1))
        self.blocks = tuple(a + b for a, b in zip(self.blocks, found, strict=True)) if self.blocks else found
