"""Grids of small groups by least squares: many assignments of codes, of each the scale and offset that fit it best.

Owns: `Squares`, the weighted sums from which everything follows, `best_grids` and its slow reference, and for schemes with plain scales `stepped` and
`squares_grid`. Elements lie along the first axis, groups along the others, so that sums over a group are sums of long rows.

For codes with values v and weights w, the error of a group is Σ w (s v + o - x)², a quadratic function of s and o whose minimum is known in
closed form and costs no further pass. So some forty grids are tried, each for the codes that it gives alone, and the least error wins; then
codes and grid follow each other while the error falls.

Sources: the coordinate searches of llama.cpp's quantizers (MIT), which try the same steps around the widest grid; here all groups are
searched at once, offsets and scales are refitted together, and both ends of a grid that is not the same seen from the other side are tried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from arrondi.formats import Format, PerGroup, Scheme
from arrondi.formats.scheme import PLAIN
from arrondi.tensor.encoding import nearest
from arrondi.tensor.quantizers import GroupSearch, search_groups
from arrondi.tensor.ranges.grid import Grid, cat_grids, round_offset, round_scale

_STEPS: Final = (*(i / 8 for i in range(-7, 10)), 1.5, 2.0, 3.0)
"""How far, in steps of the grid, the extreme of a group lies beyond the grid's end (below it where negative)."""
_SMALL: Final = 32
"""Numbers in a group that are few enough for single ones to decide which grid is best."""
_CHUNK: Final = 1 << 18
"""Numbers at a time."""
_CELLS: Final = 1024
"""Cells into which the range of a codebook is cut."""
_TURNS: Final = 3
"""Turns of codes and grid at most, as in native/superblocks.h."""


def stepped(scheme: Scheme) -> bool:
    """Whether `squares_grid` makes it: int8 and ggml's codebook in small groups, for which parts of the whole range are too coarse a search."""
    small = isinstance(scheme.granularity, PerGroup) and scheme.granularity.size <= _SMALL
    plain = scheme.zero_point == "none" and scheme.scale in PLAIN
    return small and plain and scheme.format.name in ("int8", "iq4_nl")


def squares_grid(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, magnitude: float = 0.0
) -> Grid:
    """The grid with the least Σ w (x - x̂)² that the search finds, parts as (tiles, 1), as they are stored.

    Args:
        weight: (..., K), finite; computed in float32.
        scheme: one that is `stepped`.
        importance, magnitude: as in `laid`.

    Raises:
        DataError: a scale or an offset overflows its storage.
    """
    assert isinstance(scheme.granularity, PerGroup)
    offset, found = scheme.zero_point == "float", []
    for numbers in laid(weight, importance, magnitude, min(scheme.granularity.size, weight.shape[-1])):
        scale, low = best_grids(numbers, scheme.format, offset=offset, signed=scheme.signed_scales)
        if not has_zero(scheme.format):
            scale = torch.where(
                scale == 0, torch.finfo(scale.dtype).tiny, scale
            )  # the least scale comes nearest to zero
        scale = round_scale(scale, scheme.scale)
        found.append(Grid(scale, None, None if low is None else round_offset(low, scheme.offset)))
    return cat_grids(found)


