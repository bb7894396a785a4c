"""From what was kept of the values to a range: every rule is (low, high, state) → (rmin, rmax), (channels,) float64.

Owns: the rules `read_…`, one for each way of choosing a range; `CodeSpan`, the codes that mse, kl and cosine choose it for;
the searches over clips, `clip_mse` and `clip_cosine`.  Uses: `counts`, `histogram_filter`, `errors`.

low and high are the extremes of all finite values, (channels,) float64, each low ≤ its high.

Sources: Migacz 2017, "8-bit inference with TensorRT" (kl); Nagel et al. 2021, arXiv:2106.08295 (mse); Wu et al. 2020,
arXiv:2006.16669 (cosine); Wu et al. 2020, arXiv:2004.09602 (percentile, entropy and mean squared error compared).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arrondi.calibration.counts import SMALLEST_SCALE, Average, Cells, Magnitudes
from arrondi.calibration.histogram_filter import histogram_filter
from arrondi.errors import SchemeError

Range = tuple[torch.Tensor, torch.Tensor]

_Floats = NDArray[np.floating[Any]]
_OfRounding = Callable[[_Floats, _Floats], _Floats]
_Lay = Callable[[float], "_Laid"]  # factor on the range → the grid over it


def read_min_max(low: torch.Tensor, high: torch.Tensor, state: None) -> Range:
    return low.clone(), high.clone()


def read_average(low: torch.Tensor, high: torch.Tensor, state: Average) -> Range:
    return state.low.clone(), state.high.clone()


def read_percentile(low: torch.Tensor, high: torch.Tensor, state: Cells, *, p: float, symmetric: bool) -> Range:
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


def read_histogram(
    low: torch.Tensor,
    high: torch.Tensor,
    state: Cells,
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
class CodeSpan:
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
        scale = max((rmax - rmin) / (self.qmax - self.qmin), SMALLEST_SCALE)
        zero = 0.0 if self.symmetric else min(max(round(self.qmin - rmin / scale), self.qmin), self.qmax)
        return _Laid(scale, self.qmin - zero, self.qmax - zero)


class _Laid(NamedTuple):
    """A grid over a range: its values are scale times the whole numbers first … last."""

    scale: float
    first: float
    last: float


class _Density(NamedTuple):
    """A distribution: counts spread evenly over cells, each (cells,) float64. NumPy: many passes over few numbers."""

    begin: _Floats
    end: _Floats
    counts: _Floats

    def sum(self, laid: _Laid, integral: _OfRounding, value: _OfRounding) -> float:
        """Σ value(n, d): n is the whole number that x / scale rounds to, clipped to first … last, d = x / scale - n.

        `integral` is that of `value` over x / scale, from zero to n + d. Both hold in the clipped ends too, where |d|
        exceeds ½. A cell cut down to a point, where all its values lie, takes `value` itself.
        """

        def round_off(x: _Floats) -> tuple[_Floats, _Floats]:
            u = x / laid.scale
            n = np.rint(u).clip(laid.first, laid.last)
            return n, u - n

        low, high = round_off(self.begin), round_off(self.end)
        width = (self.end - self.begin) / laid.scale
        mean = np.divide(integral(*high) - integral(*low), width, out=value(*high), where=width > 0)
        return float((self.counts * mean).sum())


def _density(state: Cells, channel: int, low: float, high: float) -> _Density:
    """The occupied cells of a channel, cut to its extremes."""
    counts = state.counts[channel]
    place = torch.nonzero(counts).flatten()
    begin, _, end = (v[place].clamp(low, high).numpy() for v in state.values())
    return _Density(begin, end, counts[place].double().numpy())


def _error(density: _Density, laid: _Laid, exponent: float) -> float:
    """Σ |x - x̂|^exponent."""

    def integral(n: _Floats, d: _Floats) -> _Floats:  # every whole number passed contributes the same
        return (n * 0.5**exponent + d * np.abs(d) ** exponent) / (exponent + 1)

    return density.sum(laid, integral, lambda n, d: np.abs(d) ** exponent) * laid.scale**exponent


def _energy(density: _Density, laid: _Laid) -> float:
    """Σ x̂²."""

    def integral(n: _Floats, d: _Floats) -> _Floats:  # the squares passed, and the part of the last one
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


def read_clip(
    low: torch.Tensor, high: torch.Tensor, state: Cells, *, grid: CodeSpan, clip: Callable[[_Density, _Lay], float]
) -> Range:
    """Both extremes times the factor that `clip` finds, channel by channel."""
    rmin, rmax = grid.widest(low, high)
    factors = []
    for channel in range(len(low)):
        a, b = float(rmin[channel]), float(rmax[channel])
        density = _density(state, channel, float(low[channel]), float(high[channel]))
        factors.append(clip(density, partial(_lay_clipped, grid, a, b)))
    factor = torch.tensor(factors, dtype=torch.float64)
    return rmin * factor, rmax * factor


def _lay_clipped(grid: CodeSpan, rmin: float, rmax: float, factor: float) -> _Laid:
    return grid.lay(rmin * factor, rmax * factor)


def clip_mse(density: _Density, lay: _Lay, *, exponent: float) -> float:
    return _best_factor(lambda f: _error(density, lay(f), exponent))


def clip_cosine(density: _Density, lay: _Lay) -> float:
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
    return factor if faithful else clip_mse(density, lay, exponent=2.0)


def read_kl(
    low: torch.Tensor, high: torch.Tensor, state: Magnitudes, *, grid: CodeSpan, stride: int, drop_zeros: bool | None
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
