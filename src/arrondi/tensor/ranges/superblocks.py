"""Scales and offsets that are small integers, of which some groups side by side (a super-block) share the unit.

Owns: `is_superblock`, `superblock_parts` and the slow reference of its search. The error of a group is a quadratic function of its scale and offset while its codes stay
(`squares`), so units are compared without touching the numbers. Then three things follow each other while the error falls: codes for the
grids, the scale code (or a neighbour) and offset code of each group, and by least squares the units of each super-block.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from arrondi.formats import Format, PerGroup, Scheme, scale_shape
from arrondi.formats.scheme import PLAIN
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import Parts, QTensor
from arrondi.tensor.quantizers import search_superblocks
from arrondi.tensor.ranges.grid import round_scale
from arrondi.tensor.ranges.squares import (
    Laid,
    Squares,
    Weighed,
    best_grids_reference,
    has_zero,
    jobs,
    laid,
    solved,
    total,
    values_on,
)

_UNITS: Final = (*(i / 4 for i in range(-4, 7)), 2.0, 3.0, 4.0)
"""How far, in codes, the largest scale of a super-block lies beyond the largest code."""
_TURNS: Final = 3
"""Turns, as in native/superblocks.h."""


def is_superblock(scheme: Scheme) -> bool:
    """Whether scales, and offsets if there are any, are integers with one unit for some groups of a row."""
    if not isinstance(scheme.granularity, PerGroup) or scheme.zero_point == "integer" or not _takes(scheme.format):
        return False
    if scheme.zero_point == "none":
        return _counted(scheme.scale)
    return _counted(scheme.scale) and scheme.scale == scheme.offset and not scheme.signed_scales


def _takes(format: Format) -> bool:
    return format.kind == "integer" or (format.kind == "codebook" and format.values is not None)


def _counted(storage: object) -> bool:
    """Whether scales are stored as integers with a plain unit for each run of them."""
    if not isinstance(storage, Scheme) or storage.scale not in PLAIN or not storage.symmetric:
        return False
    return isinstance(storage.granularity, PerGroup) and storage.format.kind == "integer"


class _Grids(NamedTuple):
    """Grids of all super-blocks: units (n, 1), codes (n, groups of one) as floats; without offsets both of theirs are None."""

    unit: torch.Tensor
    code: torch.Tensor
    below: torch.Tensor | None = None
    depth: torch.Tensor | None = None

    @property
    def scale(self) -> torch.Tensor:
        return self.unit * self.code

    @property
    def offset(self) -> torch.Tensor | None:
        return None if self.below is None or self.depth is None else self.below * self.depth

    def where(self, wins: torch.Tensor, other: _Grids) -> _Grids:
        """`other` where it wins; (n, 1) for units too, (n, groups) for codes alone."""
        units = wins.shape[1] == 1

        def pick(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
            return None if new is None or old is None else torch.where(wins, new, old)

        unit = torch.where(wins, other.unit, self.unit) if units else self.unit
        below = pick(other.below, self.below) if units else self.below
        return _Grids(unit, torch.where(wins, other.code, self.code), below, pick(other.depth, self.depth))


def superblock_parts(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, magnitude: float = 0.0
) -> Parts:
    """Scales and offsets with the least Σ w (x - x̂)² that the search finds.

    Args:
        weight: (..., K), finite; computed in float32.
        scheme: one that `is_superblock`.
        importance, magnitude: what the error of each element weighs, as in `squares.laid`.

    Raises:
        DataError: a unit overflows its storage.
    """
    assert isinstance(scheme.granularity, PerGroup) and isinstance(scheme.scale, Scheme)
    assert isinstance(scheme.scale.granularity, PerGroup)
    group, span = scheme.granularity.size, scheme.scale.granularity.size
    found = [search(numbers, scheme) for numbers in laid(weight, importance, magnitude, group, span)]
    return _parts(found, scheme, tuple(weight.shape))


def search(numbers: Laid, scheme: Scheme) -> _Grids:
    """The grids of some super-blocks."""
    assert isinstance(scheme.scale, Scheme)
    offset, inner = scheme.zero_point == "float", scheme.scale
    job = jobs(scheme.format, offset=offset, below=offset, signed=scheme.signed_scales)
    of_scales = (inner.format.qmin, inner.format.qmax, not has_zero(scheme.format))
    found = search_superblocks(numbers.x, numbers.w, job, of_scales, str(inner.scale), _UNITS)
    return search_reference(numbers, scheme) if found is None else _Grids(*found)


def search_reference(numbers: Laid, scheme: Scheme) -> _Grids:
    """The slow reference of the compiled search."""
    assert isinstance(scheme.scale, Scheme)
    offset, format, data = scheme.zero_point == "float", scheme.format, Weighed.of(numbers)
    free = best_grids_reference(data, format, offset=offset, below=offset, signed=scheme.signed_scales)
    sums = data.squares(values_on(data.x, format, *free))
    grids = _counted_grids(sums, free, scheme)
    for _ in range(_TURNS):
        sums = data.squares(values_on(data.x, format, grids.scale, grids.offset))
        errors = data.error(sums, grids.scale, grids.offset)
        for move in (0, -1, 1):
            moved = _moved(sums, grids, scheme, move)
            other = data.squares(values_on(data.x, format, moved.scale, moved.offset))
            tried = data.error(other, moved.scale, moved.offset)
            wins = tried < errors
            grids, errors = grids.where(wins, moved), torch.where(wins, tried, errors)
            sums = Squares(*(torch.where(wins, new, old) for new, old in zip(other, sums, strict=True)))
        refitted = _refitted(sums, grids, scheme)
        least = _over(errors)
        tried = _over(data.error(sums, refitted.scale, refitted.offset))
        grids = grids.where(tried < least, refitted)
    return grids


def _counted_grids(sums: Squares, free: tuple[torch.Tensor, torch.Tensor | None], scheme: Scheme) -> _Grids:
    """Units and codes that come nearest to free scales and offsets, by what a difference costs."""
    assert isinstance(scheme.scale, Scheme)
    scale, offset = free
    bend = sums.vv if offset is None else sums.vv - sums.v * sums.v / sums.one.clamp(min=1e-30)
    unit, code = _units(scale, bend, scheme.scale, scheme.signed_scales, not has_zero(scheme.format))
    if offset is None:
        return _Grids(unit, code)
    best = ((sums.x - unit * code * sums.v) / sums.one.clamp(min=1e-30)).clamp(max=0)
    below, depth = _units(-best, sums.one, scheme.scale, False, True)
    return _Grids(unit, code, -below, depth)


def _over(x: torch.Tensor) -> torch.Tensor:
    """The sum over the groups of each super-block, (n, 1)."""
    return total(x.T).unsqueeze(1)


def _units(
    wanted: torch.Tensor, bend: torch.Tensor, storage: Scheme, signed: bool, zero: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit (n, 1) and codes (n, groups) with the least Σ bend (unit · code - wanted)²."""
    low, high = storage.format.qmin, storage.format.qmax
    extreme = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
    ends = (low, high) if signed else (high,)
    best = least = None
    for end in ends:
        for t in _UNITS:
            if abs(end) + t <= 0:
                continue
            found = extreme / (end + (t if end > 0 else -t))
            unit = round_scale(torch.where(found == 0, torch.finfo(found.dtype).tiny, found), storage.scale)
            code = _codes(wanted / unit, storage, signed, zero)
            cost = _over(bend * (unit * code - wanted).square())
            if best is None or least is None:
                best, least = (unit, code), cost
                continue
            wins = cost < least
            best = torch.where(wins, unit, best[0]), torch.where(wins, code, best[1])
            least = torch.minimum(cost, least)
    assert best is not None
    return best


