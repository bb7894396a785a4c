"""Observers: watch batches of a tensor go by, then say which range [rmin, rmax] its grid should span.

Owns: `Observer`, and the seven kinds of it in the table `OBSERVERS`.  Uses: `counts` (what is kept of the batches),
`range_rules` (from that to a range), `histogram_filter` (the check of its options), `errors`.

    min-max          everything seen; one outlier fixes the scale for ever
    moving-average   exponential mean of the batch extremes
    percentile       drops a share of the values at the ends
    histogram        drops the sparsest tails until only a chosen share is left
    mse              the clip with the least error |x - x̂|^p on a given grid
    kl               the clip that best keeps the distribution of |x| ("entropy", as TensorRT calibrates)
    cosine           the clip with the greatest cosine between x and x̂

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (min-max, moving average); Wu et al. 2020, arXiv:2004.09602 (percentile,
entropy and mean squared error compared). Those of the searches are in `range_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import torch

from arrondi.calibration.counts import Average, Cells, Magnitudes, cells, nothing
from arrondi.calibration.histogram_filter import check_filter
from arrondi.calibration.range_rules import (
    CodeSpan,
    Range,
    clip_cosine,
    clip_mse,
    read_average,
    read_clip,
    read_histogram,
    read_kl,
    read_min_max,
    read_percentile,
)
from arrondi.errors import DataError, SchemeError, ShapeError, unknown

NanPolicy = Literal["raise", "omit"]


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
    state: Average | Cells | Magnitudes | None = field(default=None, repr=False)
    axis: int | None = None
    name: str = "input"
    nan_policy: NanPolicy = "raise"
    frozen: bool = False
    seen: int = 0
    omitted: int = 0
    _low: torch.Tensor = field(default_factory=nothing, init=False, repr=False)  # (channels,); +inf: nothing seen
    _high: torch.Tensor = field(default_factory=nothing, init=False, repr=False)

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
        if other.kind != self.kind or isinstance(self.state, Average | Magnitudes):
            raise SchemeError(
                f"{self.name}: cannot merge a {other.kind} observer into a {self.kind} one. Merge two of one kind; "
                "moving-average and kl depend on the order of batches, so let one observer see them all."
            )
        if len(other._low) == 0:
            return
        if len(self._low) not in (0, len(other._low)):
            raise ShapeError(f"{self.name}: cannot merge {len(other._low)} channels into {len(self._low)}.")
        if isinstance(self.state, Cells) and isinstance(other.state, Cells):
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
    return Observer("min-max", read_min_max, None, axis, name, nan_policy)


def moving_average(
    *, momentum: float = 0.9, axis: int | None = None, name: str = "input", nan_policy: NanPolicy = "raise"
) -> Observer:
    """m ← momentum·m + (1 - momentum)·(batch extreme), for both ends; it starts from the first batch, not from zero.

    Args:
        momentum: in [0, 1); 0.9 for calibration, 0.99 while training. Set `frozen` when the range must stay.
    """
    if not 0 <= momentum < 1:
        raise SchemeError(f"momentum must be in [0, 1), got {momentum}. Usual values are 0.9 and 0.99.")
    return Observer("moving-average", read_average, Average(momentum), axis, name, nan_policy)


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
        "percentile", partial(read_percentile, p=p, symmetric=symmetric), cells(axis, 10), axis, name, nan_policy
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
    check_filter(keep, bins)
    read = partial(read_histogram, keep=keep, bins=bins, max_refine=max_refine, drop_zeros=drop_zeros, name=name)
    return Observer("histogram", read, cells(None, 10), None, name, nan_policy)


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
    grid = CodeSpan(qmin, qmax, symmetric)
    if not exponent > 0:
        raise SchemeError(f"exponent must be positive, got {exponent}. Usual values are 2 and 2.4.")
    read = partial(read_clip, grid=grid, clip=partial(clip_mse, exponent=exponent))
    return Observer("mse", read, cells(axis, 8), axis, name, nan_policy)


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
    read = partial(read_kl, grid=CodeSpan(qmin, qmax, symmetric), stride=stride, drop_zeros=drop_zeros)
    return Observer("kl", read, Magnitudes(bins), None, name, nan_policy)


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
    read = partial(read_clip, grid=CodeSpan(qmin, qmax, symmetric), clip=clip_cosine)
    return Observer("cosine", read, cells(axis, 8), axis, name, nan_policy)


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


def _refuse_axis(kind: str, axis: int | None) -> None:
    if axis is not None:
        raise SchemeError(f"{kind} has no per-channel form, got axis={axis}. Use percentile or mse, or axis=None.")


def _extremes(rows: torch.Tensor) -> Range:
    if rows.dtype == torch.bool:
        rows = rows.byte()
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    return low.reshape(-1).double().cpu(), high.reshape(-1).double().cpu()
