"""Grids with the least weighted squared error: a search over scales, then weighted least squares.

Owns: `weighted_parts`, `shares_outer_scale` and `FOUR_OVER_SIX`. `search` asks one power of the error of every column; here each element has a weight of its own,
scales move freely, and scales that are quantized in turn are tried as they will read back. Super-blocks go `superblocks`, and
ggml's codebook goes `squares`.

For a tile with elements w and weights a, the codes c of a first grid are the best of some widths. Then alternately the
scale (and the offset) that is best for these codes follows in closed form, Σ a w v(c) / Σ a v(c)², and the codes that are best
for it; each turn is kept where the error falls, so it never rises.

Sources: the coordinate searches of llama.cpp's quantizers with an importance matrix, whose weight a √(σ² + w²) is `magnitude`
here (σ² is the mean square of the tile); maximum to 6 or to 4 in fp4 blocks: Cook et al. 2025, arXiv:2512.02010.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from arrondi.errors import DataError, ShapeError
from arrondi.formats import PerTensor, Scheme, tile_shape
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.nearest import quantize_scales, store_grid
from arrondi.tensor.qtensor import Parts, QTensor
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import Grid, cat_grids, round_offset, round_scale
from arrondi.tensor.ranges.search import mirrors, on_grid, powered
from arrondi.tensor.ranges.squares import squares_grid, stepped
from arrondi.tensor.ranges.superblocks import is_superblock, superblock_parts
from arrondi.tensor.tiling import to_tiles

_CHUNK = 1 << 17
"""Elements at a time."""
_INTEGERS: Final = (1.0, 0.965, 0.93, 0.895, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51, 0.44)
"""Widths that are tried, as parts of the widest grid."""
_FLOATS: Final = (1.0, 1.5, 1.35, 1.2, 1.1, 0.93, 0.86, 0.79, 0.72)
"""The same where steps differ: 1.5 lays the largest magnitude on fp4's 4 instead of its 6."""
FOUR_OVER_SIX: Final = (1.0, 1.5)
"""The two widths of the method of that name, for fp4: the largest magnitude on 6 or on 4."""
_EXPONENTS: Final = (1.0, 2.0, 0.5)
_TURNS = 4
"""Turns of least squares at most."""


