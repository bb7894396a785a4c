"""Observers: watch batches of a tensor go by, then say which range [rmin, rmax] its grid should span.

Owns: `Observer`, the seven ways of choosing a range in the table `OBSERVERS`, and `histogram_filter`.  Uses: `errors`.

    min-max          everything seen; one outlier fixes the scale for ever
    moving-average   exponential mean of the batch extremes
    percentile       drops a share of the values at the ends
    histogram        drops the sparsest tails until only a chosen share is left
    mse              the clip with the least error |x - x̂|^p on a given grid
    kl               the clip that best keeps the distribution of |x| ("entropy", as TensorRT calibrates)
    cosine           the clip with the greatest cosine between x and x̂

What is kept is constant in size, never the values themselves: their extremes, and counts where a shape is needed.
Those of percentile, histogram, mse and cosine lie on the floating-point numbers with fewer mantissa bits: a value is
counted at the number with 8 or 10 bits (7 per channel) that it rounds to. Such cells need no range in advance, resolve
a bulk of ±1 beside an outlier of 1e12, do not depend on the order of batches, and the counts of two workers add up.

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (min-max, moving average); Migacz 2017, "8-bit inference with TensorRT"
(kl); Nagel et al. 2021, arXiv:2106.08295 (mse); Wu et al. 2020, arXiv:2006.16669 (cosine); Wu et al. 2020,
arXiv:2004.09602 (percentile, entropy and mean squared error compared).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arrondi.errors import DataError, SchemeError, ShapeError, unknown

Range = tuple[torch.Tensor, torch.Tensor]
NanPolicy = Literal["raise", "omit"]

Floats = NDArray[np.floating[Any]]
_OfRounding = Callable[[Floats, Floats], Floats]
_Lay = Callable[[float], "_Laid"]  # factor on the range → the grid over it

_log = logging.getLogger(__name__)

_SMALLEST_SCALE: Final = 2.0**-100
_CHUNK: Final = 2**21
"""Elements binned at a time, which bounds the scratch memory."""


def _nothing() -> torch.Tensor:
    """What is known before the first batch: (0,) float64."""
    return torch.zeros(0, dtype=torch.float64)


@dataclass(eq=False, slots=True)
class Observer:
    """One tensor's statistics so far. Made by the functions of `OBSERVERS`, not directly.

    Attributes:
        kind: its name in `OBSERVERS`.
        axis: the axis that keeps its own range per index (negative counts from the end); None for one range in all.
        name: what the tensor is called in messages.
        nan_policy: "raise" refuses NaN, infinities and what would be infinite in float32; "omit" drops and counts them.
        frozen: while True, `observe` does nothing.
        seen: values counted so far.
        omitted: values dropped so far.
    """

    kind: str
    read: Callable[[torch.Tensor, torch.Tensor, Any], Range] = field(repr=False)
    state: _Average | _Cells | _Magnitudes | None = field(default=None, repr=False)
    axis: int | None = None
    name: str = "input"
    nan_policy: NanPolicy = "raise"
    frozen: bool = False
    seen: int = 0
    omitted: int = 0
    _low: torch.Tensor = field(default_factory=_nothing, init=False, repr=False)  # (channels,); +inf: nothing seen
    _high: torch.Tensor = field(default_factory=_nothing, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.nan_policy not in ("raise", "omit"):
            raise unknown("nan_policy", self.nan_policy, ("raise", "omit"))

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Take one batch into account.

        Args:
            x: any shape, real dtype and device; with an axis, always the same size along it. An empty batch is nothing.

        Raises:
            DataError: NaN or infinite values under `nan_policy="raise"`; nothing of the batch has then been counted.
            ShapeError: `axis` does not exist, or its size changed.
        """
        if self.frozen:
            return
        rows = self._channels(x)
        if rows.shape[1] == 0:
            return
        low, high = _extremes(rows)
        finite = None
        if not bool(torch.isfinite(torch.cat((low, high)).float()).all()):
            finite = torch.isfinite(rows.float())
            bad = int((~finite).sum())
            if self.nan_policy == "raise":
                raise DataError(
                    f"{self.name}: {bad} of {rows.numel()} values are NaN or infinite. Repair what produced them, or "
                    'observe with nan_policy="omit", which drops and counts them.'
                )
            self.omitted += bad
            low = torch.where(finite, rows, math.inf).amin(1).double().cpu()
            high = torch.where(finite, rows, -math.inf).amax(1).double().cpu()
        self.seen += rows.numel() if finite is None else int(finite.sum())
        if self.state is not None:
            self.state.add(rows, low, high, finite)
        self._widen(low, high)

    def range(self) -> Range:
        """(rmin, rmax), float64, each of shape () or (size of axis,); rmin ≤ rmax, rmin > 0 is possible.

        Raises:
            DataError: no value was observed, or none of some channel.
        """
        if self.seen == 0:
            raise DataError(
                f"{self.name}: no values were observed. Run calibration data through it before asking for a range."
            )
        empty = torch.nonzero(self._low > self._high).flatten().tolist()
        if empty:
            raise DataError(
                f"{self.name}: no finite values in channels {empty[:8]}. Use more data, or one range for all."
            )
        low, high = self.read(self._low, self._high, self.state)
        return (low, high) if self.axis is not None else (low.reshape(()), high.reshape(()))

    def merge(self, other: Observer) -> None:
        """Add what another worker's observer of the same kind saw.

        Raises:
            SchemeError: the kinds differ, or the kind depends on the order of batches (moving-average, kl).
            ShapeError: the numbers of channels differ.
        """
        if other.kind != self.kind or isinstance(self.state, _Average | _Magnitudes):
            raise SchemeError(
                f"{self.name}: cannot merge a {other.kind} observer into a {self.kind} one. Merge two of one kind; "
                "moving-average and kl depend on the order of batches, so let one observer see them all."
            )
        if len(other._low) == 0:
            return
        if len(self._low) not in (0, len(other._low)):
            raise ShapeError(f"{self.name}: cannot merge {len(other._low)} channels into {len(self._low)}.")
        if isinstance(self.state, _Cells) and isinstance(other.state, _Cells):
            self.state.merge(other.state)
        self._widen(other._low, other._high)
        self.seen += other.seen
        self.omitted += other.omitted

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        first = len(self._low) == 0
        self._low = low if first else torch.minimum(self._low, low)
        self._high = high if first else torch.maximum(self._high, high)

    def _channels(self, x: torch.Tensor) -> torch.Tensor:
        """x as (channels, values)."""
        x = x.detach()
        if x.is_complex():
            raise DataError(
                f"{self.name}: ranges are of real values, got {x.dtype}. Observe real and imaginary parts apart."
            )
        if self.axis is None:
            return x.reshape(1, -1)
        if not -x.ndim <= self.axis < x.ndim:
            raise ShapeError(
                f"{self.name}: axis {self.axis} does not exist in shape {tuple(x.shape)}. Choose one that does."
            )
        channels = x.shape[self.axis]
        if len(self._low) not in (0, channels):
            raise ShapeError(
                f"{self.name}: axis {self.axis} had size {len(self._low)}, got shape {tuple(x.shape)}. "
                "Feed each tensor to an observer of its own."
            )
        return x.movedim(self.axis, 0).reshape(channels, x.numel() // max(channels, 1))


def min_max(*, axis: int | None = None, name: str = "input", nan_policy: NanPolicy = "raise") -> Observer:
    """The least and the greatest value of all batches, exactly.

    >>> o = min_max()
    >>> o.observe(torch.tensor([-1.0, 3.0]))
    >>> [float(v) for v in o.range()]
    [-1.0, 3.0]
    """
    return Observer("min-max", _read_min_max, None, axis, name, nan_policy)


def moving_average(
    *, momentum: float = 0.9, axis: int | None = None, name: str = "input", nan_policy: NanPolicy = "raise"
) -> Observer:
    """m ← momentum·m + (1 - momentum)·(batch extreme), for both ends; it starts from the first batch, not from zero.

    Args:
        momentum: in [0, 1); 0.9 for calibration, 0.99 while training. Set `frozen` when the range must stay.
    """
    if not 0 <= momentum < 1:
        raise SchemeError(f"momentum must be in [0, 1), got {momentum}. Usual values are 0.9 and 0.99.")
    return Observer("moving-average", _read_average, _Average(momentum), axis, name, nan_policy)


def percentile(
    *,
    p: float = 0.9999,
    symmetric: bool = False,
    axis: int | None = None,
    name: str = "input",
    nan_policy: NanPolicy = "raise",
) -> Observer:
    """The range that leaves out a share 1 - p of the values.

    Symmetric: (-T, T), beyond which lie ⌊(1 - p)·n⌋ magnitudes. Otherwise ⌊(1 - p)/2·n⌋ values are left out at each
    end. Read at the centre of a cell, so within 2^-11 of the order statistic (2^-8 per channel); exact where nothing
    is left out, and for bfloat16 data.

    Args:
        p: in (0, 1].
    """
    if not 0 < p <= 1:
        raise SchemeError(f"p must be in (0, 1], got {p}. It is a share, not a per cent: 0.9999.")
    return Observer(
        "percentile", partial(_read_percentile, p=p, symmetric=symmetric), _cells(axis, 10), axis, name, nan_policy
    )


def histogram(
    *,
    keep: float = 0.99,
    bins: int = 2048,
    max_refine: int = 8,
    drop_zeros: bool | None = None,
    axis: int | None = None,
    name: str = "input",
    nan_policy: NanPolicy = "raise",
) -> Observer:
    """`histogram_filter` over the stream: the lighter end is dropped until only the share `keep` is left.

    At least `keep` of the values, taken as float32, lie in the range. Its ends are borders of cells, which are at most
    2^-10 of their value wide, so which end loses how much may differ a little from the filter on the raw values.

    Args:
        keep, bins, max_refine: see `histogram_filter`.
        drop_zeros: leave exact zeros out of the count; the share is then of the others, and zero is added to the range.
            None: do so when no value is negative and some are zero, as after a ReLU.
        axis: must be None.

    Raises:
        SchemeError: an axis was given.
    """
    _refuse_axis("histogram", axis)
    _check_filter(keep, bins)
    read = partial(_read_histogram, keep=keep, bins=bins, max_refine=max_refine, drop_zeros=drop_zeros, name=name)
    return Observer("histogram", read, _cells(None, 10), None, name, nan_policy)


def mse(
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    exponent: float = 2.0,
    axis: int | None = None,
    name: str = "input",
    nan_policy: NanPolicy = "raise",
) -> Observer:
    """The clip with the least mean |x - x̂|^exponent: both extremes times one factor f in (0, 1].

    f is searched on 1.00, 0.99 … 0.02 and then refined by golden section. The error is integrated over every cell as if
    its values were evenly spread, which is exact where cells are narrow against a step.

    Args:
        qmin, qmax: codes of the grid, inclusive.
        symmetric: zero_point is 0 and the range is (-a, a) with scale 2a / (qmax - qmin), or (0, a) with scale a / qmax
            when qmin is 0. Otherwise the range is widened to hold zero and the zero point is the nearest code.
        exponent: 2, or 2.4 as is usual for weights before their rounding is optimised.
    """
    grid = _Grid(qmin, qmax, symmetric)
    if not exponent > 0:
        raise SchemeError(f"exponent must be positive, got {exponent}. Usual values are 2 and 2.4.")
    read = partial(_read_clip, grid=grid, clip=partial(_clip_mse, exponent=exponent))
    return Observer("mse", read, _cells(axis, 8), axis, name, nan_policy)


def kl(
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    bins: int = 2048,
    stride: int = 1,
    drop_zeros: bool | None = None,
    axis: int | None = None,
    name: str = "input",
    nan_policy: NanPolicy = "raise",
) -> Observer:
    """The threshold T on |x| for which clipping and merging bins loses the least relative entropy.

    Values are counted in bins of |x| whose width the first batch fixes (its absmax / `bins`). Bins are appended when a
    later batch goes further, and merged in pairs when there are more than 4·`bins`. Close to min-max on clean data,
    blind to rare large values, and meant for data whose two sides are alike: one threshold serves both.

    Args:
        qmin, qmax, symmetric: the grid. Symmetric gives (-T, T), or (0, T) when qmin is 0; otherwise the observed
            range, with zero, is cut to ±T.
        bins: bins up to the first batch's absmax.
        stride: test every stride-th threshold only; min-max is always among them.
        drop_zeros: empty the first bin, which exact zeros would dominate. None: when no value is negative and some are
            zero, as after a ReLU; say True for padded signed data.
        axis: must be None.

    Raises:
        SchemeError: an axis was given.

    Source: Migacz 2017. Empty bins count 1e-4 in both distributions before they are normalised.
    """
    _refuse_axis("kl", axis)
    if bins < 2 or stride < 1:
        raise SchemeError(f"kl needs at least 2 bins and a stride of at least 1, got bins={bins}, stride={stride}.")
    read = partial(_read_kl, grid=_Grid(qmin, qmax, symmetric), stride=stride, drop_zeros=drop_zeros)
    return Observer("kl", read, _Magnitudes(bins), None, name, nan_policy)


def cosine(
    *,
    qmin: int,
    qmax: int,
    symmetric: bool,
    axis: int | None = None,
    name: str = "input",
    nan_policy: NanPolicy = "raise",
) -> Observer:
    """The clip with the greatest cosine between the values x themselves and their fake-quantized x̂.

    **Not** the cosine between a layer's outputs that EasyQuant maximises, which needs the layer: this one sees a single
    tensor, takes the whole stream as one vector, and works on its counts, as `mse` does. A cosine does not notice a
    wrong magnitude, so where | ‖x̂‖ / ‖x‖ - 1 | is 0.02 or more at the best clip, the clip of `mse` is taken instead;
    3 bits and fewer usually end there.

    Args:
        qmin, qmax, symmetric: the grid, as in `mse`.
    """
    read = partial(_read_clip, grid=_Grid(qmin, qmax, symmetric), clip=_clip_cosine)
    return Observer("cosine", read, _cells(axis, 8), axis, name, nan_policy)


OBSERVERS: Final[Mapping[str, Callable[..., Observer]]] = MappingProxyType(
    {
        "min-max": min_max,
        "moving-average": moving_average,
        "percentile": percentile,
        "histogram": histogram,
        "mse": mse,
        "kl": kl,
        "cosine": cosine,
    }
)
"""Every kind of observer. All take axis, name and nan_policy; those of `NEEDS_GRID` also qmin, qmax and symmetric."""

NEEDS_GRID: Final = frozenset({"mse", "kl", "cosine"})
"""Kinds whose range depends on the grid it is for."""


def get_observer(kind: str) -> Callable[..., Observer]:
    """The function that makes observers of that kind.

    Raises:
        SchemeError: there is none; names the nearest.
    """
    if kind not in OBSERVERS:
        raise unknown("observer", kind, OBSERVERS)
    return OBSERVERS[kind]


def histogram_filter(
    values: torch.Tensor,
    counts: torch.Tensor | None = None,
    *,
    keep: float = 0.99,
    bins: int = 2048,
    max_refine: int = 8,
    name: str = "values",
) -> tuple[float, float]:
    """The range left when the lighter end bin of a histogram is dropped again and again while `keep` of it stays.

    Two pointers start at the ends of `bins` equal bins over [min, max]. The one at the lighter bin moves inwards (the
    left one when equal) until the next move would exceed the budget of ⌊(1 - keep)·n⌋ values. When fewer than bins / 8
    are left, outliers made the bins too coarse: what is left is binned again and the rest of the budget spent on it.

    Args:
        values: any shape, finite; taken as float64.
        counts: how often each value occurs, whole numbers; None means once each.
        keep: in (0, 1); at least this share lies in the range, ends included.
        bins: at least 2.
        max_refine: how often at most to bin again.
        name: what the values are called in messages.

    Returns:
        (low, high). A constant gives itself twice. Where only one of several distinct values would be left, the range
        is min … max and a warning says so.

    Raises:
        DataError: there are no values.
        SchemeError: keep or bins out of range.

    On data without tails it needlessly drops up to 1 - keep; it may cut off a small separate mode.
    """
    _check_filter(keep, bins)
    x = values.detach().reshape(-1).double()
    weight = torch.ones_like(x) if counts is None else counts.reshape(-1).double()
    if x.numel() == 0:
        raise DataError(f"{name}: the histogram filter got no values. Give it at least one.")
    total = float(weight.sum())
    budget = math.floor((1 - keep) * total + 1e-9)
    low, high = least, greatest = float(x.min()), float(x.max())
    dropped = [0.0, 0.0]
    for _ in range(1 + max_refine):
        if not low < high:
            break
        place = ((x - low) / (high - low) * bins).long().clamp_(0, bins - 1)
        mass = torch.bincount(place, weights=weight, minlength=bins).tolist()
        left, right = 0, bins - 1
        while left < right:
            from_left = mass[left] <= mass[right]
            count = mass[left] if from_left else mass[right]
            if count > budget:
                break
            budget -= count
            dropped[0 if from_left else 1] += count
            left, right = (left + 1, right) if from_left else (left, right - 1)
        kept = (place >= left) & (place <= right)
        x, weight = x[kept], weight[kept]
        edge = (high - low) / bins
        low, high = min(low + left * edge, float(x.min())), max(low + (right + 1) * edge, float(x.max()))
        if right - left + 1 >= bins / 8 or float(x.min()) == float(x.max()):
            break
    low, high = max(low, least), min(high, greatest)
    if float(x.min()) == float(x.max()) and least < greatest:
        warnings.warn(
            f"{name}: the histogram filter would keep {float(x[0]):.6g} alone of {least:.6g} … {greatest:.6g}, so the "
            "whole range is used. Drop zeros, or choose another observer.",
            stacklevel=2,
        )
        return least, greatest
    _log.debug("%s: histogram filter dropped shares %.3g below and %.3g above", name, *(d / total for d in dropped))
    return low, high


def _check_filter(keep: float, bins: int) -> None:
    if not 0 < keep < 1:
        raise SchemeError(f"keep must be in (0, 1), got {keep}. It is a share, not a per cent: 0.99.")
    if bins < 2:
        raise SchemeError(f"A histogram needs at least 2 bins, got {bins}. The usual number is 2048.")


def _refuse_axis(kind: str, axis: int | None) -> None:
    if axis is not None:
        raise SchemeError(f"{kind} has no per-channel form, got axis={axis}. Use percentile or mse, or axis=None.")


def _extremes(rows: torch.Tensor) -> Range:
    if rows.dtype == torch.bool:
        rows = rows.byte()
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    return low.reshape(-1).double().cpu(), high.reshape(-1).double().cpu()


def _greatest(low: torch.Tensor, high: torch.Tensor) -> float:
    """The greatest magnitude; 0 when there are no finite values."""
    ends = torch.cat((low, high)).abs()
    return float(torch.where(torch.isfinite(ends), ends, 0.0).max())


# What is kept of the values


@dataclass(eq=False, slots=True)
class _Average:
    """Moving averages of the batch extremes, (channels,) float64; NaN for a channel that has had no values yet."""

    momentum: float
    low: torch.Tensor = field(default_factory=_nothing)
    high: torch.Tensor = field(default_factory=_nothing)

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
class _Cells:
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

    def merge(self, other: _Cells) -> None:
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

    def density(self, channel: int, low: float, high: float) -> _Density:
        """The occupied cells of a channel, cut to its extremes."""
        counts = self.counts[channel]
        place = torch.nonzero(counts).flatten()
        begin, _, end = (v[place].clamp(low, high).numpy() for v in self.values())
        return _Density(begin, end, counts[place].double().numpy())


def _cells(axis: int | None, mantissa: int) -> _Cells:
    """Per tensor 2·48·2^mantissa cells (14 decades; 0.2 MB at 8 bits, 0.8 at 10), per channel 2·24·128 (7, 49 kB)."""
    return _Cells(mantissa, 48) if axis is None else _Cells(7, 24)


@dataclass(eq=False, slots=True)
class _Magnitudes:
    """Counts of |x| in equal bins from zero, as many as the greatest magnitude needs."""

    bins: int
    width: float = 0.0
    counts: torch.Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.int64))  # as many as are needed
    zeros: int = 0

    def add(self, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, finite: torch.Tensor | None) -> None:
        values = rows.flatten() if finite is None else rows[finite]
        greatest = _greatest(low, high)
        if len(self.counts) == 0 and greatest > 0:
            self.width = max(greatest / self.bins, _SMALLEST_SCALE)
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