def _codes(units: torch.Tensor, storage: Scheme, signed: bool, zero: bool) -> torch.Tensor:
    """The nearest codes of scales. They are not zero where the grid of scale one has all that one of scale zero has."""
    low = storage.format.qmin if signed else 0
    code = units.round().clamp_(low, storage.format.qmax)
    return code if zero else torch.where(code == 0, torch.where(signed & (units < 0), -1.0, 1.0), code)


def _moved(sums: Squares, grids: _Grids, scheme: Scheme, move: int) -> _Grids:
    """Other codes for scales and offsets: those that fit the sums, `move` beside."""
    assert isinstance(scheme.scale, Scheme)
    offset, zero = grids.offset is not None, not has_zero(scheme.format)
    if move:
        code = grids.code + move
        code = code if zero else torch.where(code == 0, code + move, code)
        low = scheme.scale.format.qmin if scheme.signed_scales else 0 if zero else 1
        code = code.clamp(low, scheme.scale.format.qmax)
    else:
        code = _codes(solved(sums, offset, offset)[0] / grids.unit, scheme.scale, scheme.signed_scales, zero)
    if grids.below is None:
        return grids._replace(code=code)
    best = (sums.x - grids.unit * code * sums.v) / sums.one.clamp(min=1e-30)
    depth = (best / grids.below).round().clamp(0, scheme.scale.format.qmax)
    return grids._replace(code=code, depth=depth)


def _refitted(sums: Squares, grids: _Grids, scheme: Scheme) -> _Grids:
    """The best units for codes that stay."""
    assert isinstance(scheme.scale, Scheme)
    code, depth = grids.code, grids.depth

    a, r = _over(code * code * sums.vv), _over(code * sums.vx)
    alone = torch.where(a > 0, r / torch.where(a > 0, a, 1.0), grids.unit)
    if depth is None or grids.below is None:
        return grids._replace(unit=_stored(alone, grids.unit, scheme.scale))
    b, c, q = _over(code * depth * sums.v), _over(depth * depth * sums.one), _over(depth * sums.x)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    safe = torch.where(solvable, determinant, 1.0)
    unit = torch.where(solvable, (c * r - b * q) / safe, grids.unit)
    below = torch.where(solvable, (a * q - b * r) / safe, grids.below)
    unit = torch.where(unit > 0, unit, grids.unit)
    below = torch.where(below < 0, below, grids.below)
    return grids._replace(unit=_stored(unit, grids.unit, scheme.scale), below=_stored(below, grids.below, scheme.scale))


def _stored(unit: torch.Tensor, before: torch.Tensor, storage: Scheme) -> torch.Tensor:
    fine = torch.isfinite(unit) & (unit != 0)
    return round_scale(torch.where(fine, unit, before), storage.scale)


def _parts(found: list[_Grids], scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """The grids of all rows as they are kept."""
    assert isinstance(scheme.scale, Scheme)
    inner = scheme.scale
    groups = scale_shape(scheme.granularity, shape)
    units = scale_shape(inner.granularity, groups)

    def kept(unit: list[torch.Tensor], code: list[torch.Tensor]) -> QTensor:
        codes = torch.cat(code).reshape(*groups[:-1], -1)[..., : groups[-1]]
        codes = codes.to(code_dtype(inner.format)).contiguous()
        return QTensor(codes, torch.cat(unit).reshape(units), None, None, inner)

    scale = kept([g.unit for g in found], [g.code for g in found])
    if scheme.zero_point != "float":
        return Parts(scale)
    below, depth = ([g.below for g in found if g.below is not None], [g.depth for g in found if g.depth is not None])
    return Parts(scale, None, kept(below, depth))
