"""How far what flows through a network moved, value by value, and how its numbers are spread: `signals`, `spread_of`.

Sums and counts of `BINS` bins are kept, never the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from arrondi.graph import Program

BINS: Final = 64


class _Signal:
    """Sums of one value over batches."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.low, self.high = math.inf, -math.inf
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.beyond = self.seen = 0

    def widen(self, value: torch.Tensor) -> None:
        value = value[value.isfinite()]  # masks are made of infinite numbers
        if not value.numel():
            return
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, span: Sequence[float] | None) -> None:
        if not math.isfinite(self.low):
            return
        finite = theirs.isfinite() & ours.isfinite()
        ours, theirs = ours[finite], theirs[finite]
        self.signal += float(theirs.double().square().sum())
        self.noise += float((ours.double() - theirs.double()).square().sum())
        self.counts += torch.histc(theirs.float(), BINS, self.low, max(self.high, self.low + 1e-12)).double()
        self.seen += theirs.numel()
        if span is not None:
            self.beyond += int(((theirs < span[0]) | (theirs > span[1])).sum())

    def row(self, span: Sequence[float] | None) -> dict[str, Any]:
        return {
            "sqnr_db": ratio(self.signal, self.noise), "range": None if span is None else list(span),
            "beyond_range": None if span is None else self.beyond / max(self.seen, 1),
            "histogram": {"low": self.low, "high": self.high, "counts": [int(n) for n in self.counts]},
        }  # fmt: skip


@torch.no_grad()
def signals(
    quantized: Program,
    reference: Program,
    batches: Iterable[Sequence[torch.Tensor]],
    ranges: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """Every value that both networks make in floating point, in order.

    Args:
        ranges: of values that are rounded, as they were chosen.

    Returns:
        value → `sqnr_db` of the quantized network's (None where nothing differs), the chosen `range` and the share of values beyond it,
        and a `histogram` of the reference's values from the smallest to the largest.
    """
    kept = list(batches)
    found: dict[str, _Signal] = {}

    def widen(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.numel():
            found.setdefault(name, _Signal()).widen(value)

    for inputs in kept:
        reference.watch(inputs, widen)
    for inputs in kept:
        made: dict[str, torch.Tensor] = {}
        reference.watch(inputs, made.__setitem__)

        def compare(name: str, value: Any, made: dict[str, torch.Tensor] = made) -> None:
            if name in found and value.shape == made[name].shape:
                found[name].add(value, made[name], ranges.get(name))

        quantized.watch(inputs, compare)
    return {name: one.row(ranges.get(name)) for name, one in found.items() if one.seen}


def spread_of(values: torch.Tensor) -> dict[str, Any]:
    """A histogram of a weight."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values.float(), BINS, low, max(high, low + 1e-12))
    return {"low": low, "high": high, "counts": [int(n) for n in counts]}


def ratio(signal: float, noise: float) -> float | None:
    """Signal over noise in dB, None without noise."""
    return None if not noise else 10 * math.log10(max(signal, 1e-300) / noise)