# From what was kept to a range: (low, high, state) → (rmin, rmax), each (channels,) float64


def _read_min_max(low: torch.Tensor, high: torch.Tensor, state: None) -> Range:
    return low.clone(), high.clone()


def _read_average(low: torch.Tensor, high: torch.Tensor, state: _Average) -> Range:
    return state.low.clone(), state.high.clone()


def _read_percentile(low: torch.Tensor, high: torch.Tensor, state: _Cells, *, p: float, symmetric: bool) -> Range:
    counts, centre = state.counts, state.values()[1]
    total = counts.sum(1, keepdim=True)
    if symmetric:
        most = torch.maximum(-low, high)
        folded = counts[:, state.half :].clone()
        folded[:, 1:] += counts[:, : state.half].flip(1)
        out = ((1 - p) * total.double() + 1e-9).long()
        place = torch.searchsorted(folded.cumsum(1), total - out).squeeze(1)
        threshold = torch.where(out.squeeze(1) == 0, most, torch.minimum(centre[state.half + place], most))
        return -threshold, threshold
    out = ((1 - p) / 2 * total.double() + 1e-9).long()
    cumulative = counts.cumsum(1)
    first = centre[torch.searchsorted(cumulative, out + 1).squeeze(1)].clamp(low, high)
    last = centre[torch.searchsorted(cumulative, total - out).squeeze(1)].clamp(low, high)
    whole = out.squeeze(1) == 0
    return torch.where(whole, low, first), torch.where(whole, high, last)


