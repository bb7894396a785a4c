"""What calibration says of the inputs of sites: `Seen` and `collect`.

Inputs that several sites read are counted once. Nothing raw is kept: a second moment, a sum, two extremes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from arrondi.calibration import SecondMoment
from arrondi.model.flow import Use, watch
from arrondi.pipeline.step import Need

Key = tuple[str, int | None]
"""A parameter, and which matrix of it."""

Forward = Callable[[], object]
"""Sends one calibration batch through a unit."""


@dataclass
class Seen:
    """What was seen of one input.

    Attributes:
        tokens: rows of it.
        moment: Σ x xᵀ, if it was asked for.
        total: Σ x, float64 (n,), if it was asked for.
        low, high: its least and its largest number, if they were asked for.
    """

    tokens: int = 0
    moment: SecondMoment | None = None
    total: torch.Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    @property
    def mean(self) -> torch.Tensor:
        """Mean of every column, float32 (n,)."""
        assert self.total is not None and self.tokens
        return (self.total / self.tokens).float()

    def add(self, x: torch.Tensor, needs: Collection[Need]) -> None:
        """Count one input (…, n)."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        self.tokens += len(rows)
        if "moment" in needs:
            if self.moment is None:
                self.moment = SecondMoment(rows.shape[-1])
            self.moment.update(rows)
        if "mean" in needs:
            total = rows.double().sum(0).cpu()
            self.total = total if self.total is None else self.total + total
        if "range" in needs:
            low, high = (float(v) for v in torch.aminmax(rows))
            self.low, self.high = min(self.low, low), max(self.high, high)


class _Enough(Exception):
    """Every input that is wanted has been seen; the rest of the forward pass is not needed."""


def collect(
    leaders: Collection[str],
    params: Mapping[str, torch.Tensor],
    uses: Mapping[str, int],
    forwards: Sequence[Forward],
    needs: Collection[Need],
) -> dict[Key, Seen]:
    """Watch the inputs of some parameters while batches pass through a unit.

    Args:
        leaders: parameters to watch; one for each input that is wanted.
        params: parameter → its tensor, filled.
        uses: how often each matrix parameter is used in one pass; a pass ends early once all were seen that often.
        forwards: one for each batch.
        needs: what to collect.
    """
    seen: dict[Key, Seen] = {}
    wanted = {p: params[p] for p in leaders}
    # Which experts a batch reaches is not known beforehand, so stacks want the whole forward pass.
    count = sum(uses[p] for p in leaders) if all(p in uses for p in leaders) else 0
    reports = 0

    def report(use: Use) -> None:
        nonlocal reports
        if use.kind != "embedding" and (use.kind != "convolution" or use.groups == 1):
            seen.setdefault((use.param, use.matrix), Seen()).add(use.x, needs)
        reports += 1
        if reports == count:
            raise _Enough

    with watch(wanted, report):
        for forward in forwards:
            reports = 0
            with contextlib.suppress(_Enough):
                forward()
    return seen
