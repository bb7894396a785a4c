"""What an observer keeps of the values that went by: constant in size, never the values themselves.

Owns: `Average` (of the batch extremes), `Cells` (counts of values on short floats) with `cells`, which chooses how many,
and `Magnitudes` (counts of |x| in equal bins).  Uses: nothing of arrondi.

Cells lie on the floating-point numbers with fewer mantissa bits: a value is counted at the number with 8 or 10 bits (7
per channel) that it rounds to. Such cells need no range in advance, resolve a bulk of ±1 beside an outlier of 1e12, do
not depend on the order of batches, and the counts of two workers add up.

All three have `add(rows, low, high, finite)`: a batch as (channels, values), the extremes of its finite values as
(channels,) float64 (+inf, -inf where there are none), and a mask of the finite values, None when all are.

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (moving averages); Migacz 2017, "8-bit inference with TensorRT" (equal
bins of |x|).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch

SMALLEST_SCALE: Final = 2.0**-100
"""The least width of a bin, and the least step of a grid."""

_CHUNK: Final = 2**21
"""Elements binned at a time, which bounds the scratch memory."""


def nothing() -> torch.Tensor:
    """What is known before the first batch: (0,) float64."""
    return torch.zeros(0, dtype=torch.float64)


@dataclass(eq=False, slots=True)
class Average:
    """Moving averages of the batch extremes, (channels,) float64; NaN for a channel that has had no values yet."""

    momentum: float
    low: torch.Tensor = field(default_factory=nothing)
    high: torch.Tensor = field(default_factory=nothing)

    def add(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, finite: torch.Tensor | None) -> None:
        self.low = self._mix(self.low, low)
        self.high = self._mix(self.high, high)

    def _mix(self, mean: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        new = torch.where(torch.isfinite(new), new, math.nan)
        if len(mean) == 0:
            return new
        mixed = self.momentum * mean + (1 - self.momentum) * new
        return torch.where(torch.isnan(new), mean, torch.where(torch.isnan(mean), new, mixed))


@dataclass(eq=False, slots=True)
class Cells:
    """Counts of values by the float32 with `mantissa` mantissa bits that they round to.

    The bits of a positive float32, read as an integer and rounded off, number such floats in ascending order; with the
    sign they number the cells. Of each sign the `span` binades below the greatest magnitude are kept apart, 2^mantissa
    cells each; what is smaller still shares the cell of zero. The counts depend on the values, not on their order.
    """

    mantissa: int
    span: int
    floor: int = 0  # number of the float below which magnitudes count as zero
    counts: torch.Tensor = field(default_factory=partial(torch.zeros, 0, 0, dtype=torch.int64))
    """(channels, 2·half + 1): cells -half … half, counted from the floor; no channels before the first batch."""
    zeros: torch.Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.int64))
    """(channels,): how many values were exactly zero."""

    @property
    def half(self) -> int:
        return self.span << self.mantissa

    def add(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, finite: torch.Tensor | None) -> None:
        channels, size = len(rows), 2 * self.half + 1
        self._raise_floor(int(self._number(torch.tensor([_greatest(low, high)]))), channels)
        step = max(_CHUNK // channels, 1)
        first = (torch.arange(channels, device=rows.device) * size + self.half).unsqueeze(1)
        for start in range(0, rows.shape[1], step):
            part = rows[:, start : start + step].float()
            number = (self._number(part) - self.floor).clamp_(min=0)
            index = first + torch.where(part < 0, -number, number)
            if finite is not None:
                index = torch.where(finite[:, start : start + step], index, channels * size)
            found = torch.bincount(index.flatten(), minlength=channels * size + 1)[:-1]
            self.counts += found.reshape(channels, size).cpu()
            self.zeros += (part == 0).sum(1).cpu()

    def merge(self, other: Cells) -> None:
        other = replace(other)  # to raise its floor on this copy only
        top = max(self.floor, other.floor) + self.half
        for side in (self, other):
            side._raise_floor(top, len(other.counts))
        self.counts += other.counts
        self.zeros += other.zeros

    def _number(self, x: torch.Tensor) -> torch.Tensor:
        """The number, from 0 upwards, of the short float nearest to |x|; int32, halves away from zero."""
        cut = 23 - self.mantissa
        bits = x.float().view(torch.int32) & 0x7FFFFFFF
        return ((bits + (1 << (cut - 1))) >> cut).clamp_(max=(255 << self.mantissa) - 1)  # not up to infinity

    def _raise_floor(self, top: int, channels: int) -> None:
        """Make room for magnitudes up to number `top`: cells that fall below the floor join the cell of zero."""
        floor = max(top - self.half, self.floor)
        if len(self.counts) == 0:
            self.counts = torch.zeros(channels, 2 * self.half + 1, dtype=torch.int64)
            self.zeros = torch.zeros(channels, dtype=torch.int64)
        elif floor > self.floor:
            number = torch.arange(-self.half, self.half + 1)
            lowered = torch.sign(number) * (number.abs() - (floor - self.floor)).clamp(min=0)
            self.counts = torch.zeros_like(self.counts).index_add_(1, lowered + self.half, self.counts)
        self.floor = floor

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(begin, centre, end) of every cell in ascending order, each (2·half + 1,) float64."""
        cut = 23 - self.mantissa
        number = torch.arange(self.floor + 1, self.floor + self.half + 1).clamp_(max=(255 << self.mantissa) - 1) << cut
        begin, centre, end = (
            (number + offset).int().view(torch.float32).double() for offset in (-(1 << (cut - 1)), 0, 1 << (cut - 1))
        )
        inner, zero = begin[:1], torch.zeros(1, dtype=torch.float64)
        return (
            torch.cat((-end.flip(0), -inner, begin)),
            torch.cat((-centre.flip(0), zero, centre)),
            torch.cat((-begin.flip(0), inner, end)),
        )


