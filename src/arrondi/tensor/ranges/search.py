"""Ranges that clip on purpose: the grid of each tile with the least error instead of the widest one.

Owns: `search_grid`, its slow reference `search_grid_reference`, `on_grid`, `powered` and `choose`. Uses `fits` for the widest grid and tries
smaller ones. Where a scale may be negative and the format is not the same seen from the other side (the codes of int4 are
-8 … 7), it also tries their mirror images.

Sources: the clipping search that the GPTQ family of tools shares (factors 1, 0.99, …, exponent 2.4); negative scales as in
AutoRound and in GGUF's Q4_0; weighting a column's error by the second moment of its input is the diagonal of GPTQ's own
objective (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch

from arrondi.arguments import said
from arrondi.errors import SchemeError
from arrondi.formats import Scheme, tile_shape
from arrondi.tensor.encoding import nearest
from arrondi.tensor.quantizers import search as search_compiled
from arrondi.tensor.ranges.extremes import ends
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import Grid, cat_grids
from arrondi.tensor.tiling import to_tiles

_CHUNK = 1 << 17
"""Elements searched at a time; small enough that every try stays in the core's cache."""
_COARSE = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51, 0.44)
"""Factors on the widest range that are tried first."""
_FINE = (-0.035, -0.0175, 0.0175, 0.035)
"""Steps around the best of them."""
_LARGEST_POWER = 16
_NEIGHBOURS = (1.0, 2.0, 0.5)
"""What there is to try for scales that are powers of two."""


def check_power(power: float, name: str) -> None:
    """Refuse an exponent for which no error can be computed.

    Raises:
        SchemeError: it is not positive, or too large for float32.
    """
    if not 0 < power <= _LARGEST_POWER:
        raise SchemeError(
            f"{name}: the exponent of the error is above 0 and up to {_LARGEST_POWER}, got {said(power)}. Leave power out."
        )


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
    """The slow reference of the compiled search, for every format and power."""
    tile = tile_shape(scheme.granularity, tuple(weight.shape))
    tiles = to_tiles(weight, tile)
    weights = None if importance is None else to_tiles(importance.float().expand_as(weight), tile)
    step = max(_CHUNK // max(tiles.shape[1], 1), 1)
    found = []
    for start in range(0, tiles.shape[0], step):
        some = None if weights is None else weights[start : start + step]
        found.append(_Search(tiles[start : start + step].float(), scheme, some, power).best())
    return cat_grids(found)


class _Search:
    """The best grid so far of every tile of one chunk."""

    def __init__(self, tiles: torch.Tensor, scheme: Scheme, weights: torch.Tensor | None, power: float) -> None:
        self.tiles, self.scheme, self.weights, self.power = tiles, scheme, weights, power
        # A range is known by its ends; only the rules for ternary and binary look at every element.
        self.ends = torch.cat(ends(tiles), dim=-1) if scheme.format.levels > 3 else tiles
        self.mirrored = mirrors(scheme)
        self.loss = tiles.new_full((len(tiles), 1), torch.inf)
        self.grid: Grid | None = None
        self.factor = tiles.new_ones((len(tiles), 1))

    def best(self) -> Grid:
        powers = self.scheme.scale == "e8m0"
        for factor in _NEIGHBOURS if powers else _COARSE:
            self._try(torch.full_like(self.factor, factor))
        if powers:
            return self._found()
        middle = self.factor.clone()
        for step in _FINE:
            self._try((middle + step).clamp(max=1.0))
        return self._found()

    def _found(self) -> Grid:
        assert self.grid is not None
        return self.grid

    def _try(self, factor: torch.Tensor) -> None:
        grid = fit(self.ends, self.scheme, shrink=factor)
        for sign in (1, -1) if self.mirrored else (1,):
            tried = Grid(grid.scale * sign, grid.zero_point, grid.offset)
            loss = self._loss(tried)
            better = loss < self.loss
            self.loss = torch.where(better, loss, self.loss)
            self.factor = torch.where(better, factor, self.factor)
            self.grid = tried if self.grid is None else choose(better, tried, self.grid)

    def _loss(self, grid: Grid) -> torch.Tensor:
        error = powered(on_grid(self.tiles, self.scheme, grid).sub_(self.tiles).abs_(), self.power)
        return (error if self.weights is None else error.mul_(self.weights)).sum(dim=-1, keepdim=True)


def powered(size: torch.Tensor, power: float) -> torch.Tensor:
    """size^power, in place where it can be."""
    if power == 2:
        return size.square_()
    if power == 4:
        return size.square_().square_()
    if power == 2.5:
        return size.square().mul_(size.sqrt_())
    return size.pow_(power)


def mirrors(scheme: Scheme) -> bool:
    """Whether a negative scale gives a grid that no positive one gives."""
    return scheme.symmetric and scheme.signed_scales and not scheme.format.balanced


def choose(where: torch.Tensor, new: Grid, old: Grid) -> Grid:
    """For every tile the new grid where `where` is true, else the old one; all parts (tiles, 1)."""

    def part(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None or b is None else torch.where(where, a, b)

    scale = torch.where(where, new.scale, old.scale)
    return Grid(scale, part(new.zero_point, old.zero_point), part(new.offset, old.offset))


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
    if grid.offset is not None:
        x = x - grid.offset
    values = nearest((x / grid.scale).float(), format).mul_(grid.scale)
    return values if grid.offset is None else values.add_(grid.offset)
