"""Ranges that clip on purpose: the grid of each tile with the least error instead of the widest one.

Owns: `search_grid`. Uses `fitting` for the widest grid and tries smaller ones.
Source: the clipping search that the GPTQ family of tools shares (exponent 2.4, factors 1, 0.99, …); weighting the error of
a column by the second moment of its input is the diagonal of GPTQ's own objective (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch

from arrondi.encoding import decode, encode
from arrondi.fitting import Grid, fit
from arrondi.formats import Scheme, tile_shape
from arrondi.tiling import to_tiles

_CHUNK = 1 << 17
"""Elements searched at a time; small enough that every try stays in the core's cache."""


def search_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    importance: torch.Tensor | None = None,
    *,
    power: float = 2.0,
    smallest: float = 0.4,
    steps: int = 30,
) -> Grid:
    """For every tile the shrink factor with the least Σ importance · |w - ŵ|^power.

    Args:
        weight: (..., K) float32.
        scheme: what the weight becomes; scales are tried as they will be stored.
        importance: (K,) weight of each column's error, for example the mean square of its input; None: all equal.
        power: exponent of the error. The default 2 is the layer's own loss once `importance` is known.
        smallest, steps: factors from 1 down to `smallest`, evenly spaced; power-of-two scales try their neighbours.

    Returns:
        the grid, parts as (tiles, 1).
    """
    tile = tile_shape(scheme.granularity, tuple(weight.shape))
    tiles = to_tiles(weight, tile)
    weights = None if importance is None else to_tiles(importance.float().expand_as(weight), tile)
    step = max(_CHUNK // max(tiles.shape[1], 1), 1)
    factors = torch.linspace(1.0, smallest, steps, dtype=torch.float32).tolist()
    if scheme.scale == "e8m0":
        factors = [1.0, 2.0, 0.5]
    chosen: list[list[torch.Tensor]] = []
    for start in range(0, tiles.shape[0], step):
        part = tiles[start : start + step]
        some = None if weights is None else weights[start : start + step]
        chosen.append(_best(part, scheme, some, factors, power))
    scale, *rest = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    zero = rest[0] if scheme.zero_point == "integer" else None
    return Grid(scale, zero, rest[0] if scheme.zero_point == "float" else None)


def _best(tiles: torch.Tensor, scheme: Scheme, weights: torch.Tensor | None, factors: list[float], power: float) -> list[torch.Tensor]:
    least: torch.Tensor | None = None
    best: list[torch.Tensor] = []
    for factor in factors:
        grid = fit(tiles, scheme, shrink=factor)
        error = (on_grid(tiles, scheme, grid) - tiles).abs_()
        error = error.square_() if power == 2 else error.pow_(power)
        loss = (error if weights is None else error.mul_(weights)).sum(dim=-1, keepdim=True)
        parts = [p for p in grid if p is not None]
        if least is None:
            least, best = loss, parts
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = [torch.where(better, new, old) for new, old in zip(parts, best, strict=True)]
    return best


def on_grid(x: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor:
    """The nearest real value on the grid, for elements that broadcast against the grid's parts."""
    format = scheme.format
    if format.kind == "integer":  # the same arithmetic as encode and decode, without the trip through int8
        if grid.offset is not None:
            return ((x - grid.offset) / grid.scale).round_().clamp_(format.qmin, format.qmax).mul_(grid.scale).add_(grid.offset)
        zero = 0 if grid.zero_point is None else grid.zero_point
        return (x / grid.scale).round_().clamp_(format.qmin - zero, format.qmax - zero).mul_(grid.scale)
    return decode(encode((x / grid.scale).float(), format), format) * grid.scale
