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
        readers: nodes that read rounded values; the others read the same values in floating point.
        plain: operators that stay in floating point although they compute → how many there are.
    """

    values: Mapping[str, int]
    readers: frozenset[str]
    plain: Mapping[str, int]


def places(graph: Graph, ranges: Mapping[str, tuple[float, float]] | None = None) -> Places:
    """Which values are rounded.

    Args:
        ranges: of values, where they have been observed: those of a Concat share a grid only if they are alike.
    """
    floating = floating_values(graph)
    readers, producers = _readers(graph, floating), graph.producers
    wanted: set[str] = set()
    for node in graph.nodes:
        if node.name in readers and _rule(node, graph, producers) in ("layer", "arithmetic", "joins"):
            wanted |= set(_multiplied(node, floating))
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
    return Places(found, readers, _plain(graph, floating, frozenset(RULES)))


def _readers(graph: Graph, floating: set[str]) -> frozenset[str]:
    """Nodes that read rounded values: layers, and whatever computes from integers alone what a layer reads in the end.

    A sum that leaves the network, or goes into a function in floating point, is a floating-point sum in every runtime: its terms
    are better as they are.
    """
    producers = graph.producers
    whole = {v.name for v in graph.inputs}  # what integers can be made of without leaving them
    able: set[str] = set()
    for node in graph.nodes:
        rule = _rule(node, graph, producers)
        from_whole = whole.issuperset(n for n in node.inputs if n in floating)
        if rule == "layer" or (rule and from_whole and not (rule == "arithmetic" and _square(node))):
            able.add(node.name)
            whole.update(node.outputs)
        elif rule in ("moves", "activation"):
            able.add(node.name)
    read: set[str] = set()
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name in able and (RULES[node.op] == "layer" or any(n in read for n in node.outputs)):
            found.add(node.name)
            read |= set(_multiplied(node, floating))
    return frozenset(found)


def _rule(node: Node, graph: Graph, producers: Mapping[str, Node]) -> Rule | None:
    """What is rounded around a node. A constant that is added to a product of matrices is its bias, and belongs to it as an activation does."""
    if node.op == "Add":
        products = [n for n in node.inputs if n in producers and producers[n].op == "MatMul"]
        alone = len(products) == 1 and graph.only_reader(products[0]) is not None
        if alone and any(n in graph.constants for n in node.inputs):
            return "activation"
    return RULES.get(node.op)


def _multiplied(node: Node, floating: set[str]) -> list[str]:
    """The values that a node takes as codes: all floating ones, but no states."""
    return [n for n in (node.inputs[:1] if node.op in _STATES else node.inputs) if n in floating]


def product_places(graph: Graph) -> Places:
    """The values that products read, and no others, each on a grid of its own where it is read: what papers on vision transformers round."""
    floating = floating_values(graph)
    found: dict[str, int] = {}
    for node in graph.nodes:
        if RULES.get(node.op) == "layer":
            for name in _multiplied(node, floating):
                found.setdefault(name, len(found))
    integer = frozenset(op for op, rule in RULES.items() if rule in ("layer", "moves"))
    return Places(
        found, frozenset(n.name for n in graph.nodes if RULES.get(n.op) == "layer"), _plain(graph, floating, integer)
    )


def _plain(graph: Graph, floating: set[str], others: frozenset[str]) -> dict[str, int]:
    """Operators that make floating values of floating values → how many there are, but some others."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        computes = any(n in floating for n in node.inputs) and any(n in floating for n in node.outputs)
        if computes and node.op not in FIXED and node.op not in others:
            counts[node.op] = counts.get(node.op, 0) + 1
    return counts


def has_attention(graph: Graph) -> bool:
    """Whether values are multiplied by values: products of which neither side is a constant."""
    floating = floating_values(graph)
    return any(node.op == "MatMul" and floating.issuperset(node.inputs[:2]) for node in graph.nodes)


def _square(node: Node) -> bool:
    """A square has twice the range in powers of two, which eight bits do not hold."""
    return node.op == "Mul" and len(set(node.inputs)) == 1


def floating_values(graph: Graph) -> set[str]:
    """Values that come of the graph's inputs, as far as is known of floating type: of floating inputs, or looked up in floating constants."""
    found = {v.name for v in graph.inputs if v.dtype == np.float32}
    varying = {v.name for v in graph.inputs}
    real = {n for n, v in graph.constants.items() if v.dtype == np.float32}
    for node in graph.nodes:
        if not any(n in varying for n in node.inputs):
            continue
        varying |= {n for n in node.outputs if n}
        to_float = node.op == "Cast" and node.attrs.get("to") == _FLOAT
        if to_float or (node.op not in _TO_INTEGERS and any(n in found or n in real for n in node.inputs)):
            found |= {n for n in node.outputs if n}
    return found


_FLOAT: Final = 1
"""ONNX's number for float32."""


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