def weighted_parts(
    weight: torch.Tensor,
    scheme: Scheme,
    importance: torch.Tensor | None = None,
    *,
    magnitude: bool = True,
    power: float = 2.0,
    widths: tuple[float, ...] | None = None,
    turns: int = _TURNS,
    name: str = "tensor",
) -> Parts:
    """For every tile the grid with the least Σ a (w - ŵ)² that the search finds, as it is kept.

    Args:
        weight: (..., K), any float dtype; computed in float32.
        scheme: what it becomes; scales are tried as they will be stored.
        importance: (K,) mean square of the input of every column, or any multiple of it; None: all equal.
        magnitude: weigh an element by √(σ² + w²) too. On real models large weights matter more than their columns say,
            because errors of a row do not add up independently.
        power: exponent of the error; least squares goes on minimising the square, and is kept where this one falls.
        widths: factors on the widest range to try; None: those that suit the format. Powers of two have their own.
        turns: of least squares at most; 0 keeps the best of the widths.
        name: for messages.

    Raises:
        ShapeError: the importance is not one number a column.
        DataError: the importance is negative or not finite, or the weight is not finite.
    """
    shape = tuple(weight.shape)
    tile = tile_shape(scheme.granularity, shape)
    if widths is None and power == 2 and (is_superblock(scheme) or stepped(scheme)):
        columns, root = None if importance is None else _checked(importance, shape, name), 0.5 if magnitude else 0.0
        if is_superblock(scheme):
            return superblock_parts(weight.detach(), scheme, columns, root)
        return store_grid(squares_grid(weight.detach(), scheme, columns, root), scheme, shape, name=name)
    tiles = to_tiles(weight.detach(), tile)
    columns = None if importance is None else to_tiles(_checked(importance, shape, name).expand(shape), tile)
    outer = None
    if shares_outer_scale(scheme):
        first = store_grid(fit(tiles.float(), scheme), scheme, shape, name=name).scale
        assert isinstance(first, QTensor)
        outer = first.grid
    search = _Search(scheme, magnitude, power, widths or _widths(scheme), turns, outer)
    step = max(_CHUNK // max(tiles.shape[1], 1), 1)
    found = [
        search.best(tiles[i : i + step].float(), None if columns is None else columns[i : i + step])
        for i in range(0, len(tiles), step)
    ]
    return store_grid(cat_grids(found), scheme, shape, outer=outer, name=name)


def _checked(importance: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """The importance with mean one, so that no sum over- or underflows."""
    if tuple(importance.shape) != shape[-1:]:
        raise ShapeError(
            f"{name}: the importance has one number for each of {shape[-1]} columns, got shape {tuple(importance.shape)}."
        )
    real = importance.double()
    if not bool(torch.isfinite(real).all()) or bool((real < 0).any()):
        raise DataError(f"{name}: the importance of a column is negative or not finite. Compute it again.")
    mean = float(real.mean())
    return (real / mean if mean > 0 else torch.ones_like(real)).float()


def _widths(scheme: Scheme) -> tuple[float, ...]:
    if scheme.scale == "e8m0":
        return _EXPONENTS
    return _INTEGERS if scheme.format.kind == "integer" and scheme.format.levels > 3 else _FLOATS


def shares_outer_scale(scheme: Scheme) -> bool:
    """Whether all scales share one outer scale, which their own range fixes before they are searched."""
    return isinstance(scheme.scale, Scheme) and scheme.scale.granularity == PerTensor() and scheme.symmetric


@dataclass(frozen=True)
class _Search:
    """The search on chunks of tiles (tiles, elements)."""

    scheme: Scheme
    magnitude: bool
    power: float
    widths: tuple[float, ...]
    turns: int
    outer: Grid | None

    def best(self, tiles: torch.Tensor, columns: torch.Tensor | None) -> Grid:
        """The grid of every tile, parts as (tiles, 1)."""
        weights = torch.ones_like(tiles) if columns is None else columns
        if self.magnitude:
            square = tiles.square()
            weights = weights * (square.mean(dim=-1, keepdim=True) + square).sqrt_()
        best: Grid | None = None
        least = tiles.new_full((len(tiles), 1), torch.inf)
        for width in self.widths:
            grid = fit(tiles, self.scheme, shrink=width)
            grid = grid._replace(scale=self._stored(grid.scale))
            for sign in (1, -1) if mirrors(self.scheme) else (1,):
                tried = grid._replace(scale=grid.scale * sign)
                best, least = _better(tried, self._loss(tiles, weights, tried), best, least)
                if self.turns and not self.scheme.symmetric:
                    tried = self._solved(tiles, weights, tried)
                    best, least = _better(tried, self._loss(tiles, weights, tried), best, least)
        assert best is not None
        for _ in range(0 if self.scheme.scale == "e8m0" else self.turns):
            tried = self._solved(tiles, weights, best)
            kept, before = best, least
            best, least = _better(tried, self._loss(tiles, weights, tried), kept, before)
            if not bool((least < before).any()):
                break
        return best

    def _loss(self, tiles: torch.Tensor, weights: torch.Tensor, grid: Grid) -> torch.Tensor:
        error = powered(on_grid(tiles, self.scheme, grid).sub_(tiles).abs_(), self.power)
        return error.mul_(weights).sum(dim=-1, keepdim=True)

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        if self.scheme.scale == "e8m0":
            return scale
        if self.outer is None:
            return round_scale(scale, self.scheme.scale)
        assert isinstance(self.scheme.scale, Scheme)
        signed = self.scheme.signed_scales
        return quantize_scales(scale, self.scheme.scale, signed=signed, outer=self.outer).dequantize()

    def _solved(self, tiles: torch.Tensor, weights: torch.Tensor, grid: Grid) -> Grid:
        """Codes for this grid, then the grid that is best for these codes."""
        format = self.scheme.format
        shifted = tiles if grid.offset is None else tiles - grid.offset
        values = decode(encode(shifted / grid.scale, format, grid.zero_point), format)
        if grid.zero_point is None and grid.offset is None:
            power = _sum(weights, values, values)
            scale = torch.where(power > 0, _sum(weights, values, tiles) / power, grid.scale)
            return Grid(self._stored(self._allowed(scale, grid.scale)))
        total, first, second = _sum(weights), _sum(weights, values), _sum(weights, values, values)
        target, product = _sum(weights, tiles), _sum(weights, values, tiles)
        determinant = total * second - first * first
        solvable = determinant > 1e-6 * total * second
        scale = torch.where(solvable, (total * product - first * target) / determinant, grid.scale)
        scale = self._stored(self._allowed(scale, grid.scale))
        offset = (target - scale * first) / total.clamp(min=torch.finfo(torch.float32).tiny)
        if grid.zero_point is not None:
            zero = torch.round(-offset / scale).clamp_(format.qmin, format.qmax).int()
            return Grid(scale, zero_point=torch.where(solvable, zero, grid.zero_point))
        assert grid.offset is not None
        return Grid(scale, offset=torch.where(solvable, round_offset(offset, self.scheme.offset), grid.offset))

    def _allowed(self, scale: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Scales that are finite, not zero, and not negative where the scheme has no negative ones."""
        fine = torch.isfinite(scale) & (scale != 0)
        if not self.scheme.signed_scales or not self.scheme.symmetric:
            fine &= scale > 0
        return torch.where(fine, scale, before)


def _sum(*factors: torch.Tensor) -> torch.Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product.sum(dim=-1, keepdim=True)


def _better(tried: Grid, loss: torch.Tensor, best: Grid | None, least: torch.Tensor) -> tuple[Grid, torch.Tensor]:
    """Tile by tile the one with the smaller loss; of two equal ones the earlier."""
    if best is None:
        return tried, loss
    wins = loss < least
    choose: Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor | None] = lambda a, b: (  # noqa: E731
        None if a is None or b is None else torch.where(wins, a, b)
    )
    scale, zero, offset = (choose(a, b) for a, b in zip(tried, best, strict=True))
    assert scale is not None
    return Grid(scale, zero, offset), torch.where(wins, loss, least)
