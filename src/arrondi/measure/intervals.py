"""Error bars: intervals of means and quantiles by resampling.

Owns: `block_bootstrap` for a series, and `WindowBootstrap` for the positions of many windows of text. Neighbouring tokens are
not independent, so whole windows are drawn with replacement (Künsch 1989, "The jackknife and the bootstrap for general
stationary observations"; percentile intervals).

An infinite value makes a resample infinite that drew its window, and leaves the others alone: an interval may end at infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from arrondi.errors import DataError

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

_RESAMPLED: Final = 1 << 22
"""Numbers that a bootstrap draws at a time."""


def block_bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[Floats], npt.ArrayLike] | None = None,
    *,
    block: int,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic of a series, by resampling blocks of neighbours (circular block bootstrap).

    Args:
        values: (n,), in the order in which they depend on each other.
        statistic: (r, n) → (r,), one number for each row; None is the mean.
        block: neighbours drawn together; a series that depends over k steps wants blocks well above k.
        resamples: series drawn.
        seed: of a generator of its own; the same seed gives the same interval.
        confidence: share of resampled statistics inside the interval.

    Raises:
        DataError: no values, or a parameter out of range.

    Source: Politis and Romano 1992, "A circular block-resampling procedure for stationary data".
    """
    series = np.asarray(values, dtype=np.float64).reshape(-1)
    n = series.size
    if n == 0:
        raise DataError("The bootstrap needs at least one value, got none.")
    if block < 1 or resamples < 1 or not 0 < confidence < 1:
        raise DataError(
            f"The bootstrap needs block and resamples of at least 1 and a confidence between 0 and 1, "
            f"got block={block}, resamples={resamples}, confidence={confidence}."
        )
    block = min(block, n)
    generator = np.random.default_rng(seed)
    count = -(-n // block)
    step = max(_RESAMPLED // n, 1)
    found = []
    for start in range(0, resamples, step):
        starts = generator.integers(n, size=(min(step, resamples - start), count, 1))
        rows = series[((starts + np.arange(block)) % n).reshape(len(starts), -1)[:, :n]]
        found.append(np.asarray(rows.mean(axis=-1) if statistic is None else statistic(rows), dtype=np.float64))
    return _interval(np.concatenate(found), confidence)


class WindowBootstrap:
    """How often each window is in each resample; the statistics of positions then follow from sums over windows."""

    def __init__(self, windows: Sequence[torch.Tensor], seed: int, resamples: int, confidence: float) -> None:
        lengths = [len(w) for w in windows if len(w)]
        self.tokens = sum(lengths)
        if not self.tokens:
            raise DataError("Nothing was measured: no window has been added. Give a longer text.")
        if len(lengths) == 1:  # nothing to resample but the window's own parts
            size = round(self.tokens ** (1 / 3))
            lengths = [min(size, self.tokens - start) for start in range(0, self.tokens, size)]
        self.confidence = confidence
        self.window_of = np.repeat(np.arange(len(lengths)), lengths)  # (tokens,)
        count = len(lengths)
        self.times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)  # (r, W)

    def mean(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> float:
        """Σ values / Σ weights over all positions; the weights are 1 when not given."""
        above, below = self._sums(values), self._sums(weights)
        with np.errstate(invalid="ignore"):  # ∞ - ∞ is no number, and says so
            return float(above.sum() / below.sum())

    def mean_interval(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> Interval:
        """The interval of `mean`."""
        return _interval(self._resampled(values) / self._resampled(weights), self.confidence)

    def quantile(self, values: torch.Tensor, share: float) -> float:
        """The smallest value that at least `share` of the positions do not exceed."""
        ranked = np.sort(_numbers(values))
        if np.isnan(ranked[-1]):
            return float("nan")
        return float(ranked[max(int(np.ceil(share * ranked.size)) - 1, 0)])

    def quantile_interval(self, values: torch.Tensor, share: float) -> Interval:
        """The interval of `quantile`."""
        numbers = _numbers(values)
        if np.isnan(numbers).any():
            return float("nan"), float("nan")
        order = np.argsort(numbers, kind="stable")
        found = []
        step = max(_RESAMPLED // numbers.size, 1)
        for start in range(0, len(self.times), step):
            seen = np.cumsum(self.times[start : start + step, self.window_of[order]], axis=-1)  # (r, tokens)
            rank = (seen < share * seen[:, -1:]).sum(axis=-1)
            found.append(numbers[order[rank]])
        return _interval(np.concatenate(found), self.confidence)

    def _resampled(self, values: torch.Tensor | None) -> Floats:
        """The sum of each resample, (r,). Windows that were not drawn count for nothing, not even as 0 · ∞."""
        sums = self._sums(values)
        whole = np.isfinite(sums)
        found = self.times @ np.where(whole, sums, 0.0)
        for window in np.flatnonzero(~whole):
            with np.errstate(invalid="ignore"):
                found = np.where(self.times[:, window] > 0, found + sums[window], found)
        return np.asarray(found, dtype=np.float64)

    def _sums(self, values: torch.Tensor | None) -> Floats:
        """The sum of each window, (W,)."""
        with np.errstate(invalid="ignore"):
            return np.bincount(self.window_of, None if values is None else _numbers(values)).astype(np.float64)


def _numbers(values: torch.Tensor) -> Floats:
    return values.detach().cpu().double().numpy()


def _interval(found: Floats, confidence: float) -> Interval:
    shares = [(1 - confidence) / 2, (1 + confidence) / 2]
    # Between two numbers of which one is infinite there is nothing to interpolate: take one of those found.
    low, high = np.quantile(found, shares, method="linear" if np.isfinite(found).all() else "inverted_cdf")
    return float(low), float(high)
