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

from arrondi.model.chain import Call, Chain, Inputs, moved
from arrondi.model.handed import Handed, named_in
from arrondi.model.segments import Segments
from arrondi.model.store import Budget, TreeStore
from arrondi.model.whole import Whole

Units = Chain | Whole | Segments

Visit = Callable[[int, "Sequence[Stream]"], None]
"""Called with a unit and the streams of one instance, while the unit is filled and before it is run."""


class Stream:
    """One model on one set of batches.

    Use as a context manager: what does not fit in memory lies in a file, which is gone at the end.

    Attributes:
        units: the model's units.
        batches: how the model is called on each batch.
        bfloat16: whether products are computed in bfloat16.
        keeps_inputs: whether what entered earlier units can still be read.
        to_the_end: whether anybody reads what leaves the last unit; where nobody does, it is not run.
        budget, folder: see `__init__`.
    """

    def __init__(
        self,
        units: Units,
        batches: Sequence[Any],
        budget: Budget,
        folder: Path | None,
        *,
        bfloat16: bool = False,
        keep_inputs: bool = False,
    ) -> None:
        """
        Args:
            budget: bytes of hidden states and arguments that may stay in memory, shared with other streams.
            folder: where the rest is kept; None keeps everything in memory.
            keep_inputs: keep what enters every unit, so that the way can be gone back.
        """
        self.units, self.bfloat16, self.keeps_inputs = units, bfloat16, keep_inputs
        self.to_the_end = True
        self.batches = [Inputs.of(b) for b in batches]
        self.budget, self.folder = budget, folder
        self._hidden, self._calls, self._handed = (TreeStore(budget, folder) for _ in range(3))
        self._kept: list[Any] = []
        self._wanted: dict[Handed, int] = {}
        self._places: dict[tuple[int, Handed], int] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Run what comes before the first unit, for every batch. No unit may be filled."""
        self.close()
        self._hidden, self._calls, self._handed = (TreeStore(self.budget, self.folder) for _ in range(3))
        self._kept, self._wanted, self._places = [], {}, {}
        with self.units.outer_loaded():
            for batch in self.batches:
                hidden, calls = self.units.begin(moved(batch, self.units.instance.device))
                self._hidden.append(hidden.cpu())
                shared = _shared(calls)
                for i, call in enumerate(calls):
                    self._calls.append(self._hide(call, shared))
                    self._wanted |= dict.fromkeys(named_in([call.args, call.kwargs]), i)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def shares_state(self) -> bool:
        """Whether units hand each other more than hidden states."""
        return bool(self._kept or self._wanted)

    def hidden(self, i: int, j: int) -> torch.Tensor:
        """What enters unit i on batch j, on the device where units run; after the last unit, what leaves it.

        That of the unit which is next, unless inputs are kept.
        """
        entering: torch.Tensor = self._hidden[self._place(i, j)].to(self.units.instance.device)
        return entering

    @torch.no_grad()
    def run(self, i: int, j: int) -> torch.Tensor:
        """Unit i, which is filled, on batch j."""
        return self.run_on(i, j, self.hidden(i, j))

    def run_on(self, i: int, j: int, hidden: torch.Tensor) -> torch.Tensor:
        """Unit i, called as on batch j, on other hidden states; gradients are recorded where they are wanted."""
        return self._run_all(i, j, hidden)[0]

    def _run_all(self, i: int, j: int, hidden: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        call = self._show(self._calls[j * len(self.units) + i]).filled(lambda h: self._handed[self._places[j, h]])
        return self.units.run(i, hidden, moved(call, self.units.instance.device), bfloat16=self.bfloat16)

    def forwards(self, i: int) -> list[Passage]:
        """Unit i on every batch, to be run as often as needed; nothing moves on."""
        return [Passage(self, i, j) for j in range(len(self))]

    def advance(self, i: int) -> None:
        """Take every batch through unit i."""
        if i == len(self.units) - 1 and not self.to_the_end:
            return
        for j in range(len(self)):
            output, rest = self._run_all(i, j, self.hidden(i, j))
            self._hand_on(i, j, rest)
            leaving = output.cpu()
            if self.keeps_inputs:
                self._hidden.append(leaving)
            else:
                self._hidden[j] = leaving

    @torch.no_grad()
    def _hand_on(self, i: int, j: int, rest: Sequence[torch.Tensor]) -> None:
        """Keep what unit i returned for later units, and forget what none needs any more."""
        for number, tensor in enumerate(rest):
            if (which := Handed(i, number)) in self._wanted:
                self._places[j, which] = len(self._handed)
                self._handed.append(tensor)
        for which, last in self._wanted.items():
            if last == i and (j, which) in self._places:
                self._handed[self._places.pop((j, which))] = None

    def pieces(self) -> list[tuple[int, slice]]:
        """All batches in parts whose outputs fit in memory, each with its rows: single windows, where a batch is token ids alone."""
        found: list[tuple[int, slice]] = []
        for j, batch in enumerate(self.batches):
            ids = batch.kwargs.get("input_ids")
            alone = not batch.args and len(batch.kwargs) == 1 and ids is not None and isinstance(self.units, Chain)
            if alone and ids is not None and _windows_first(self.hidden(len(self.units), j), ids):
                found += [(j, slice(k, k + 1)) for k in range(len(ids))]
            else:
                found.append((j, slice(None)))
        return found

    @torch.no_grad()
    def output(self, j: int, rows: slice = slice(None)) -> torch.Tensor:
        """What the model computes for some rows of batch j, after its last unit. Call it inside `units.outer_loaded()`."""
        hidden = self.hidden(len(self.units), j)
        return self.output_on(j, hidden if rows == slice(None) else hidden[rows], rows)

    def output_on(self, j: int, hidden: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """What follows the last unit, called as on rows of batch j, on other hidden states; gradients are recorded where they are wanted."""
        inputs = self.batches[j] if rows == slice(None) else Inputs.of(self.batches[j].kwargs["input_ids"][rows])
        return self.units.finish(moved(inputs, self.units.instance.device), hidden)

    def _place(self, i: int, j: int) -> int:
        return i * len(self) + j if self.keeps_inputs else j

    def _hide(self, call: Call, shared: set[int]) -> tuple[Any, ...]:
        """A call as a tree; containers that units share, and objects of the model's own, are kept beside it."""

        def hidden(value: Any) -> Any:
            if id(value) not in shared and _is_tree(value):
                return value
            number = next((n for n, kept in enumerate(self._kept) if kept is value), len(self._kept))
            if number == len(self._kept):
                self._kept.append(value)
            return (_KEPT, number)

        return tuple(map(hidden, call.args)), {k: hidden(v) for k, v in call.kwargs.items()}, call.key

    def _show(self, stored: tuple[Any, ...]) -> Call:
        args, kwargs, key = stored

        def shown(value: Any) -> Any:
            return self._kept[value[1]] if type(value) is tuple and value[:1] == (_KEPT,) else value

        return Call(tuple(map(shown, args)), {k: shown(v) for k, v in kwargs.items()}, key)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and files back."""
        for store in (self._hidden, self._calls, self._handed):
            store.close()


@dataclass(frozen=True)
class Passage:
    """One batch on its way through one unit, which is filled. It can be run as often as needed; nothing moves on."""

    stream: Stream
    unit: int
    batch: int

    def __call__(self) -> torch.Tensor:
        """What the unit gives."""
        return self.stream.run(self.unit, self.batch)

    def differentiable(self) -> torch.Tensor:
        """What the unit gives, with the way back to those of its parameters that want gradients."""
        with torch.enable_grad():
            return self.stream.run_on(self.unit, self.batch, self.stream.hidden(self.unit, self.batch))


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


_KEPT = "arrondi: kept by reference"
"""Marks the place of a value that is no tree of tensors."""


def _windows_first(hidden: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the first axes of hidden states are surely those of the ids: windows, then tokens.

    Some models have several streams of hidden states in front of them, or tokens before windows.
    """
    shape, wanted = tuple(hidden.shape), tuple(ids.shape)
    return shape[:2] == wanted and shape[1:3] != wanted and wanted != wanted[::-1]


def _shared(calls: list[Call]) -> set[int]:
    """Identities of the containers that more than one unit is given, to be changed by one and read by another."""
    seen: set[int] = set()
    again: set[int] = set()
    for call in calls:
        for value in (*call.args, *call.kwargs.values()):
            if type(value) in (dict, list):
                (again if id(value) in seen else seen).add(id(value))
    return again


def _is_tree(value: Any) -> bool:
    """Whether a value is made of tensors and plain numbers."""
    if type(value) in (tuple, list):
        return all(map(_is_tree, value))
    if type(value) is dict:
        return all(map(_is_tree, value.values()))
    return value is None or isinstance(value, (torch.Tensor, Handed, bool, int, float, str))
