"""A graph with QuantizeLinear and DequantizeLinear computed in integers throughout: `lower`.

Whatever lies between DequantizeLinear and QuantizeLinear becomes an operator on codes: products with int32 sums, whose zero points and bias are
integers too, sums, means, joins, tables of 256 codes for functions of one value; values that only move stay codes. What cannot run in
integers stays between the two and is listed. The result is a graph of ONNX's and ONNX Runtime's operators: `Program` runs it, `write_graph`
writes it, ONNX Runtime computes the same codes from it.

Source: Jacob et al. 2018, arXiv:1712.05877; how sums become codes: `graph.requantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from arrondi.errors import SchemeError
from arrondi.graph.codes import tensor_of
from arrondi.graph.integer_parts import Grid, Tail, Weight, biases, fits, grid_of, pair, table_of, tail_of, weight_of
from arrondi.graph.ir import ARITHMETIC, QDQ, Graph, Node
from arrondi.graph.requantize import ARITHMETICS, Arithmetic
from arrondi.graph.rules import floating_values

_MOVES: Final = frozenset(
    ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Gather", "DepthToSpace",
     "SpaceToDepth", "Identity", "Expand", "Tile", "Resize")
)  # fmt: skip
_LOOKED_UP: Final = frozenset(
    ("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Mish", "Gelu", "Erf",
     "Swish", "Abs", "Neg", "Sqrt", "Exp", "Log", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos")
)  # fmt: skip
_TWO: Final = {"Add": "com.microsoft.QLinearAdd", "Mul": "com.microsoft.QLinearMul", "MatMul": "QLinearMatMul"}
_MEANS: Final = {
    "AveragePool": "com.microsoft.QLinearAveragePool", "GlobalAveragePool": "com.microsoft.QLinearGlobalAveragePool",
}  # fmt: skip
_QUANTIZERS: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Lowered:
    """A graph in integers.

    Attributes:
        graph: of operators on codes.
        integer: how many operators compute on codes.
        floats: operator → how many of it stay in floating point.
        notes: layers that stay in floating point and why.
    """

    graph: Graph
    integer: int
    floats: Mapping[str, int]
    notes: tuple[str, ...]


def lower(graph: Graph, arithmetic: Arithmetic = "float") -> Lowered:
    """The graph in integers.

    Args:
        graph: with values rounded by QuantizeLinear and DequantizeLinear (or our QDQ) and weights as codes.
        arithmetic: how int32 sums become codes: "float" as ONNX Runtime does; "double" and "single" as TFLite's reference kernels
            do with two roundings (their default) or one.

    Raises:
        SchemeError: no such arithmetic.
    """
    if arithmetic not in ARITHMETICS:
        raise SchemeError(f"Integer arithmetics are {', '.join(ARITHMETICS)}, got {arithmetic!r}.")
    return _Lowering(_pairs(graph), arithmetic).run()


def _pairs(graph: Graph) -> Graph:
    """The graph with every QDQ as the two operators that files have."""
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += pair(node) if node.op == QDQ and "low" not in node.attrs and "high" not in node.attrs else [node]
    return graph.with_nodes(nodes)


class _Lowering:
    def __init__(self, graph: Graph, arithmetic: Arithmetic) -> None:
        self.graph, self.constants = graph, dict(graph.constants)
        self.own = {} if arithmetic == "float" else {ARITHMETIC: arithmetic}
        self.nodes: list[Node] = []
        self.done: set[str] = set()
        self.coded: dict[str, Grid] = {}  # value that is a DequantizeLinear's output, or could be → its codes
        self.weights: dict[str, Weight] = {}
        self.waiting: dict[str, Node] = {}  # value → the DequantizeLinear that makes it, written when somebody reads it
        self.floats: dict[str, int] = {}
        self.notes: list[str] = []
        self.integer = 0

    def run(self) -> Lowered:
        whole = [replace(n, op="Identity") if n.op in _QUANTIZERS else n for n in self.graph.nodes]
        numbers = floating_values(replace(self.graph, nodes=tuple(whole)))
        for node in self.graph.nodes:
            if node.name in self.done:
                continue
            how = self._handler(node)
            if how is not None and how(node):
                self.integer += node.op not in ("DequantizeLinear", "QuantizeLinear")
                continue
            for name in node.inputs:
                self._floating(name)
            self.nodes.append(node)
            if node.op not in _QUANTIZERS and any(n in numbers for n in node.inputs):
                self.floats[node.op] = self.floats.get(node.op, 0) + 1
        for output in self.graph.outputs:
            self._floating(output.name)
        made = self.graph.with_nodes(self.nodes, self.constants)
        return Lowered(made, self.integer, self.floats, tuple(self.notes))

    def _handler(self, node: Node) -> Callable[[Node], bool] | None:
        if node.op in _MOVES:
            return self._move
        if node.op in _LOOKED_UP:
            return self._look_up
        if node.op in _MEANS:
            return self._mean
        named = {
            "DequantizeLinear": self._dequantize, "QuantizeLinear": self._requantize, "Conv": self._layer, "Gemm": self._layer,
            "MatMul": self._layer, "Add": self._two, "Mul": self._two, "Concat": self._join,
        }  # fmt: skip
        return named.get(node.op)

    def _floating(self, name: str) -> None:
        """Write the DequantizeLinear that makes a value, once."""
        node = self.waiting.pop(name, None)
        if node is not None:
            self.nodes.append(node)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def _emit(
        self, node: Node, op: str, inputs: tuple[str, ...], tail: Tail | None, output: str, attrs: Mapping[str, object]
    ) -> None:
        """An operator on codes, then the limits of the activation that follows it."""
        made = f"{output}_whole" if tail is not None and tail.limits else output
        self.nodes.append(Node(node.name, op, inputs, (made,), dict(attrs)))
        if tail is None:
            return
        if tail.limits:
            kind = self.constants[tail.grid.zero].dtype
            ends = [
                self._constant(f"{output}_{end}", np.array(code, kind))
                for end, code in zip(("low", "high"), tail.limits, strict=True)
            ]
            self.nodes.append(Node(f"{node.name}_limits", "Clip", (made, *ends), (output,)))
        self.done |= {n.name for n in tail.nodes}

    def _dequantize(self, node: Node) -> bool:
        weight = weight_of(node, self.constants)
        grid = None if node.inputs[0] in self.constants else grid_of(node, self.constants)
        if weight is None and grid is None and any(n and n not in self.constants for n in node.inputs):
            return False
        (value,) = node.outputs
        self.waiting[value] = node  # a constant that is no weight may be a bias
        if weight is not None:
            self.weights[value] = weight
        elif grid is not None:
            self.coded[value] = replace(grid, codes=node.inputs[0])
        return True

    def _requantize(self, node: Node) -> bool:
        given, grid = self.coded.get(node.inputs[0]), grid_of(node, self.constants)
        if given is None or grid is None:
            return False
        if given.same(grid, self.constants):
            self.nodes.append(Node(node.name, "Identity", (given.codes,), node.outputs))
        else:
            self._table(node, given, Tail(node, grid, (), ()), None)
        return True

    def _look_up(self, node: Node) -> bool:
        given, tail = self.coded.get(node.inputs[0]), tail_of(self.graph, node.outputs[0], self.constants)
        others = [self.constants.get(n) for n in node.inputs[1:] if n]
        if given is None or tail is None or any(v is None or v.size != 1 for v in others):
            return False
        self._table(node, given, tail, node)
        return True

    def _table(self, node: Node, given: Grid, tail: Tail, of: Node | None) -> None:
        """y = table[x]; negative codes count from the table's end, as ONNX's Gather does."""
        table = table_of(of, given, tail, self.constants, self.graph.opset)
        output = tail.quantize.outputs[0]
        name, index = self._constant(f"{output}_table", table), f"{output}_index"
        self.nodes.append(Node(f"{node.name}_index", "Cast", (given.codes,), (index,), {"to": 6}))
        self.nodes.append(Node(node.name, "Gather", (name, index), (output,), {"axis": 0}))
        self.done |= {n.name for n in tail.nodes}

    def _move(self, node: Node) -> bool:
        given = self.coded.get(node.inputs[0])
        if given is None or (node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest"):
            return False
        if any(n in self.coded for n in node.inputs[1:]) or (node.op == "MaxPool" and len(node.outputs) > 1):
            return False
        inputs = (given.codes, *node.inputs[1:])
        if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
            value = node.inputs[2] if len(node.inputs) > 2 else ""
            if value and value not in self.constants:
                return False
            real = torch.zeros(()) if not value else tensor_of(self.constants[value]).reshape(())
            code = given.quantized(real, self.constants).numpy().astype(self.constants[given.zero].dtype)
            fill = self._constant(f"{node.outputs[0]}_fill", code)
            inputs = (given.codes, node.inputs[1], fill, *node.inputs[3:])
        codes = tuple(f"{n}_moved" if n else "" for n in node.outputs)
        self.nodes.append(replace(node, inputs=inputs, outputs=codes))
        for value, name in zip(node.outputs, codes, strict=True):
            if value:
                self.coded[value] = replace(given, codes=name)
                read = (name, given.scale, given.zero)
                self.waiting[value] = Node(f"{value}_dequantize", "DequantizeLinear", read, (value,))
        return True

    def _mean(self, node: Node) -> bool:
        given, tail = self.coded.get(node.inputs[0]), tail_of(self.graph, node.outputs[0], self.constants)
        if given is None or tail is None or any(d != 1 for d in node.attrs.get("dilations", [])):
            return False
        inputs = (given.codes, given.scale, given.zero, tail.grid.scale, tail.grid.zero)
        self._emit(node, _MEANS[node.op], inputs, tail, tail.quantize.outputs[0], {**node.attrs, **self.own})
        return True

    def _two(self, node: Node) -> bool:
        grids = [self.coded.get(n) for n in node.inputs]
        tail = tail_of(self.graph, node.outputs[0], self.constants)
        if tail is None or len(grids) != 2 or any(g is None for g in grids):
            return False
        read = tuple(name for g in grids if g is not None for name in (g.codes, g.scale, g.zero))
        inputs = (*read, tail.grid.scale, tail.grid.zero)
        self._emit(node, _TWO[node.op], inputs, tail, tail.quantize.outputs[0], {**node.attrs, **self.own})
        return True

    def _join(self, node: Node) -> bool:
        grids = [self.coded.get(n) for n in node.inputs]
        tail = tail_of(self.graph, node.outputs[0], self.constants)
        if tail is None or any(g is None for g in grids):
            return False
        read = tuple(name for g in grids if g is not None for name in (g.codes, g.scale, g.zero))
        inputs = (tail.grid.scale, tail.grid.zero, *read)
        self._emit(node, "com.microsoft.QLinearConcat", inputs, tail, tail.quantize.outputs[0], node.attrs)
        return True

    def _layer(self, node: Node) -> bool:
        given, weight = self.coded.get(node.inputs[0]), self.weights.get(node.inputs[1])
        if node.op == "MatMul" and node.inputs[1] in self.coded:
            return self._two(node)
        if given is None or weight is None:
            return False
        fine = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        bias = biases(node, given, weight, self.constants, dict(self.waiting))
        if any(node.attrs.get(k, v) != v for k, v in fine.items()) or isinstance(bias, str):
            self.notes.append(f"{node.name}: {bias if isinstance(bias, str) else 'scaled or transposed inputs'}")
            return False
        lacking = fits(node, given, weight, bias, self.constants)
        if lacking:
            self.notes.append(f"{node.name}: {lacking}")
            return False
        stem = node.inputs[1]
        w = tuple(
            self._constant(f"{stem}_{node.name}_{part}", value)
            for part, value in (("whole", weight.codes), ("step", weight.scale), ("center", weight.zero))
        )
        x = (given.codes, given.scale, given.zero)
        c = () if bias is None else (self._constant(f"{node.name}_bias_codes", bias),)
        tail = tail_of(self.graph, node.outputs[0], self.constants)
        if tail is None:
            self._sums(node, x, w, c, weight)
            return True
        y = (tail.grid.scale, tail.grid.zero)
        attrs = {**node.attrs, **self.own}
        if node.op == "Gemm":
            attrs = {**_gemm(node), **self.own}
            self._emit(
                node, "com.microsoft.QGemm", (*x, *w, c[0] if c else "", *y), tail, tail.quantize.outputs[0], attrs
            )
        else:
            op = "QLinearConv" if node.op == "Conv" else "QLinearMatMul"
            self._emit(node, op, (*x, *w, *y, *c), tail, tail.quantize.outputs[0], attrs)
        return True

    def _sums(self, node: Node, x: tuple[str, ...], w: tuple[str, ...], c: tuple[str, ...], weight: Weight) -> None:
        """An integer product whose result goes on in floating point."""
        (output,) = node.outputs
        if node.op == "Gemm":
            self.nodes.append(Node(node.name, "com.microsoft.QGemm", (*x, *w, *c), (output,), _gemm(node)))
            return
        zero = self._constant(f"{output}_center", weight.one_zero())
        op = "ConvInteger" if node.op == "Conv" else "MatMulInteger"
        sums = f"{output}_sums"
        self.nodes.append(Node(node.name, op, (x[0], w[0], x[2], zero), (sums,), node.attrs))
        shape = (-1, *[1] * (weight.codes.ndim - 2)) if node.op == "Conv" else (-1,)
        if c:
            bias = self._constant(f"{output}_shift", self.constants[c[0]].reshape(shape))
            self.nodes.append(Node(f"{node.name}_bias", "Add", (sums, bias), (f"{sums}_biased",)))
            sums = f"{sums}_biased"
        scale = (self.constants[x[1]].astype(np.float32).reshape(()) * weight.scale).astype(np.float32)
        step = self._constant(f"{output}_step", scale.reshape(shape) if scale.size > 1 else scale.reshape(()))
        self.nodes.append(Node(f"{node.name}_float", "Cast", (sums,), (f"{sums}_float",), {"to": 1}))
        self.nodes.append(Node(f"{node.name}_scale", "Mul", (f"{sums}_float", step), (output,)))


def _gemm(node: Node) -> dict[str, object]:
    """What is left to say of a Gemm."""
    return {"transB": node.attrs["transB"]} if "transB" in node.attrs else {}
