"""Which values of a graph are rounded, and which share a grid: `RULES`, and `places`, what the table says of one graph.

Inputs of operators that compute in integers are rounded, where they are made: behind a fused activation, never between a layer and
its activation. Sums and products of what an operator outside the table made (gates, squares) stay in floating
point: their ranges are not those of activations. Operators that only move numbers have one grid before and after them, so a runtime can run them on codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from arrondi.graph.ir import Graph, Node

Rule = Literal["layer", "arithmetic", "joins", "moves", "activation"]
"""layer, arithmetic: their inputs are rounded. joins: so are they, all on the grid of the output. moves: the output has the
input's grid. activation: fused into the layer before it."""

RULES: Final[Mapping[str, Rule]] = {
    "LSTM": "layer", "GRU": "layer", "Conv": "layer", "ConvTranspose": "layer", "Gemm": "layer", "MatMul": "layer",
    "Add": "arithmetic", "Sub": "arithmetic", "Mul": "arithmetic", "AveragePool": "arithmetic", "GlobalAveragePool": "arithmetic",
    "Resize": "arithmetic", "Concat": "joins",
    "MaxPool": "moves", "GlobalMaxPool": "moves", "Reshape": "moves", "Flatten": "moves", "Transpose": "moves", "Squeeze": "moves",
    "Unsqueeze": "moves", "Slice": "moves", "Split": "moves", "Pad": "moves", "Gather": "moves", "DepthToSpace": "moves",
    "SpaceToDepth": "moves", "Identity": "moves", "Expand": "moves", "Tile": "moves",
    "Relu": "activation", "Clip": "activation", "LeakyRelu": "activation", "PRelu": "activation", "HardSwish": "activation",
}  # fmt: skip
"""Operator → what is rounded around it. One that is not here stays in floating point, and so does what it reads."""

PRODUCTS: Final = frozenset(op for op, rule in RULES.items() if rule == "layer")
"""Operators that multiply."""

FIXED: Final[Mapping[str, tuple[float, float]]] = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}  # fmt: skip
"""Operator → the range of what it gives, which needs no data."""

_STATES: Final = frozenset({"LSTM", "GRU"})
"""Operators whose other inputs are states, which stay in floating point."""

_SMALL = 2.0
"""Inputs of a Concat whose ranges differ by less than this factor share a grid."""


@dataclass(frozen=True)
class Places:
    """Where a graph is rounded.

    Attributes:
        values: value → the group of values that share its grid, in order of the graph.
        plain: operators that stay in floating point although they compute → how many there are.
    """

    values: Mapping[str, int]
    plain: Mapping[str, int]


def places(graph: Graph, ranges: Mapping[str, tuple[float, float]] | None = None) -> Places:
    """Which values are rounded.

    Args:
        ranges: of values, where they have been observed: those of a Concat share a grid only if they are alike.
    """
    producers = graph.producers
    floating = floating_values(graph)
    wanted: set[str] = set()
    whole = {v.name for v in graph.inputs}  # what integers can be made of without leaving them
    for node in graph.nodes:
        rule, read = RULES.get(node.op), [n for n in dict.fromkeys(node.inputs) if n in floating]
        if rule == "layer":
            wanted |= {n for n in (node.inputs[:1] if node.op in _STATES else node.inputs) if n in floating}
        elif rule in ("arithmetic", "joins"):
            rule = rule if whole.issuperset(read) and not _square(node) else None
            wanted |= set(read) if rule else set()
        if rule == "layer" or (rule and whole.issuperset(read)):
            whole.update(node.outputs)
    shared: dict[str, str] = {}

    def leader(name: str) -> str:
        while shared.get(name, name) != name:
            name = shared[name]
        return name

    for node in reversed(graph.nodes):
        rule = RULES.get(node.op)
        outputs = [n for n in node.outputs if n in wanted]
        source = node.inputs[0] if node.inputs else ""
        if rule == "moves" and outputs and source in floating:
            wanted.add(source)
            for name in outputs:
                shared[leader(name)] = leader(source)
        if rule == "joins" and outputs and ranges is not None:
            for name in node.inputs:
                if name in floating and _alike(ranges.get(name), ranges.get(outputs[0])):
                    shared[leader(name)] = leader(outputs[0])
    ordered = [*(v.name for v in graph.inputs), *(n for node in graph.nodes for n in node.outputs)]
    groups: dict[str, int] = {}
    found = {n: groups.setdefault(leader(n), len(groups)) for n in ordered if n in wanted}
    plain: dict[str, int] = {}
    for node in graph.nodes:
        if node.op not in RULES and node.op not in FIXED and any(n in floating for n in node.inputs) and producers:
            plain[node.op] = plain.get(node.op, 0) + 1
    return Places(found, plain)


def product_places(graph: Graph) -> Places:
    """The values that products read, and no others, each on a grid of its own where it is read: what papers on vision transformers round."""
    floating = floating_values(graph)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if RULES.get(node.op) == "layer":
            for name in node.inputs[:1] if node.op in _STATES else node.inputs:
                if name in floating:
                    found.setdefault(name, len(found))
    plain: dict[str, int] = {}
    for node in graph.nodes:
        if (
            node.op not in FIXED
            and RULES.get(node.op) not in ("layer", "moves")
            and any(n in floating for n in node.inputs)
        ):
            plain[node.op] = plain.get(node.op, 0) + 1
    return Places(found, plain)


def has_attention(graph: Graph) -> bool:
    """Whether values are multiplied by values: products of which neither side is a constant."""
    floating = floating_values(graph)
    return any(node.op == "MatMul" and floating.issuperset(node.inputs[:2]) for node in graph.nodes)


def _square(node: Node) -> bool:
    """A square has twice the range in powers of two, which eight bits do not hold."""
    return node.op == "Mul" and len(set(node.inputs)) == 1


def floating_values(graph: Graph) -> set[str]:
    """Values that are not constants, as far as is known of floating type: those that come of the graph's floating inputs."""
    found = {v.name for v in graph.inputs if v.dtype == np.float32}
    for node in graph.nodes:
        if node.op not in _TO_INTEGERS and any(n in found for n in node.inputs):
            found |= {n for n in node.outputs if n}
    return found


_TO_INTEGERS: Final = frozenset(
    (
        "Shape",
        "Size",
        "ArgMax",
        "ArgMin",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
        "NonZero",
        "Cast",
        "QuantizeLinear",
    )
)
"""Operators whose output is no float although an input is."""


def _alike(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    if one is None or other is None:
        return False
    sizes = [max(-low, high, 1e-30) for low, high in (one, other)]
    return max(sizes) < _SMALL * min(sizes)


def describe(found: Places) -> dict[str, Any]:
    """The places as plain data."""
    return {
        "rounded_values": len(found.values),
        "grids": len(set(found.values.values())),
        "float_operators": dict(found.plain),
    }
