"""Rewrites: what a model computes stays the same, and its numbers become easier to round. Pure functions on tensors."""
