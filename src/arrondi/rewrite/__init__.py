"""Rewrites: other numbers for the same function, easier to round. Pure functions on tensors; steps apply them."""
