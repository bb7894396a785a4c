"""A network of integer operators, compiled: `Executor`, and `executor`, which gives the fastest way to run a graph.

Bit for bit what `Program` computes with PyTorch, which is the reference and the way where there are no compiled kernels. Plans are made for the shapes
of the inputs when these are first seen; shapes are found by running the reference once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import torch

from arrondi.errors import ArrondiError, DataError
from arrondi.graph.codes import tensor_of
from arrondi.graph.compiled.builder import Builder, Shapes
from arrondi.graph.compiled.operators import EMITTERS
from arrondi.graph.ir import Graph
from arrondi.graph.program import Program
from arrondi.native import native, threads

Tensor = torch.Tensor

_INTEGER: Final = ("QLinearConv", "QLinearMatMul", "com.microsoft.Q", "ConvInteger", "MatMulInteger")
_NEAR: Final = 1 << 18
"""Bytes of values that are to stay in a core's cache: so many samples go through the network together."""
_PLANS: Final = 16


def executor(graph: Graph) -> Callable[..., Any]:
    """What runs a graph fastest: an `Executor` where operators compute on codes and kernels are compiled for this CPU, else a `Program`.

    The kernels in plain C++ are exact, too, but slower than PyTorch.
    """
    fast = native is not None and native.path() != "portable"
    return Executor(graph) if fast and is_integer(graph) else Program(graph)


def is_integer(graph: Graph) -> bool:
    """Whether some operator of a graph computes on codes."""
    return any(node.op.startswith(_INTEGER) for node in graph.nodes)


class Executor:
    """A graph of integer operators, called like a `Program`: with its inputs, for its output or a tuple of them. No gradients pass.

    Attributes:
        graph: what is run.
        reference: the same in PyTorch.

    Raises:
        ArrondiError: there are no compiled kernels.
    """

    def __init__(self, graph: Graph) -> None:
        if native is None:
            raise ArrondiError(
                "Compiled networks need the compiled kernels, and this installation has none. Use Program, or install a C++ compiler and arrondi anew."
            )
        self.graph, self.reference = graph, Program(graph).eval()
        self._plans: dict[Any, Any] = {}
        self._found: dict[Any, Builder | None] = {}
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """The outputs.

        Raises:
            DataError: another number of inputs.
        """
        if len(inputs) != len(self.graph.inputs):
            names = ", ".join(v.name for v in self.graph.inputs)
            raise DataError(f"The network takes {len(self.graph.inputs)} inputs ({names}), got {len(inputs)}.")
        if not all(x.is_cpu for x in inputs):
            return self.reference(*inputs)
        given = [x.contiguous() for x in inputs]
        with self._lock:
            return self._run(given)

    def _run(self, inputs: list[Tensor]) -> Any:
        key = (threads(), *((x.shape, x.dtype) for x in inputs))
        plans = self._plans.get(key)
        if plans is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plans = self._plans[key] = self._planned(inputs)
        values: dict[str, Tensor] = {v.name: x for v, x in zip(self.graph.inputs, inputs, strict=True)}
        for name, shape in plans.outputs.items():
            values[name] = torch.empty(shape)
        for run in plans.parts:
            run(values)
        found = tuple(
            values[v.name] if v.name in values else tensor_of(self.graph.constants[v.name]) for v in self.graph.outputs
        )
        return found[0] if len(found) == 1 else found

    def _planned(self, inputs: list[Tensor]) -> _Plans:
        """Plans for some samples at a time, or for all where samples do not go their own way."""
        n = len(inputs[0]) if inputs and inputs[0].ndim else 0
        two = self._two(inputs) if n and all(x.ndim and len(x) == n for x in inputs) else None
        parts = [] if two is None else self._cut(two, n)
        if two is None or not all(built.batched for built, _, _ in parts):
            built = self._built(self._shapes(inputs), n)
            found = _Plans({name: h.shape for name, h in built.given})
            found.add(built, 1, 0)
            return found
        found = _Plans({name: (n, *h.shape[1:]) for name, h in two.given})
        for part in parts:
            found.add(*part)
        return found

    def _cut(self, two: Builder, n: int) -> list[tuple[Builder, int, int]]:
        """Plans for as many samples as stay in the cache, and for the rest: how often each runs and from which sample on."""
        memory = sum(len(r.memory) for r in two.rooms.every if r.memory is not None)
        most = max(1, min(n, 2 * _NEAR * threads() // max(memory, 1)))
        some = -(-n // -(-n // most))
        parts = []
        for count, times, start in ((some, n // some, 0), (n % some, 1, n - n % some)):
            if count:
                shapes = {name: ((count, *shape[1:]), kind) for name, (shape, kind) in two.shapes.items()}
                parts.append((self._built(shapes, count), times, start))
        return parts

    def _two(self, inputs: list[Tensor]) -> Builder | None:
        """The plan of two samples, which shows whether they go their own way; None where they do not."""
        key = tuple((x.shape[1:], x.dtype) for x in inputs)
        if key not in self._found:
            if len(self._found) >= _PLANS:
                self._found.clear()
            try:
                built = self._built(self._shapes([x[:1].expand(2, *x.shape[1:]) for x in inputs]), 2)
            except (ArrondiError, RuntimeError):
                built = None
            self._found[key] = built if built is not None and built.batched else None
        return self._found[key]

    def _shapes(self, inputs: list[Tensor]) -> Shapes:
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.reference.watch(inputs, lambda name, value: shapes.setdefault(name, (tuple(value.shape), value.dtype)))
        return shapes

    def _built(self, shapes: Shapes, samples: int) -> Builder:
        made = Builder(native, self.graph, shapes, samples)
        made.build(EMITTERS)
        return made


class _Plans:
    """What runs for inputs of certain shapes.

    Attributes:
        outputs: those in memory of their own → their shapes.
        parts: plans of samples.
    """

    def __init__(self, lent: dict[str, tuple[int, ...]]) -> None:
        self._lent = lent
        self.parts: list[Callable[[dict[str, Tensor]], None]] = []
        self.outputs: dict[str, tuple[int, ...]] = {}

    def add(self, built: Builder, times: int, start: int) -> None:
        """A plan that runs so many times from a sample on."""
        inputs = {v.name for v in built.graph.inputs}
        self.outputs |= {name: shape for name, shape in self._lent.items() if name not in inputs}
        lent = [(name, 0 if not start else start * h.numel // h.shape[0] * 4) for name, h in built.given]
        count = threads()

        def run(values: dict[str, Tensor]) -> None:
            places = [values[name].data_ptr() + by for name, by in lent]
            for step in built.steps:
                if isinstance(step, tuple):
                    built.plan.run(places, times, *step, count)
                else:
                    step(values)

        self.parts.append(run)
