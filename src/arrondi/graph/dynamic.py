"""Ranges that follow each tensor, as ONNX Runtime's dynamic quantizer has them: `round_dynamically`, and `integer_products` for the file.

What enters a layer is rounded to eight bits over its own range whenever the network runs (DynamicQuantizeLinear), so no data is needed. In the
file products are MatMulInteger and ConvInteger, and recurrent layers `com.microsoft.DynamicQuantizeLSTM`, which rounds its hidden state
at every step. Layers that no such operator computes (transposed convolutions, GRU, weights of other bits) multiply in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from arrondi.errors import SchemeError
from arrondi.formats import ActivationScheme, PerChannel, PerTensor
from arrondi.graph.ir import DYNAMIC, QDQ, Graph, Node
from arrondi.graph.rules import floating_values
from arrondi.tensor.qtensor import QTensor

_LAYERS: Final = ("Conv", "Gemm", "MatMul", "LSTM")
LSTM: Final = "com.microsoft.DynamicQuantizeLSTM"
Constants = dict[str, np.ndarray]


def check_dynamic(scheme: ActivationScheme) -> None:
    """Refuse what DynamicQuantizeLinear does not do.

    Raises:
        SchemeError: the scheme is not that of unsigned bytes with a zero point and one scale for a tensor.
    """
    own = scheme.scheme
    if (
        own.format.name != "uint8"
        or own.zero_point != "integer"
        or not isinstance(own.granularity, PerTensor)
        or own.scale != "float32"
    ):
        raise SchemeError(
            f"Ranges that follow each tensor are those of uint8 with a zero point in ONNX, got {scheme}. Use a=uint8/tensor/asym."
        )


def round_dynamically(graph: Graph) -> Graph:
    """The graph in which layers with constant weights read what was rounded over its own range."""
    floating = floating_values(graph)
    given: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op in _LAYERS and node.inputs[0] in floating and _weights_known(node, graph):
            x = node.inputs[0]
            if x not in given:
                given[x] = next(graph.fresh(f"{x}_rounded"))
                nodes.append(Node(f"{x}_grid", QDQ, (x,), (given[x],), {"codes": "uint8"}))
            again = {DYNAMIC: 1} if node.op == "LSTM" else {}
            node = replace(node, inputs=(given[x], *node.inputs[1:]), attrs={**node.attrs, **again})
        nodes.append(node)
    return graph.with_nodes(nodes)


def _weights_known(node: Node, graph: Graph) -> bool:
    places = (1, 2) if node.op == "LSTM" else (1,)
    return all(node.inputs[p] in graph.constants for p in places)


def integer_products(graph: Graph, weights: Mapping[str, QTensor]) -> tuple[Graph, dict[str, QTensor]]:
    """The graph with layers as products of integers.

    Args:
        graph: of `round_dynamically`.
        weights: layer → its weight as a matrix.

    Returns:
        the graph, and the weights that are still to be put into it.
    """
    constants, left = dict(graph.constants), dict(weights)
    rounders = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op == QDQ and len(n.inputs) == 1}
    nodes: list[Node] = []
    codes: dict[str, tuple[str, str, str]] = {}
    for node in graph.nodes:
        x = rounders.get(node.inputs[0]) if node.op in _LAYERS else None
        names = [f"{node.name}.{part}.{d}" for part in ("enter", "again") for d in range(_directions(node, graph))]
        held = [left.get(n) for n in names or [node.name]]
        fits = x is not None and all(q is not None and _fits(q, node) for q in held)
        if not fits or x is None:
            nodes.append(replace(node, attrs={k: v for k, v in node.attrs.items() if k != DYNAMIC}))
            continue
        kept = [left.pop(n) for n in names or [node.name]]
        if node.op == "LSTM":
            nodes.append(_lstm(node, x, kept, constants, graph))
            continue
        if x not in codes:
            codes[x] = (f"{x}_codes", f"{x}_step", f"{x}_zero")
            nodes.append(Node(f"{x}_quantize", "DynamicQuantizeLinear", (x,), codes[x]))
        nodes += _product(node, codes[x], kept[0], constants, graph)
    read = {n for node in nodes for n in node.inputs} | graph.results
    return graph.with_nodes((n for n in nodes if n.op != QDQ or n.outputs[0] in read), constants), left


def _directions(node: Node, graph: Graph) -> int:
    """Of a recurrent layer; none of others."""
    return graph.constants[node.inputs[1]].shape[0] if node.op == "LSTM" and node.inputs[1] in graph.constants else 0


def _fits(q: QTensor, node: Node) -> bool:
    plain = isinstance(q.scale, torch.Tensor) and q.offset is None and q.group_index is None and q.apart is None
    own = q.scheme.format
    even = q.zero_point is None or node.op in ("Gemm", "MatMul")
    usual = node.op != "Gemm" or (
        not node.attrs.get("transA", 0) and node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
    )
    return (
        plain and even and usual and own.kind == "integer" and 4 < own.bits <= 8
        and isinstance(q.scheme.granularity, PerTensor | PerChannel)
    )  # fmt: skip


def _product(node: Node, codes: tuple[str, str, str], q: QTensor, constants: Constants, graph: Graph) -> list[Node]:
    """Codes, their sums, and the sums as numbers with the bias."""
    kind = np.uint8 if q.scheme.format.qmin == 0 else np.int8
    scale = np.asarray(q.scale.float().reshape(-1).numpy() if isinstance(q.scale, torch.Tensor) else 0, np.float32)
    if node.op == "Conv":
        shape = graph.constants[node.inputs[1]].shape
        weight, across = q.codes.reshape(shape).numpy(), (-1, *[1] * (len(shape) - 2))
        op, attrs = "ConvInteger", dict(node.attrs)
    else:
        weight, across, op, attrs = q.codes.T.numpy(), (-1,), "MatMulInteger", {}
    y = node.outputs[0]
    held: Constants = {f"{y}_weight": np.ascontiguousarray(weight).astype(kind)}
    held[f"{y}_weight_scale"] = scale.reshape(across) if len(scale) > 1 else scale.reshape(())
    read = [codes[0], f"{y}_weight", codes[2]]
    if q.zero_point is not None:
        held[f"{y}_weight_zero"] = q.zero_point.reshape(-1).numpy().astype(kind)
        held[f"{y}_weight_zero"] = held[f"{y}_weight_zero"] if len(scale) > 1 else held[f"{y}_weight_zero"].reshape(())
        read.append(f"{y}_weight_zero")
    nodes = [
        Node(node.name, op, tuple(read), (f"{y}_sums",), attrs),
        Node(f"{node.name}_cast", "Cast", (f"{y}_sums",), (f"{y}_whole",), {"to": 1}),
        Node(f"{node.name}_steps", "Mul", (codes[1], f"{y}_weight_scale"), (f"{y}_steps",)),
    ]
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None
    last = y if bias is None else f"{y}_product"
    nodes.append(Node(f"{node.name}_scaled", "Mul", (f"{y}_whole", f"{y}_steps"), (last,)))
    if bias is not None:
        own = graph.constants[bias]
        held[f"{y}_bias"] = own.reshape(across) if node.op == "Conv" else own
        nodes.append(Node(f"{node.name}_biased", "Add", (last, f"{y}_bias"), (y,)))
    constants.update(held)
    return nodes


def _lstm(node: Node, x: str, held: list[QTensor], constants: Constants, graph: Graph) -> Node:
    """ONNX Runtime's operator: weights (directions, in, 4 · hidden), scales (directions, 4 · hidden)."""
    count = len(held) // 2
    parts: list[str] = []
    for part, kept in (("enter", held[:count]), ("again", held[count:])):
        stem = f"{node.name}_{part}"
        kind = np.uint8 if kept[0].scheme.format.qmin == 0 else np.int8
        codes = np.stack([np.ascontiguousarray(q.codes.numpy().T) for q in kept]).astype(kind)
        scales = np.stack([q.scale.float().reshape(-1).numpy() for q in kept if isinstance(q.scale, torch.Tensor)])
        scales = scales if scales.shape[1] > 1 else scales[:, 0]
        constants |= {f"{stem}_codes": codes, f"{stem}_scale": scales, f"{stem}_zero": np.zeros(scales.shape, kind)}
        parts.append(stem)
    enter, again = parts
    rest = (*node.inputs[3:], *[""] * 5)[:5]  # bias, lengths, both states, peepholes
    read = (x, f"{enter}_codes", f"{again}_codes", *rest)
    beside = tuple(f"{stem}_{what}" for stem in parts for what in ("scale", "zero"))
    attrs = {k: v for k, v in node.attrs.items() if k not in (DYNAMIC, "layout")}
    return Node(node.name, LSTM, (*read, *beside), node.outputs, attrs)
