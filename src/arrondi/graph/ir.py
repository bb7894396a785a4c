"""A network as a graph of ONNX operators: `Graph`, `Node`, `Value`.

Plain data without a file or a runtime: nodes in an order in which they can be run, constants as NumPy arrays (which hold every ONNX
type, the 4-bit ones through `ml_dtypes`). Passes take a graph and return another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

QDQ: Final = "QDQ"
"""The one operator of our own: a value rounded to a grid. Inputs (x, scale, zero point); files hold it as a pair of QuantizeLinear
and DequantizeLinear. With x alone its grid spans what x is each time, as DynamicQuantizeLinear has it."""

DYNAMIC: Final = "dynamic"
"""Attribute of recurrent operators, beside those of ONNX: whether hidden states are rounded at every step."""


CODES: Final = "codes"
"""Attribute of operators that make codes, beside those of ONNX: the name of the codes' type."""


ARITHMETIC: Final = "arithmetic"
"""Attribute of integer operators, beside those of ONNX: how sums become codes, see `graph.requantize`."""


class Unusual(Exception):
    """Our own version of an operator does not cover this use of it."""


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        name: unique in its graph.
        op: its type in ONNX's own domain, `QDQ`, or domain.type of another domain.
        inputs, outputs: names of values; "" where an optional one is left out.
        attrs: its attributes as plain values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """An input or output of the graph.

    Attributes:
        dtype: its element type.
        shape: numbers, names of dimensions that vary, or None for one without a name.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Graph:
    """A network.

    Attributes:
        nodes: in an order in which each comes after what it reads.
        constants: values that are known.
        opset: version of ONNX's operators.
        shapes: what is known of the shapes of values between nodes.
        domains: versions of operator sets of others, by name.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: Mapping[str, np.ndarray]
    opset: int
    shapes: Mapping[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    domains: Mapping[str, int] = field(default_factory=dict)

    def with_nodes(self, nodes: Iterable[Node], constants: Mapping[str, np.ndarray] | None = None) -> Graph:
        """The same graph of other nodes; constants that nobody reads are gone."""
        kept = tuple(nodes)
        read = {name for node in kept for name in node.inputs} | {v.name for v in self.outputs}
        every = self.constants if constants is None else constants
        return replace(self, nodes=kept, constants={n: v for n, v in every.items() if n in read})

    @property
    def producers(self) -> dict[str, Node]:
        """Value → the node that makes it."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @property
    def consumers(self) -> dict[str, list[Node]]:
        """Value → the nodes that read it, each once."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                if name:
                    found.setdefault(name, []).append(node)
        return found

    @property
    def results(self) -> set[str]:
        """Names of the graph's outputs."""
        return {v.name for v in self.outputs}

    def only_reader(self, value: str) -> Node | None:
        """The one node that reads a value which is no output of the graph; None if there are more or none."""
        readers = self.consumers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.results else None

    def fresh(self, stem: str) -> Iterator[str]:
        """Names that begin with a stem and that no value and no node has."""
        used = {*self.constants, *(v.name for v in (*self.inputs, *self.outputs))}
        used |= {name for node in self.nodes for name in (node.name, *node.inputs, *node.outputs)}
        for number in range(1 << 30):
            name = stem if not number else f"{stem}_{number}"
            if name not in used:
                yield name