def cells(axis: int | None, mantissa: int) -> Cells:
    """Per tensor 2·48·2^mantissa cells (14 decades; 0.2 MB at 8 bits, 0.8 at 10), per channel 2·24·128 (7, 49 kB)."""
    return Cells(mantissa, 48) if axis is None else Cells(7, 24)


@dataclass(eq=False, slots=True)
class Magnitudes:
    """Counts of |x| in equal bins from zero, as many as the greatest magnitude needs."""

    bins: int
    width: float = 0.0
    counts: torch.Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.int64))  # as many as are needed
    zeros: int = 0

    def add(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, finite: torch.Tensor | None) -> None:
        values = rows.flatten() if finite is None else rows[finite]
        greatest = _greatest(low, high)
        if len(self.counts) == 0 and greatest > 0:
            self.width = max(greatest / self.bins, SMALLEST_SCALE)
            self.counts = torch.zeros(self.bins, dtype=torch.int64)
            self.counts[0] = self.zeros
        self.zeros += int((values == 0).sum())
        if len(self.counts) == 0:  # zeros only, so far
            return
        self._reach(greatest)
        for part in values.split(_CHUNK):
            place = (part.double().abs() / self.width).long().clamp_(max=len(self.counts) - 1)
            self.counts += torch.bincount(place, minlength=len(self.counts)).cpu()

    def _reach(self, greatest: float) -> None:
        bins = greatest / self.width * (1 - 1e-12)  # a magnitude on the last border is in the last bin
        while bins > 4 * self.bins:
            pairs = torch.nn.functional.pad(self.counts, (0, len(self.counts) % 2))
            self.counts = pairs.reshape(-1, 2).sum(1)
            self.width *= 2
            bins /= 2
        self.counts = torch.nn.functional.pad(self.counts, (0, max(math.ceil(bins) - len(self.counts), 0)))


def _greatest(low: torch.Tensor, high: torch.Tensor) -> float:
    """The greatest magnitude; 0 when there are no finite values."""
    ends = torch.cat((low, high)).abs()
    return float(torch.where(torch.isfinite(ends), ends, 0.0).max())
