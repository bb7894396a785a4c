"""A graph as a module that runs it: `Program`, a line of parts, each of which reads what the part before it gives.

Layers with constant weights are PyTorch's own modules, so whatever works on modules works on them: sites, methods, packed codes.
A part ends wherever one value alone goes on and a layer follows: residual blocks are parts, and so are single layers between them.
What a part reads is rounded in it, and not in the part before it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from arrondi.errors import ArrondiError, DataError, SchemeError
from arrondi.graph.codes import tensor_of
from arrondi.graph.ir import QDQ, Graph, Node
from arrondi.graph.layers import LAYERS, Margin, layers_in, padding_of, read_beside
from arrondi.graph.ops import evaluate
from arrondi.graph.rounder import Rounder
from arrondi.graph.rules import RULES
from arrondi.model import Straight


class Program(Straight):
    """A graph that can be run, calibrated and quantized.

    Attributes:
        graph: what is run.
        layers: layer → the name of its module. A layer has the name of its node; recurrent nodes have several.
        rounders: node that rounds a value → the name of its module. Values that share a grid share the module.

    Called with the graph's inputs in their order; gives its output, or a tuple of them.
    """

    def __init__(self, graph: Graph) -> None:
        names = _module_names(graph)
        parts: list[Part] = []
        layers: dict[str, str] = {}
        rounders: dict[str, str] = {}
        shared: dict[tuple[str, ...], Rounder] = {}
        for i, (nodes, entering, leaving) in enumerate(_parts(graph)):
            parts.append(Part(graph, nodes, entering, leaving, names, shared))
            for node in nodes:
                module, path = parts[-1]._modules.get(names[node.name]), f"{i}.{names[node.name]}"
                if node.op == QDQ and module is not None:
                    rounders[node.name] = path
                elif module is not None:
                    layers |= {layer: f"{path}{inner}" for layer, inner in layers_in(node, module).items()}
        super().__init__(*parts)
        self.graph, self.layers, self.rounders = graph, layers, rounders

    def original(self) -> Program:
        """A copy in which nothing that flows is rounded."""
        copied = copy.deepcopy(self)
        for module in copied.modules():
            if isinstance(module, Rounder):
                module.on = False
        return copied

    def watch(self, inputs: Sequence[torch.Tensor], see: Any) -> Any:
        """Run it, calling `see(name, value)` with every value that is made, the inputs among them."""
        entering: tuple[Any, ...] = tuple(inputs)
        output: Any = None
        for part in self:
            output = part(*entering, see=see)
            entering = (output,)
        return output


@dataclass(frozen=True)
class _Run:
    """One node on its turn: its module if it has one, what is put around its input, and the values that nobody reads afterwards."""

    node: Node
    module: str | None
    padding: Margin | None
    gone: tuple[str, ...]


@dataclass(frozen=True)
class Around:
    """What surrounds a layer.

    Attributes:
        rounder: the module that rounds what it reads, None where nothing does or it is rounded elsewhere.
        following: the activation behind it.
    """

    rounder: str | None
    following: tuple[_Run, ...]


@dataclass(frozen=True)
class Use:
    """A product in a part.

    Attributes:
        node: it.
        module: of a layer; None where both sides are values.
        padding: what is put around what a layer reads.
        rounders: the module that rounds each value that is multiplied, None where nothing does.
        scores: whether a softmax reads what it gives, scaled perhaps.
    """

    node: Node
    module: str | None
    padding: Margin | None
    rounders: tuple[str | None, ...]
    scores: bool


class Part(torch.nn.Module):
    """Some nodes of a graph in order."""

    def __init__(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        entering: Sequence[str],
        leaving: Sequence[str],
        names: dict[str, str],
        shared: dict[tuple[str, ...], Rounder] | None = None,
    ) -> None:
        super().__init__()
        shared = {} if shared is None else shared
        self.entering, self.leaving, self.opset = tuple(entering), tuple(leaving), graph.opset
        self.domains = graph.domains
        self._steps: list[_Run] = []
        held: dict[str, str] = {}
        last = {name: node.name for node in nodes for name in node.inputs}
        for node in nodes:
            found = _module_of(node, graph, shared)
            if found is not None:
                self.add_module(names[node.name], found)
            read = node.inputs if found is None else read_beside(node)
            for name in read:
                if name in graph.constants and name not in held:
                    held[name] = f"constant_{len(held)}"
                    self.register_buffer(held[name], tensor_of(graph.constants[name]), persistent=False)
            step = replace(node, inputs=read)
            gone = tuple(n for n in dict.fromkeys(read) if last.get(n) == node.name and n not in leaving)
            module = names[node.name] if found is not None else None
            self._steps.append(_Run(step, module, None if found is None else padding_of(node, found), gone))
        self._held = held

    def around(self, module: str) -> Around:
        """What comes before and after a layer.

        Args:
            module: its name in the part.
        """
        at = next(i for i, run in enumerate(self._steps) if run.module == module)
        made = {name: run for run in self._steps for name in run.node.outputs}
        readers: dict[str, list[_Run]] = {}
        for run in self._steps:
            for name in dict.fromkeys(run.node.inputs):
                readers.setdefault(name, []).append(run)
        before = made.get(self._steps[at].node.inputs[0])
        rounder = before.module if before is not None and before.node.op == QDQ else None
        value, following = self._steps[at].node.outputs[0], []
        while value not in self.leaving and len(readers.get(value, [])) == 1:
            (run,) = readers[value]
            if RULES.get(run.node.op) != "activation" or run.node.inputs[0] != value:
                break
            following.append(run)
            value = run.node.outputs[0]
        return Around(rounder, tuple(following))

    def uses(self) -> list[Use]:
        """The products in it, in order; not those of recurrent layers."""
        made = {name: run for run in self._steps for name in run.node.outputs}
        softmax = {run.node.inputs[0] for run in self._steps if run.node.op == "Softmax"}
        scaled = {
            n
            for run in self._steps
            if run.node.op in ("Mul", "Div") and run.node.outputs[0] in softmax
            for n in run.node.inputs
        }
        found = []
        for run in self._steps:
            layer = run.module is not None and run.node.op in LAYERS and run.node.op not in ("LSTM", "GRU")
            if not layer and run.node.op != "MatMul":
                continue
            before = [made.get(n) for n in run.node.inputs[: 1 if layer else 2]]
            rounders = tuple(b.module if b is not None and b.node.op == QDQ else None for b in before)
            scores = not layer and run.node.outputs[0] in softmax | scaled
            found.append(Use(run.node, run.module if layer else None, run.padding, rounders, scores))
        return found

    def activate(self, around: Around, y: torch.Tensor, axes: int) -> torch.Tensor:
        """The activation of a layer on some of its outputs.

        Args:
            y: (rows, outputs).
            axes: of space that the layer has.
        """
        given = y.reshape(*y.shape, *[1] * axes)
        for run in around.following:
            others = [self._value(name, {}) for name in run.node.inputs[1:]]
            (given,) = evaluate(run.node, [given, *others], self.opset)
        return given.reshape(y.shape)

    def forward(self, *inputs: torch.Tensor, see: Any = None) -> Any:
        """What the nodes give: the one value that goes on, or a tuple of the graph's outputs."""
        if len(inputs) != len(self.entering):
            raise DataError(
                f"The network takes {len(self.entering)} inputs ({', '.join(self.entering)}), got {len(inputs)}."
            )
        values: dict[str, Any] = dict(zip(self.entering, inputs, strict=True))
        if see is not None:
            for name, value in values.items():
                see(name, value)
        for run in self._steps:
            given = [self._value(name, values) for name in run.node.inputs]
            try:
                made = self._run(run, given)
            except ArrondiError:
                raise
            except (
                RuntimeError,
                ValueError,
                IndexError,
                TypeError,
            ) as error:  # shapes and types that do not go together
                raise SchemeError(_said(run, given, error)) from error
            for name, value in zip(run.node.outputs, made, strict=False):
                if name:
                    values[name] = value
                    if see is not None:
                        see(name, value)
            for name in run.gone:
                values.pop(name, None)
        leaving = tuple(self._value(name, values) for name in self.leaving)
        return leaving[0] if len(leaving) == 1 else leaving

    def _run(self, run: _Run, given: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        if run.module is None:
            return evaluate(run.node, given, self.opset, self.domains)
        x, *rest = given
        assert x is not None
        found = self.get_submodule(run.module)(x if run.padding is None else run.padding(x), *rest)
        return found if isinstance(found, tuple) else (found,)

    def _value(self, name: str, values: dict[str, Any]) -> torch.Tensor | None:
        if not name:
            return None
        return self._buffers[self._held[name]] if name in self._held else values[name]


def _said(run: _Run, given: Sequence[torch.Tensor | None], error: Exception) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in given if x is not None)
    line = str(error).strip().partition("\n")[0][:200]
    return f"{run.node.name}: the operator {run.node.op} cannot be computed on inputs of shape {shapes} ({line}). Check the shapes in the file."