def laid(
    weight: torch.Tensor, importance: torch.Tensor | None, magnitude: float, group: int, span: int = 1
) -> Iterator[Laid]:
    """The weight some rows at a time as (group, runs, span), views where they can be: groups of one run lie side by side.

    What is missing at the end of a row weighs nothing.

    Args:
        weight: (..., K).
        importance: (K,), what the error of each column weighs; None: all the same.
        magnitude: weigh an element by (σ² + x²) to this power too, with the mean square σ² of its group.
        group, span: elements of a group, groups of a run.
    """
    columns = weight.shape[-1]
    rows, missing = weight.reshape(-1, columns), -columns % (group * span)

    def lay(x: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(x.float(), (0, missing)) if missing else x.float()
        return whole.reshape(-1, span, group).permute(2, 0, 1)

    for some in rows.split(max(_CHUNK // max(columns, 1), 1)):
        x = lay(some)
        w = (
            None
            if importance is None and not missing
            else lay((rows.new_ones(1) if importance is None else importance).expand(some.shape))
        )
        if magnitude:
            squares = x.contiguous().square()
            more = (squares.mean(0) + squares).pow_(magnitude)
            w = more if w is None else more.mul_(w)
        yield Laid(x, w)


class Laid(NamedTuple):
    """Numbers (elements, …groups) float32, and what the error of each weighs; None: all the same."""

    x: torch.Tensor
    w: torch.Tensor | None


class Squares(NamedTuple):
    """Sums over each group for given values v: w v², w v x, w v, w x, w."""

    vv: torch.Tensor
    vx: torch.Tensor
    v: torch.Tensor
    x: torch.Tensor
    one: torch.Tensor


class Weighed(NamedTuple):
    """Numbers (elements, …groups) float32, with weights of the same shape, and sums that stay the same."""

    x: torch.Tensor
    w: torch.Tensor
    wx: torch.Tensor
    sum_wx: torch.Tensor
    sum_w: torch.Tensor
    power: torch.Tensor

    @classmethod
    def of(cls, numbers: Laid) -> Weighed:
        x = numbers.x.contiguous()
        w = torch.ones_like(x) if numbers.w is None else numbers.w.contiguous()
        wx = w * x
        return cls(x, w, wx, total(wx), total(w), total(wx * x))

    def squares(self, v: torch.Tensor) -> Squares:
        wv = self.w * v
        return Squares(total(wv * v), total(self.wx * v), total(wv), self.sum_wx, self.sum_w)

    def error(self, s: Squares, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Σ w (scale v + offset - x)² of every group, for the v of the sums."""
        error = self.power + scale * (scale * s.vv - 2 * s.vx)
        return error if offset is None else error + offset * (offset * s.one + 2 * (scale * s.v - s.x))


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, in an order that does not depend on threads or on how much lies side by side."""
    while len(x) > 1:
        half = len(x) // 2
        rest, x = x[2 * half :], x[:half] + x[half : 2 * half]
        if len(rest):
            x[0] += rest[0]
    return x[0]


def values_on(x: torch.Tensor, format: Format, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The value of a nearest code of every element, before scale and offset; where a scale is zero, as if it were one.

    Near the middle between two values of a codebook it may be either of them: the error that follows is that of the one taken.
    """
    shifted = x if offset is None else x - offset
    units = shifted / torch.where(scale == 0, 1.0, scale)
    if format.values is None:
        return units.round_().clamp_(format.qmin, format.qmax)
    first, last, cells = _cells(format, x.device)
    places = units.sub_(first).mul_(_CELLS / (last - first)).int().clamp_(0, _CELLS - 1)
    return cells.index_select(0, places.reshape(-1)).reshape(places.shape)


@functools.lru_cache(maxsize=16)
def _cells(format: Format, device: torch.device) -> tuple[float, float, torch.Tensor]:
    """The range of a codebook and the nearest value at the centre of each of its cells: four times as fast as a search."""
    assert format.values is not None
    first, last = format.values[0], format.values[-1]
    centres = first + (torch.arange(_CELLS, device=device) + 0.5) * ((last - first) / _CELLS)
    return first, last, nearest(centres.float(), format)


def has_zero(format: Format) -> bool:
    """Whether a code means zero."""
    return format.values is None or 0.0 in format.values


def solved(s: Squares, offset: bool, below: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best scale, and offset (at most zero with `below`), for the values of some sums; zero where all values are zero."""
    alone = s.vx / torch.where(s.vv > 0, s.vv, 1.0)
    if not offset:
        return alone, None
    determinant = s.one * s.vv - s.v * s.v
    solvable = determinant > 1e-6 * s.one * s.vv
    safe = torch.where(solvable, determinant, 1.0)
    scale = torch.where(solvable, (s.one * s.vx - s.v * s.x) / safe, alone)
    found = torch.where(solvable, (s.vv * s.x - s.v * s.vx) / safe, 0.0)
    if below:
        positive = found > 0
        scale, found = torch.where(positive, alone, scale), torch.where(positive, 0.0, found)
    return scale, found


def best_grids(
    numbers: Laid, format: Format, *, offset: bool, below: bool = False, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset of every group.

    Args:
        numbers: in groups.
        format: integers or a codebook.
        offset: there is an offset; else the grid's zero is zero.
        below: offsets are at most zero.
        signed: scales may be negative, where there is no offset.
    """
    job = jobs(format, offset=offset, below=below, signed=signed)
    found = search_groups(numbers.x, numbers.w, job)
    return (
        best_grids_reference(Weighed.of(numbers), format, offset=offset, below=below, signed=signed)
        if found is None
        else found
    )


def jobs(format: Format, *, offset: bool, below: bool, signed: bool) -> GroupSearch:
    """What the compiled search is told."""
    table = None if format.values is None else _cells(format, torch.device("cpu"))
    cells = () if table is None else (table[0], _CELLS / (table[1] - table[0]), *table[2].tolist())
    return GroupSearch(format.qmin, format.qmax, offset, below, signed, _reaches(format, offset, signed), cells)


def _ends(format: Format) -> tuple[float, float]:
    if format.values is None:
        return float(format.qmin), float(format.qmax)
    return format.values[0], format.values[-1]


@functools.lru_cache(maxsize=32)
def _reaches(format: Format, offset: bool, signed: bool) -> tuple[float, ...]:
    """What the width of a group, or without offsets its extreme, is divided by for the grids that are tried first."""
    first, last = _ends(format)
    step = (last - first) / (format.levels - 1)
    if offset:
        return tuple(last - first + t * step for t in _STEPS)
    ends = (first, last) if signed and first != -last else (last,)
    fars = ((end, abs(end) + t * step) for t in _STEPS for end in ends)
    return tuple(math.copysign(far, end) for end, far in fars if far > 0)


def best_grids_reference(
    data: Weighed, format: Format, *, offset: bool, below: bool = False, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slow reference of the compiled search."""
    low, high = data.x.amin(0), data.x.amax(0)
    best, least = (low.new_zeros(low.shape), low.new_zeros(low.shape) if offset else None), data.power.clone()
    starts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    if offset:
        bottom = low.clamp(max=0) if below else low
        for reach in _reaches(format, offset, signed):
            scale = (high - bottom) / reach
            starts.append((scale, bottom - scale * _ends(format)[0]))
    else:
        extreme = torch.where(high > -low, high, low)
        if not signed:
            extreme = extreme.abs()
        starts += [(extreme / reach, None) for reach in _reaches(format, offset, signed)]
    for start in starts:
        best, least = _better(data, format, start, best, least, offset, below, signed)
    for _ in range(_TURNS):
        before = least
        best, least = _better(data, format, best, best, least, offset, below, signed)
        if not bool((least < before).any()):
            break
    return best


Pair = tuple[torch.Tensor, torch.Tensor | None]


def _better(
    data: Weighed, format: Format, start: Pair, best: Pair, least: torch.Tensor, offset: bool, below: bool, signed: bool
) -> tuple[Pair, torch.Tensor]:
    """The best so far, or the grid that fits the codes of `start` where its error is less."""
    sums = data.squares(values_on(data.x, format, *start))
    scale, found = solved(sums, offset, below)
    error = data.error(sums, scale, found)
    if offset or not signed:
        error = torch.where(scale > 0, error, torch.inf)
    wins = error < least
    kept = None if found is None or best[1] is None else torch.where(wins, found, best[1])
    return (torch.where(wins, scale, best[0]), kept), torch.where(wins, error, least)
