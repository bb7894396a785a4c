"""Ranges that clip on purpose: the grid of each tile with the least error instead of the widest one.

Owns: `search_grid` and its slow twin `search_grid_reference`. Uses `fitting` for the widest grid and tries smaller ones; for symmetric integers also their mirror
images, since the codes -2^(b-1) … 2^(b-1)-1 reach one step further on one side (the scale is then negative).

Sources: the clipping search that the GPTQ family of tools shares (factors 1, 0.99, …, exponent 2.4); negative scales as in
AutoRound and in GGUF's Q4_0; weighting a column's error by the second moment of its input is the diagonal of GPTQ's own
objective (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch

from arrondi.formats import Scheme, tile_shape
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.fitting import STORED, Grid, fit
from arrondi.tensor.quantizers import search as search_compiled
from arrondi.tensor.tiling import to_tiles

_CHUNK = 1 << 17
"""Elements searched at a time; small enough that every try stays in the core's cache."""
_COARSE = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51, 0.44)
"""Factors on the widest range that are tried first."""
_FINE = (-0.035, -0.0175, 0.0175, 0.035)
"""Steps around the best of them."""
_NEIGHBOURS = (1.0, 2.0, 0.5)
"""What there is to try for scales that are powers of two."""


def search_grid(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, *, power: float = 2.5
) -> Grid:
    """For every tile the grid with the least Σ importance · |w - ŵ|^power.

    Args:
        weight: (..., K), any float dtype; computed in float32.
        scheme: what the weight becomes; scales are tried as they will be stored.
        importance: (K,) weight of each column's error, for example the mean square of its input; None: all equal.
        power: exponent of the error. Measured on real models, 2.5 is a good choice for round-to-nearest; GPTQ does
            better with 4, because what it cannot repair is the one large error, not the sum of small ones.

    Returns:
        the grid, parts as (tiles, 1).
    """
    found = search_compiled(weight, scheme, importance, power)
    return search_grid_reference(weight, scheme, importance, power=power) if found is None else found


def search_grid_reference(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, *, power: float = 2.5
) -> Grid:
    """The slow twin of the compiled search, for every format and power."""
    tile = tile_shape(scheme.granularity, tuple(weight.shape))
    tiles = to_tiles(weight, tile)
    weights = None if importance is None else to_tiles(importance.float().expand_as(weight), tile)
    step = max(_CHUNK // max(tiles.shape[1], 1), 1)
    found = []
    for start in range(0, tiles.shape[0], step):
        some = None if weights is None else weights[start : start + step]
        found.append(_Search(tiles[start : start + step].float(), scheme, some, power).best())
    scale, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    zero = rest[0] if scheme.zero_point == "integer" else None
    return Grid(scale, zero, rest[0] if scheme.zero_point == "float" else None)


class _Search:
    """The best grid so far of every tile of one chunk."""

    def __init__(self, tiles: torch.Tensor, scheme: Scheme, weights: torch.Tensor | None, power: float) -> None:
        self.tiles, self.scheme, self.weights, self.power = tiles, scheme, weights, power
        integer = scheme.format.kind == "integer" and scheme.format.levels > 3
        # A range is known by its ends; only the rules for ternary and binary look at every element.
        self.ends = (
            torch.stack((tiles.amin(dim=-1), tiles.amax(dim=-1)), dim=-1)
            if integer or scheme.format.levels > 3
            else tiles
        )
        # Scales that are quantized in turn, and powers of two, have no sign.
        self.mirrored = integer and scheme.symmetric and scheme.format.qmin < 0 and scheme.scale in STORED
        self.loss = tiles.new_full((len(tiles), 1), torch.inf)
        self.parts: list[torch.Tensor] = []
        self.factor = tiles.new_ones((len(tiles), 1))

    def best(self) -> list[torch.Tensor]:
        powers = self.scheme.scale == "e8m0"
        for factor in _NEIGHBOURS if powers else _COARSE:
            self._try(torch.full_like(self.factor, factor))
        if powers:
            return self.parts
        middle = self.factor.clone()
        for step in _FINE:
            self._try((middle + step).clamp(max=1.0))
        return self.parts

    def _try(self, factor: torch.Tensor) -> None:
        grid = fit(self.ends, self.scheme, shrink=factor)
        for sign in (1, -1) if self.mirrored else (1,):
            tried = Grid(grid.scale * sign, grid.zero_point, grid.offset)
            loss = self._loss(tried)
            parts = [p for p in tried if p is not None]
            better = loss < self.loss
            self.loss = torch.where(better, loss, self.loss)
            self.factor = torch.where(better, factor, self.factor)
            self.parts = [torch.where(better, n, o) for n, o in zip(parts, self.parts or parts, strict=True)]

    def _loss(self, grid: Grid) -> torch.Tensor:
        error = on_grid(self.tiles, self.scheme, grid).sub_(self.tiles).abs_()
        if self.power == 4:
            error = error.square_().square_()
        elif self.power == 2.5:
            error = error.square().mul_(error.sqrt_())
        else:
            error = error.pow_(self.power)
        return (error if self.weights is None else error.mul_(self.weights)).sum(dim=-1, keepdim=True)


def on_grid(x: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor:
    """The nearest real value on the grid, for elements that broadcast against the grid's parts."""
    format = scheme.format
    if format.kind == "integer":  # the same arithmetic as encode and decode, without the trip through int8
        if grid.offset is not None:
            return (
                ((x - grid.offset) / grid.scale)
                .round_()
                .clamp_(format.qmin, format.qmax)
                .mul_(grid.scale)
                .add_(grid.offset)
            )
        q = (x / grid.scale).round_()
        if grid.zero_point is None:
            return q.clamp_(format.qmin, format.qmax).mul_(grid.scale)
        return q.clamp_(format.qmin - grid.zero_point, format.qmax - grid.zero_point).mul_(grid.scale)
    return decode(encode((x / grid.scale).float(), format), format) * grid.scale
