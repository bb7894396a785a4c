"""One plan: the nodes of a graph for inputs of certain shapes as steps of the compiled executor.

A node becomes native steps where `operators` has an emitter that takes it; any other is computed by PyTorch on the same values, copied out
of the plan and into it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from arrondi.graph.codes import tensor_of
from arrondi.graph.compiled.room import Held, Rooms, strides_of
from arrondi.graph.ir import Graph, Node
from arrondi.graph.ops import evaluate

Tensor = torch.Tensor
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Emitter = Callable[["Builder", Node], bool]

_CODES = (torch.uint8, torch.int8)


class Builder:
    """Makes a plan, node after node.

    Attributes:
        constants: the graph's.
        held: value → where it lies.
        loose: values that PyTorch holds.
        steps: what runs: ranges of native steps, and functions of the loose values.
        kept: arrays whose memory the plan reads.
        skipped: nodes that the last emitter has done along with its own.
        batched: whether every sample goes its own way, as far as one can see.
        given: inputs and outputs that the caller's memory holds.
    """

    def __init__(self, native: Any, graph: Graph, shapes: Shapes, samples: int) -> None:
        self.plan = native.CodePlan()
        self.graph, self.constants, self.shapes = graph, graph.constants, shapes
        self.rooms = Rooms(self.plan)
        self.held: dict[str, Held] = {}
        self.loose: set[str] = set()
        self.steps: list[tuple[int, int] | Callable[[dict[str, Tensor]], None]] = []
        self.kept: list[Any] = []
        self.given: list[tuple[str, Held]] = []
        self.batched, self.samples = True, samples
        self.skipped: set[str] = set()
        self._emitted = 0
        self._last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        self._read = set(self._last)

    def build(self, emitters: Mapping[str, Emitter]) -> None:
        """All nodes, then the outputs."""
        for value in self.graph.inputs:
            shape, kind = self.shapes[value.name]
            if kind is torch.float32 and value.name in self._read:
                self._hold(value.name, Held(self.rooms.given(4 * int(np.prod(shape))), shape, False, False))
                self.given.append((value.name, self.held[value.name]))
            else:
                self.loose.add(value.name)
        done: set[str] = set()
        for i, node in enumerate(self.graph.nodes):
            if node.name not in done:
                emit = emitters.get(node.op)
                if emit is None or not emit(self, node):
                    self._by_torch(node)
                done |= self.skipped
                self.skipped = set()
            for name in dict.fromkeys((*node.inputs, *node.outputs)):
                if self._last.get(name, -1) <= i and name in self.held and name not in self.graph.results:
                    self.rooms.leave(self.held[name].room)
        for output in self.graph.outputs:
            self._output(output.name)
        self._close()

    def keep(self, values: np.ndarray) -> int:
        """The address of numbers that stay as long as the plan."""
        array = np.ascontiguousarray(values)
        self.kept.append(array)
        return int(array.ctypes.data)

    def new(self, name: str, codes: bool, signed: bool = False, last: bool = True) -> Held:
        """Room for an output, channels last where it has space."""
        shape = self.shapes[name][0]
        direct = not codes and not last and name in self.graph.results and name not in self._read
        count = int(np.prod(shape)) * (1 if codes else 4)
        room = self.rooms.given(count) if direct else self.rooms.take(count)
        held = Held(room, shape, last and len(shape) > 2, codes, signed)
        if direct:
            self.given.append((name, held))
        self._hold(name, held)
        return held

    def scratch(self, shape: tuple[int, ...], like: Held, last: bool) -> Held:
        """Room for this node alone: to be left with `rooms.leave`."""
        made = replace(like, shape=shape, last=last)
        room = self.rooms.take(made.numel * made.size)
        room.users += 1
        return replace(made, room=room)

    def alias(self, name: str, of: Held) -> None:
        """An output that lies where another value does, in the same order of numbers."""
        self._hold(name, replace(of, shape=self.shapes[name][0]))

    def _hold(self, name: str, held: Held) -> None:
        self.batched &= bool(held.shape) and held.shape[0] == self.samples
        held.room.users += 1
        self.held[name] = held

    def value(self, name: str) -> Held | None:
        """Where an input lies; copied into the plan if PyTorch has it. None: it is no value of codes or float32, or a constant."""
        if name in self.held:
            return self.held[name]
        if name not in self.loose:
            return None
        shape, kind = self.shapes[name]
        if kind not in (*_CODES, torch.float32) or not all(shape):
            return None
        codes = kind in _CODES
        held = Held(self.rooms.take(int(np.prod(shape)) * (1 if codes else 4)), shape, False, codes, kind is torch.int8)
        self._hold(name, held)
        self._close()
        self.steps.append(lambda values: held.write(values[name]))
        self.batched = False
        return held

    def ordered(self, held: Held, last: bool) -> tuple[Held, bool]:
        """A value with its channels last, or not, and whether that is a copy to be left."""
        if held.last == last or held.either:
            return replace(held, last=last), False
        made = self.scratch(held.shape, held, last)
        self.move(held, made, held.shape, held.strides(), made.strides())
        return made, True

    def move(
        self, x: Held, y: Held, shape: Sequence[int], come: Sequence[int], go: Sequence[int], begin: int = 0, end: int = 0,
        fill: int | None = None,
    ) -> None:  # fmt: skip
        """Numbers along the axes of `shape`, from x with strides `come` to y with strides `go`.

        Args:
            begin, end: where the first is in x and in y.
            fill: the byte that all of y gets before; None: nothing.
        """
        axes = [(n, f, t) for n, f, t in zip(shape, come, go, strict=True) if n != 1]
        axes.sort(key=lambda a: -abs(a[2]))
        joined: list[tuple[int, int, int]] = []
        for n, f, t in axes:
            if joined and joined[-1][1] == n * f and joined[-1][2] == n * t:
                joined[-1] = (joined[-1][0] * n, f, t)
            else:
                joined.append((n, f, t))
        joined = [(1, 1, 1)] * (5 - len(joined)) + joined
        numbers = [a[i] for i in range(3) for a in joined]
        filled = 0 if fill is None else y.numel * y.size
        self.plan.move(x.room.slot, y.room.slot, y.size, numbers, begin, end, filled, fill or 0)

    def constant(self, name: str) -> np.ndarray | None:
        return self.constants.get(name)

    def _by_torch(self, node: Node) -> None:
        """A node that PyTorch computes."""
        fixed = {n: tensor_of(self.constants[n]) for n in node.inputs if n in self.constants}
        held = {n: self.held[n] for n in node.inputs if n in self.held and n not in self.loose}
        lent = {id(h.room): n for n, h in self.given}  # inputs, perhaps under another name and in another shape
        self._close()

        def value(name: str, values: dict[str, Tensor]) -> Tensor | None:
            if not name or name in fixed:
                return fixed.get(name)
            if name not in held:
                return values[name]
            one = held[name]
            return one.read() if one.room.memory is not None else values[lent[id(one.room)]].reshape(one.shape)

        def run(values: dict[str, Tensor]) -> None:
            read = [value(n, values) for n in node.inputs]
            for name, found in zip(
                node.outputs, evaluate(node, read, self.graph.opset, self.graph.domains), strict=False
            ):
                if name:
                    values[name] = found

        self.steps.append(run)
        self.loose |= {n for n in node.outputs if n}
        self.batched = False

    def _output(self, name: str) -> None:
        """An output that does not lie in the caller's memory already."""
        held = self.held.get(name)
        if held is None or name in self.loose or any(name == n for n, _ in self.given):
            return
        if held.codes:
            self._close()
            self.steps.append(lambda values: values.__setitem__(name, held.read()))
            self.batched = False
            return
        room = self.rooms.given(held.numel * 4)
        made = replace(held, room=room, last=False)
        self.move(held, made, held.shape, held.strides(), strides_of(held.shape, False))
        self.given.append((name, made))

    def _close(self) -> None:
        """The native steps up to now are run before what follows."""
        now = self.plan.steps()
        if now > self._emitted:
            self.steps.append((self._emitted, now))
            self._emitted = now