def _module_of(node: Node, graph: Graph, shared: dict[tuple[str, ...], Rounder]) -> torch.nn.Module | None:
    """The module that stands for a node, if one does."""
    if node.op in LAYERS:
        return LAYERS[node.op](node, graph)
    grid = node.inputs[1:]
    if node.op != QDQ or not grid or any(name not in graph.constants for name in grid):
        return None
    if grid not in shared:
        scale, zero = (tensor_of(graph.constants[name]) for name in grid)
        shared[grid] = Rounder(scale, zero, node.attrs)
    return shared[grid]


def _module_names(graph: Graph) -> dict[str, str]:
    """Node → a name that a module may have, unique."""
    found: dict[str, str] = {}
    used: set[str] = set()
    for node in graph.nodes:
        stem = re.sub(r"\W+", "_", node.name).strip("_") or node.op
        stem = f"_{stem}" if stem[0].isdigit() or hasattr(torch.nn.Module, stem) else stem
        name, number = stem, 1
        while name in used:
            name, number = f"{stem}_{number}", number + 1
        used.add(name)
        found[node.name] = name
    return found


_BEGINNING: Final = frozenset({*LAYERS, QDQ, "LayerNormalization"})
"""With what a part may begin: a layer, what rounds its input, or the norm before it."""


def _parts(graph: Graph) -> Iterator[tuple[list[Node], list[str], list[str]]]:
    """Runs of nodes, what enters each and what leaves it."""
    inputs, outputs = [v.name for v in graph.inputs], [v.name for v in graph.outputs]
    last: dict[str, int] = {name: len(graph.nodes) for name in outputs}
    for i, node in enumerate(graph.nodes):
        last |= {name: max(last.get(name, -1), i) for name in node.inputs}
    alive = {name for name in inputs if name in last}
    nodes: list[Node] = []
    entering, layers = inputs, 0
    for i, node in enumerate(graph.nodes):
        alone = next(iter(alive)) if len(alive) == 1 else None
        if nodes and layers and alone is not None and node.op in _BEGINNING and alone not in outputs:
            yield nodes, entering, [alone]
            entering, nodes, layers = [alone], [], 0
        nodes.append(node)
        layers += node.op in LAYERS
        alive |= {name for name in node.outputs if name in last and name not in graph.constants}
        alive = {name for name in alive if last[name] > i}
    yield nodes, entering, outputs