def _read_histogram(
    low: torch.Tensor,
    high: torch.Tensor,
    state: _Cells,
    *,
    keep: float,
    bins: int,
    max_refine: int,
    drop_zeros: bool | None,
    name: str,
) -> Range:
    counts = state.counts[0].clone()
    zeros = int(state.zeros)
    without = (zeros > 0 and float(low) >= 0) if drop_zeros is None else drop_zeros
    if without:
        counts[state.half] -= zeros
    place = torch.nonzero(counts).flatten()
    if len(place) == 0:  # nothing but zeros
        return torch.zeros_like(low), torch.zeros_like(high)
    if len(place) == 1:  # all within one cell: the filter could not tell them apart
        return low.clone(), high.clone()
    begin, centre, end = (v[place].clamp(float(low), float(high)) for v in state.values())
    least, most = histogram_filter(centre, counts[place], keep=keep, bins=bins, max_refine=max_refine, name=name)
    kept = (centre >= least) & (centre <= most)  # whole cells, so that every value counted as kept is inside
    rmin, rmax = begin[kept].min().clamp(max=least).reshape(1), end[kept].max().clamp(min=most).reshape(1)
    if without:
        rmin, rmax = rmin.clamp(max=0), rmax.clamp(min=0)
    return torch.maximum(rmin, low), torch.minimum(rmax, high)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The codes that a range is for, and the affine rule that lays them over it."""

    qmin: int
    qmax: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not (self.qmin <= 0 <= self.qmax and self.qmin < self.qmax):
            raise SchemeError(
                f"A grid needs qmin ≤ 0 ≤ qmax and two codes, got {self.qmin} … {self.qmax}. int8 is -128 … 127."
            )
        if self.symmetric and self.qmax == 0:
            raise SchemeError(
                f"A symmetric grid needs positive codes, got {self.qmin} … {self.qmax}. Use symmetric=False."
            )

    def widest(self, low: torch.Tensor, high: torch.Tensor) -> Range:
        """The range without clipping: symmetric, or holding zero."""
        if not self.symmetric:
            return low.clamp(max=0), high.clamp(min=0)
        if self.qmin == 0:
            return torch.zeros_like(high), high.clamp(min=0)
        most = torch.maximum(-low, high)
        return -most, most

    def lay(self, rmin: float, rmax: float) -> _Laid:
        scale = max((rmax - rmin) / (self.qmax - self.qmin), _SMALLEST_SCALE)
        zero = 0.0 if self.symmetric else min(max(round(self.qmin - rmin / scale), self.qmin), self.qmax)
        return _Laid(scale, self.qmin - zero, self.qmax - zero)


class _Laid(NamedTuple):
    """A grid over a range: its values are scale times the whole numbers first … last."""

    scale: float
    first: float
    last: float


class _Density(NamedTuple):
    """A distribution: counts spread evenly over cells, each (cells,) float64. NumPy: many passes over few numbers."""

    begin: Floats
    end: Floats
    counts: Floats

    def sum(self, laid: _Laid, integral: _OfRounding, value: _OfRounding) -> float:
        """Σ value(n, d): n is the whole number that x / scale rounds to, clipped to first … last, d = x / scale - n.

        `integral` is that of `value` over x / scale, from zero to n + d. Both hold in the clipped ends too, where |d|
        exceeds ½. A cell cut down to a point, where all its values lie, takes `value` itself.
        """

        def round_off(x: Floats) -> tuple[Floats, Floats]:
            u = x / laid.scale
            n = np.rint(u).clip(laid.first, laid.last)
            return n, u - n

        low, high = round_off(self.begin), round_off(self.end)
        width = (self.end - self.begin) / laid.scale
        mean = np.divide(integral(*high) - integral(*low), width, out=value(*high), where=width > 0)
        return float((self.counts * mean).sum())


def _error(density: _Density, laid: _Laid, exponent: float) -> float:
    """Σ |x - x̂|^exponent."""

    def integral(n: Floats, d: Floats) -> Floats:  # every whole number passed contributes the same
        return (n * 0.5**exponent + d * np.abs(d) ** exponent) / (exponent + 1)

    return density.sum(laid, integral, lambda n, d: np.abs(d) ** exponent) * laid.scale**exponent


def _energy(density: _Density, laid: _Laid) -> float:
    """Σ x̂²."""

    def integral(n: Floats, d: Floats) -> Floats:  # the squares passed, and the part of the last one
        m = np.abs(n)
        return np.sign(n) * ((m - 1) * m * (2 * m - 1) / 6 + m * m / 2) + n * n * d

    return density.sum(laid, integral, lambda n, d: n * n) * laid.scale**2


def _best_factor(loss: Callable[[float], float]) -> float:
    """The factor in (0, 1] with the least loss: on a grid of hundredths first, then between its neighbours."""
    tried = {i / 100: loss(i / 100) for i in range(100, 1, -1)}  # of equals the first wins, the widest range
    best = min(tried, key=tried.__getitem__)
    low, high = best - 0.01, min(best + 0.01, 1.0)
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    tried |= {left: loss(left), right: loss(right)}
    for _ in range(14):  # narrows 0.02 to 2e-5
        if tried[left] < tried[right]:
            high, right = right, left
            left = high - golden * (high - low)
            tried[left] = loss(left)
        else:
            low, left = left, right
            right = low + golden * (high - low)
            tried[right] = loss(right)
    return min(tried, key=tried.__getitem__)


def _read_clip(
    low: torch.Tensor, high: torch.Tensor, state: _Cells, *, grid: _Grid, clip: Callable[[_Density, _Lay], float]
) -> Range:
    """Both extremes times the factor that `clip` finds, channel by channel."""
    rmin, rmax = grid.widest(low, high)
    factors = []
    for channel in range(len(low)):
        a, b = float(rmin[channel]), float(rmax[channel])
        density = state.density(channel, float(low[channel]), float(high[channel]))
        factors.append(clip(density, partial(_lay_clipped, grid, a, b)))
    factor = torch.tensor(factors, dtype=torch.float64)
    return rmin * factor, rmax * factor


def _lay_clipped(grid: _Grid, rmin: float, rmax: float, factor: float) -> _Laid:
    return grid.lay(rmin * factor, rmax * factor)


def _clip_mse(density: _Density, lay: _Lay, *, exponent: float) -> float:
    return _best_factor(lambda f: _error(density, lay(f), exponent))


def _clip_cosine(density: _Density, lay: _Lay) -> float:
    a, b = density.begin, density.end
    energy = float((density.counts * (a * a + a * b + b * b)).sum()) / 3
    if energy == 0:
        return 1.0

    def loss(factor: float) -> float:
        laid = lay(factor)
        output = _energy(density, laid)
        product = (energy + output - _error(density, laid, 2.0)) / 2
        return -product / math.sqrt(energy * output) if output > 0 else 0.0

    factor = _best_factor(loss)
    faithful = abs(math.sqrt(_energy(density, lay(factor)) / energy) - 1) < 0.02
    return factor if faithful else _clip_mse(density, lay, exponent=2.0)


def _read_kl(
    low: torch.Tensor, high: torch.Tensor, state: _Magnitudes, *, grid: _Grid, stride: int, drop_zeros: bool | None
) -> Range:
    rmin, rmax = grid.widest(low, high)
    one_sided = grid.qmin == 0 or (not grid.symmetric and (float(low) >= 0 or float(high) <= 0))
    levels = grid.qmax - grid.qmin + 1 if one_sided else (grid.qmax - grid.qmin + 2) // 2  # codes of one sign, and zero
    counts = state.counts.double()
    if (state.zeros > 0 and float(low) >= 0) if drop_zeros is None else drop_zeros:
        counts[:1] = 0
    size = len(counts)
    if size <= levels or float(counts.sum()) == 0:
        return rmin, rmax
    ends = torch.arange(size, levels - 1, -stride)  # descending: of equals the first, largest one wins
    end = int(ends[torch.argmin(_divergences(counts, ends, levels))])
    if end == size:
        return rmin, rmax
    threshold = (end + 0.5) * state.width
    return rmin.clamp(min=-threshold), rmax.clamp(max=threshold)


def _divergences(counts: torch.Tensor, ends: torch.Tensor, levels: int, empty: float = 1e-4) -> torch.Tensor:
    """D(p ‖ q) for clipping after `ends` bins: p the clipped histogram, q its `levels` groups spread out again.

    Bin j < end is in group ⌊j·levels/end⌋. p has the clipped mass in its last bin; q has each group's own mass, without
    the clipped, evenly on the bins that were occupied. Empty bins count `empty` in both, then both are normalised. All
    sums over bins are differences of running sums at the group borders.
    """
    total = counts.sum()
    mass = _running(counts)
    occupied = _running((counts > 0).double())
    entropy = _running(torch.xlogy(counts, counts))
    result = []
    for end in ends.split(max(2**20 // levels, 1)):
        borders = (torch.arange(levels + 1) * end.unsqueeze(1) + levels - 1) // levels
        group, bins = mass[borders].diff(dim=1), occupied[borders].diff(dim=1)
        level = group / bins.clamp(min=1)
        last, tail = counts[end - 1], total - mass[end]
        last_level = torch.where(last > 0, level[:, -1], empty)
        of_p = entropy[end] - torch.xlogy(last, last) + torch.xlogy(last + tail, last + tail)
        of_q = torch.xlogy(group, level).sum(1) + tail * last_level.log()
        empty_q = end - occupied[end]
        empty_p = empty_q - ((last == 0) & (tail > 0)).double()
        sum_p, sum_q = total + empty * empty_p, mass[end] + empty * empty_q
        result.append((of_p - of_q) / sum_p - sum_p.log() + sum_q.log())
    return torch.cat(result)


def _running(x: torch.Tensor) -> torch.Tensor:
    """Sums of the first 0, 1, … elements."""
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))
