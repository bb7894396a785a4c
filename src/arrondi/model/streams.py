"""A model followed on many batches, unit by unit: `Stream`, and the one loop over units, `walk`.

A stream is one version of a model (the original, the quantized) on one set of batches (calibration, evaluation): its hidden
states between two units and the arguments of every unit, batch by batch. Quantizing, measuring and comparing are consumers of
`walk`; there is no other loop over units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from arrondi.model.chain import Call, Chain, Inputs
from arrondi.model.store import Budget, TreeStore
from arrondi.model.whole import Whole

Units = Chain | Whole

Visit = Callable[[int, "Sequence[Stream]"], None]
"""Called with a unit and the streams of one instance, while the unit is filled and before it is run."""


class Stream:
    """One model on one set of batches.

    Use as a context manager: what does not fit in memory lies in a file, which is gone at the end.

    Attributes:
        units: the model's units.
        batches: how the model is called on each batch.
        bfloat16: whether products are computed in bfloat16.
    """

    def __init__(
        self, units: Units, batches: Sequence[Any], budget: Budget, folder: Path, *, bfloat16: bool = False
    ) -> None:
        """
        Args:
            budget: bytes of hidden states and arguments that may stay in memory, shared with other streams.
            folder: where the rest is kept.
        """
        self.units, self.bfloat16 = units, bfloat16
        self.batches = [Inputs.of(b) for b in batches]
        self._hidden = TreeStore(budget, folder)
        self._calls = TreeStore(budget, folder)

    def begin(self) -> None:
        """Run what comes before the first unit, for every batch. No unit may be filled."""
        self._hidden.clear()
        self._calls.clear()
        with self.units.outer_loaded():
            for batch in self.batches:
                hidden, calls = self.units.begin(batch)
                self._hidden.append(hidden)
                shared = _shared(calls)
                for call in calls:
                    self._calls.append(_hide(call, shared))

    def __len__(self) -> int:
        return len(self.batches)

    def run(self, i: int, j: int) -> torch.Tensor:
        """Unit i, which is filled, on batch j."""
        call = Call(*_show(self._calls[j * len(self.units) + i]))
        return self.units.run(i, self._hidden[j], call, bfloat16=self.bfloat16)

    def forwards(self, i: int) -> list[Callable[[], object]]:
        """Unit i on every batch, to be run as often as needed; nothing moves on."""
        return [lambda j=j: self.run(i, j) for j in range(len(self))]  # type: ignore[misc]

    def advance(self, i: int) -> None:
        """Take every batch through unit i."""
        for j in range(len(self)):
            self._hidden[j] = self.run(i, j)

    def output(self, j: int) -> torch.Tensor:
        """What the model computes for batch j, after its last unit. Call it inside `units.outer_loaded()`."""
        return self.units.finish(self.batches[j], self._hidden[j])

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hidden.close()
        self._calls.close()


def walk(groups: Sequence[Sequence[Stream]], visit: Visit | None = None) -> Iterator[int]:
    """Take streams through all units, one unit of one instance in memory at a time.

    Args:
        groups: for every instance its streams; they must have begun.
        visit: may change the weights of the unit before its streams go on.

    Yields:
        every unit, before it is run.
    """
    groups = [streams for streams in groups if streams]
    for i in range(len(groups[0][0].units)) if groups else ():
        yield i
        for streams in groups:
            units = streams[0].units
            units.fill(i)
            with ExitStack() as last:
                last.callback(units.drop, i)
                if visit is not None:
                    visit(i, streams)
                for stream in streams:
                    stream.advance(i)


@dataclass(frozen=True)
class _Shared:
    """A container that several units of one batch get and may change (keys and values that later blocks read again)."""

    value: Any


def _shared(calls: list[Call]) -> set[int]:
    """Identities of the containers that more than one unit is given."""
    seen: set[int] = set()
    again: set[int] = set()
    for call in calls:
        for value in (*call.args, *call.kwargs.values()):
            if type(value) in (dict, list):
                (again if id(value) in seen else seen).add(id(value))
    return again


def _hide(call: Call, shared: set[int]) -> tuple[Any, ...]:
    def hidden(value: Any) -> Any:
        return _Shared(value) if id(value) in shared else value

    return tuple(map(hidden, call.args)), {k: hidden(v) for k, v in call.kwargs.items()}, call.key


def _show(stored: tuple[Any, ...]) -> tuple[Any, ...]:
    args, kwargs, key = stored

    def shown(value: Any) -> Any:
        return value.value if isinstance(value, _Shared) else value

    return tuple(map(shown, args)), {k: shown(v) for k, v in kwargs.items()}, key
