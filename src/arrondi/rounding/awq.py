"""AWQ's rounding: each group takes the narrower range with which the layer's output changes least; then the nearest codes.

Owns: `awq`. For a row of a group of columns with the difference d = w - ŵ, what the group does to the output on the calibration
inputs is ‖X_g d‖² = d H_g dᵀ, where H_g is the block of H = Σ x xᵀ that belongs to the group. The paper takes up to 512 sampled
inputs for it; the block says the same of all of them. Ranges of max, 0.95 max, … 0.55 max are tried, and where a scale may be
negative and the format is not the same seen from the other side (int4: -8 … 7), their mirror images.

The scales that the paper multiplies columns by before this are a rewrite (`arrondi.rewrite.awq`).

Source: Lin et al. 2023, arXiv:2306.00978, and the clipping of its authors' implementation. They leave query and key projections
unclipped; which layers these are is not asked here, and none is left out.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, ShapeError
from arrondi.formats import Scheme, tile_shape
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.nearest import quantize_with, store_grid
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import Grid, cat_grids
from arrondi.tensor.ranges.search import choose, mirrors, on_grid
from arrondi.tensor.tiling import from_tiles, to_tiles

_CHUNK = 1 << 20
"""Elements that are searched at a time."""
_POWERS = (1.0, 2.0, 0.5)
"""What there is to try for scales that are powers of two."""


def awq(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    grid: Annotated[int, Between(2, 1000)] = 10,
    shrink: Annotated[float, Between(0, 1)] = 0.5,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round a weight to nearest on ranges that were chosen by the layer's output.

    Args:
        weight: (m, n), any float dtype, finite; computed in float32.
        scheme: what it becomes; any granularity.
        moment: second moment of the layer's inputs, of size n.
        grid: how many ranges are tried, from the widest down.
        shrink: the narrowest is just above this share of the widest.
        name: for messages.
        facts: not used; accepted so that every method is called alike.

    Raises:
        ShapeError: the weight is not a matrix, or the moment has another size.
        SchemeError: an option is out of range.
        DataError: no moment, or NaN.
    """
    with named(name):
        check_arguments(awq, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    if weight.ndim != 2:
        raise ShapeError(f"{name}: awq rounds matrices, got shape {tuple(weight.shape)}. Pass each matrix of a stack.")
    if moment is None:
        raise DataError(
            f"{name}: awq needs the second moment of the layer's inputs. Give calibration text, or use rtn or hqq."
        )
    if moment.n != weight.shape[1]:
        raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[1]}.")
    weight = weight.detach().float()
    factors = [1 - (1 - shrink) * k / grid for k in range(grid)] if scheme.scale != "e8m0" else list(_POWERS)
    height, width = tile_shape(scheme.granularity, tuple(weight.shape))
    blocks = _blocks(moment.matrix().to(weight.device), width)
    step = max(_CHUNK // max(weight.shape[1], 1) // height, 1) * height
    with named(name):
        found = [_searched(part, scheme, blocks, factors, (height, width)) for part in weight.split(step)]
        parts = store_grid(cat_grids(found), scheme, tuple(weight.shape), name=name)
    return quantize_with(weight, scheme, parts, name=name)


def _blocks(hessian: torch.Tensor, width: int) -> torch.Tensor:
    """(blocks, width, width) the diagonal blocks of H; the last one is filled up with zeros."""
    n = len(hessian)
    blocks = hessian.new_zeros(-(-n // width), width, width)
    for k, block in enumerate(blocks):
        part = hessian[k * width : (k + 1) * width, k * width : (k + 1) * width]
        block[: len(part), : len(part)] = part
    return blocks


def _searched(
    weight: torch.Tensor, scheme: Scheme, blocks: torch.Tensor, factors: list[float], tile: tuple[int, int]
) -> Grid:
    """The best grid of every tile of some rows, in the order of tiles; parts (tiles, 1)."""
    tile = min(tile[0], len(weight)), tile[1]
    tiles = to_tiles(weight, tile)
    best, least = fit(tiles, scheme), tiles.new_full((len(tiles), 1), torch.inf)
    for factor in factors:
        grid = fit(tiles, scheme, shrink=torch.full_like(least, factor))
        for sign in (1, -1) if mirrors(scheme) else (1,):
            tried = Grid(grid.scale * sign, grid.zero_point, grid.offset)
            lost = from_tiles(on_grid(tiles, scheme, tried).sub_(tiles), tile, tuple(weight.shape))
            error = _error(lost, blocks, tile)
            better = error < least
            least = torch.where(better, error, least)
            best = choose(better, tried, best)
    return best


def _error(lost: torch.Tensor, blocks: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """(tiles, 1) Σ d H_g dᵀ over the rows of every tile."""
    m, n = lost.shape
    count, width, _ = blocks.shape
    padded = lost if n == count * width else torch.nn.functional.pad(lost, (0, count * width - n))
    by_block = padded.view(m, count, width).transpose(0, 1)
    rows = (torch.bmm(by_block, blocks) * by_block).sum(-1).T  # (m, blocks)
    missing = -m % tile[0]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    return rows.reshape(-1, tile[0], count).sum(1).reshape(-1, 1)
