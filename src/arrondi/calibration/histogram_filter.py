"""The range left when the sparsest tails of a set of values are dropped.

Owns: `histogram_filter`, for values or for counts of them, and `check_filter`, the check of its options.  Uses: `errors`.
"""

from __future__ import annotations

import logging
import math
import warnings

import torch

from arrondi.errors import DataError, SchemeError

_log = logging.getLogger(__name__)


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
    check_filter(keep, bins)
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


def check_filter(keep: float, bins: int) -> None:
    if not 0 < keep < 1:
        raise SchemeError(f"keep must be in (0, 1), got {keep}. It is a share, not a per cent: 0.99.")
    if bins < 2:
        raise SchemeError(f"A histogram needs at least 2 bins, got {bins}. The usual number is 2048.")
