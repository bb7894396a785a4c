"""What a network holds, layer by layer: `contents`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from arrondi.graph.ir import CODES, QDQ, Graph, Node
from arrondi.graph.layers import LAYERS

_ON_CODES: Final = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "com.microsoft.QGemm": 3,
}
"""Operator on codes → which input is its weight."""
_GRIDS: Final = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", QDQ)
_MOVES: Final = ("Reshape", "Transpose")


def contents(graph: Graph) -> dict[str, Any]:
    """The layers of a network and the totals, as plain data.

    Returns:
        `inputs`, `outputs` (name, type and shape of each), `opset`, `operators` (operator → how many), `parameters`, `bytes` of all constants, and
        `layers`: of each its name, operator, shape of the weight, `format` (`int8/channel`, `float32`), `bits_per_weight` with scales, and what
        codes it `reads` (None: numbers).
    """
    makers = graph.producers
    counts: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for node in graph.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
        places = _weights(node, graph)
        rows += [row for place in places if (row := _row(node, place, graph, makers)) is not None]
    return {
        "inputs": [_end(v) for v in graph.inputs], "outputs": [_end(v) for v in graph.outputs], "opset": graph.opset, "operators": counts,
        "parameters": sum(math.prod(r["shape"]) for r in rows),
        "bytes": math.ceil(sum(_bits(v) * v.size for v in graph.constants.values()) / 8), "layers": rows,
    }  # fmt: skip


def _weights(node: Node, graph: Graph) -> tuple[int, ...]:
    if node.op in ("LSTM", "GRU"):
        return (1, 2)
    if node.op in LAYERS:
        return (1,) if len(node.inputs) > 1 else ()
    return (_ON_CODES[node.op],) if node.op in _ON_CODES else ()


def _row(node: Node, place: int, graph: Graph, makers: Mapping[str, Node]) -> dict[str, Any] | None:
    name, grid = node.inputs[place], None
    shape: tuple[int, ...] = ()
    while name in makers and makers[name].op in (*_MOVES, "DequantizeLinear"):
        made = makers[name]
        if made.op == "Reshape" and made.inputs[1] in graph.constants:
            shape = shape or tuple(int(n) for n in graph.constants[made.inputs[1]])
        grid = made if made.op == "DequantizeLinear" else grid
        name = made.inputs[0]
    held = graph.constants.get(name)
    if held is None:
        return None
    scales: tuple[np.ndarray, ...] = ()
    if grid is not None:
        scales = tuple(graph.constants[n] for n in grid.inputs[1:3] if n in graph.constants)
    elif node.op in _ON_CODES and node.op not in ("ConvInteger", "MatMulInteger"):
        scales = tuple(graph.constants[n] for n in node.inputs[place + 1 : place + 3] if n in graph.constants)
    stored = _bits(held) * held.size + sum(_bits(v) * v.size for v in scales)
    part = f".{('enter', 'again')[place - 1]}" if node.op in ("LSTM", "GRU") else ""
    return {
        "layer": f"{node.name}{part}", "operator": node.op, "shape": list(shape or held.shape), "format": _format(held, grid, scales),
        "bits_per_weight": stored / max(held.size, 1), "reads": _reads(node, graph, makers),
    }  # fmt: skip


def _format(held: np.ndarray, grid: Node | None, scales: tuple[np.ndarray, ...]) -> str:
    if not scales:
        return held.dtype.name
    blocks = 0 if grid is None else grid.attrs.get("block_size", 0)
    how = f"g{blocks}" if blocks else "tensor" if scales[0].size == 1 else "channel"
    uneven = len(scales) > 1 and bool(scales[1].astype(np.int64).any())
    return f"{held.dtype.name}/{how}{'/asym' if uneven else ''}"


def _reads(node: Node, graph: Graph, makers: Mapping[str, Node]) -> str | None:
    """The type of the codes that a layer multiplies, where a grid stands before it or it computes on codes itself."""
    maker = makers.get(node.inputs[0])
    if maker is None:
        return None
    if maker.op == "DequantizeLinear":
        zero = graph.constants.get(maker.inputs[2]) if len(maker.inputs) > 2 else None
        return None if zero is None else zero.dtype.name
    return maker.attrs.get(CODES, "uint8") if maker.op in _GRIDS else "codes" if node.op in _ON_CODES else None


def _bits(values: np.ndarray) -> int:
    name = values.dtype.name
    return next((bits for kind, bits in (("int2", 2), ("int4", 4), ("float4", 4)) if name.removeprefix("u").startswith(kind)), 8 * values.dtype.itemsize)  # fmt: skip


def _end(value: Any) -> dict[str, Any]:
    return {"name": value.name, "type": value.dtype.name, "shape": list(value.shape)}
