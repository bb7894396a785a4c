"""Ranges of what flows through a graph: `observe`, which runs it on batches and keeps counts, never the values."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from arrondi.calibration import Observer, get_observer
from arrondi.errors import DataError
from arrondi.formats import Scheme
from arrondi.graph.program import Program
from arrondi.graph.rules import FIXED

_WIDE: Final = 8
"""Bits from which on the whole range that an operator can give is kept; with fewer, what it does give counts."""


@torch.no_grad()
def observe(
    program: Program,
    batches: Iterable[Sequence[torch.Tensor]],
    values: Mapping[str, int],
    scheme: Scheme,
    kind: str,
    options: Mapping[str, Any] | None = None,
    apart: Mapping[int, Scheme] | None = None,
) -> dict[int, tuple[float, float]]:
    """The range of every group of values.

    Args:
        program: in floating point.
        batches: its inputs.
        values: value → the group that shares a range.
        scheme: what the values become; some observers look for the best range of its grid.
        apart: group → another scheme.
        kind, options: of the observer, see `arrondi.calibration.OBSERVERS`.

    Returns:
        group → (low, high).

    Raises:
        DataError: a value is NaN or infinite, or there are no batches.
    """
    make = get_observer(kind)
    takes = inspect.signature(make).parameters

    def own(group: int) -> dict[str, Any]:
        wanted = (apart or {}).get(group, scheme)
        facts = {"qmin": wanted.format.qmin, "qmax": wanted.format.qmax, "symmetric": wanted.symmetric}
        return {**{k: v for k, v in facts.items() if k in takes}, **(options or {})}

    makers = program.graph.producers
    few = {g for g in values.values() if (apart or {}).get(g, scheme).format.bits < _WIDE}
    known = {n: FIXED[node.op] for n, node in makers.items() if node.op in FIXED and values.get(n) not in few}
    found: dict[int, Observer] = {}

    def see(name: str, value: torch.Tensor) -> None:
        group = values.get(name)
        if group is not None and name not in known:
            try:
                found.setdefault(group, make(name=name, **own(group))).observe(value)
            except DataError as error:
                raise DataError(
                    f"The network gives NaN or infinite numbers at {name}. Check its weights, and that the samples are in its own scale."
                ) from error

    count = 0
    for inputs in batches:
        program.watch(inputs, see)
        count += 1
    if not count:
        raise DataError("Calibration data has no samples. Give at least one.")
    ranges = {group: tuple(float(end) for end in one.range()) for group, one in found.items()}
    ranges |= {values[name]: ends for name, ends in known.items() if name in values}
    return {group: (low, high) for group, (low, high) in ranges.items()}
