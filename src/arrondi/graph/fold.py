"""What a network computes of constants alone, computed once (`fold`), normalizations as parts of the layer before them (`fold_norms`), and
products with their bias as one layer (`with_bias`, `join_biases`).

Exporters slice and turn weights with operators; behind those a layer's weight would not be known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from arrondi.errors import ArrondiError
from arrondi.graph.codes import INTEGERS, tensor_of
from arrondi.graph.ir import QDQ, Graph, Node
from arrondi.graph.ops import evaluate
from arrondi.graph.rules import floating_values

_KEPT: Final = frozenset(("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", QDQ, "If", "Loop", "Scan"))
"""Not computed ahead: the first would make numbers of codes again."""
_RANDOM: Final = frozenset(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"))  # fmt: skip
_LARGE: Final = 1 << 16
"""Numbers that a constant may have although its parts have fewer."""


@torch.no_grad()
def fold(graph: Graph) -> Graph:
    """The graph without operators on constants; those that would make a large array of a small one stay."""
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        known = all(n in constants for n in node.inputs if n) and any(node.inputs)
        if not known or node.op in _KEPT or node.op in _RANDOM or graph.results & {*node.outputs}:
            nodes.append(node)
            continue
        given = [constants[n] if n else None for n in node.inputs]
        made = None if any(_odd(v) for v in given) else _computed(node, given, graph)
        if made is None or sum(v.size for v in made) > _LARGE + sum(v.size for v in given if v is not None):
            nodes.append(node)
            continue
        constants |= {n: v for n, v in zip(node.outputs, made, strict=False) if n}
    return graph.with_nodes(nodes, constants)


def _odd(value: np.ndarray | None) -> bool:
    """A type that tensors do not hold as it is."""
    name = "float32" if value is None else value.dtype.name
    return name.startswith(("float8", "float4", "bfloat", "uint16", "uint32", "uint64", "str", "object")) or (
        name in INTEGERS and name not in ("int8", "uint8", "int16", "int32")
    )


def _computed(node: Node, given: list[np.ndarray | None], graph: Graph) -> list[np.ndarray] | None:
    try:
        found = evaluate(node, [None if v is None else tensor_of(v) for v in given], graph.opset, graph.domains)
    except (ArrondiError, RuntimeError, ValueError, IndexError, TypeError):
        return None  # what is wrong with it shows where the network runs
    return [np.ascontiguousarray(t.numpy()) for t in found]


def fold_norms(graph: Graph) -> Graph:
    """BatchNormalization behind a layer that nobody else reads → the layer's own weight and bias (Jacob et al. 2018, arXiv:1712.05877)."""
    constants, producers = dict(graph.constants), graph.producers
    merged: dict[str, Node] = {}
    for node in graph.nodes:
        layer = producers.get(node.inputs[0]) if node.op == "BatchNormalization" else None
        if layer is None or layer.op not in _NORMED or graph.only_reader(layer.outputs[0]) is None:
            continue
        names = [n for n in (*layer.inputs[1:], *node.inputs[1:]) if n]
        if any(n not in constants or constants[n].dtype != np.float32 for n in names) or node.attrs.get(
            "training_mode", 0
        ):
            continue
        weight, bias = (
            constants[layer.inputs[1]],
            constants[layer.inputs[2]] if len(layer.inputs) > 2 and layer.inputs[2] else 0.0,
        )
        scale, shift, mean, variance = (constants[n].astype(np.float64) for n in node.inputs[1:5])
        if layer.op == "Gemm" and (layer.attrs.get("alpha", 1.0) != 1.0 or layer.attrs.get("beta", 1.0) != 1.0):
            continue
        factor = scale / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        stem = next(graph.fresh(f"{node.name}_folded"))
        constants[f"{stem}_weight"] = (weight * _by_output(layer, weight, factor)).astype(np.float32)
        constants[f"{stem}_bias"] = ((bias - mean) * factor + shift).astype(np.float32)
        read = (layer.inputs[0], f"{stem}_weight", f"{stem}_bias")
        merged[node.name] = replace(layer, inputs=read, outputs=node.outputs[:1])
    gone = {made.name for made in merged.values()}
    return graph.with_nodes((merged.get(n.name, n) for n in graph.nodes if n.name not in gone), constants)


_NORMED: Final = frozenset(("Conv", "ConvTranspose", "Gemm"))


def _by_output(layer: Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """A number for each output as an array that goes with the layer's weight."""
    if layer.op == "Gemm":
        return factor[:, None] if layer.attrs.get("transB", 0) else factor[None]
    ones = (1,) * (weight.ndim - 2)
    if layer.op == "Conv":
        return factor.reshape(-1, 1, *ones)
    groups = layer.attrs.get("group", 1)
    return np.repeat(factor.reshape(groups, -1), weight.shape[0] // groups, axis=0).reshape(*weight.shape[:2], *ones)


def with_bias(graph: Graph) -> Graph:
    """MatMul of a matrix and a constant, then Add of a constant → Gemm, which runtimes compute in integers with its bias."""
    floating, producers = floating_values(graph), graph.producers
    gone: dict[str, Node] = {}
    for node in graph.nodes:
        product = next((producers[n] for n in node.inputs if n in producers), None)
        if node.op != "Add" or product is None or product.op != "MatMul" or product.inputs[0] not in floating:
            continue
        weight = graph.constants.get(product.inputs[1])
        bias = next((n for n in node.inputs if n in graph.constants), "")
        alone = graph.only_reader(product.outputs[0]) is not None
        if weight is None or weight.ndim != 2 or not bias or not alone or _rank(graph, product) != 2:
            continue
        if graph.constants[bias].shape in ((weight.shape[1],), (1, weight.shape[1])):
            gone[node.name] = replace(product, op="Gemm", inputs=(*product.inputs, bias), outputs=node.outputs)
    taken = {made.name for made in gone.values()}
    return graph.with_nodes(gone.get(n.name, n) for n in graph.nodes if n.name not in taken)


def join_biases(graph: Graph) -> Graph:
    """MatMul of any rank by a constant matrix and Add of a constant row → one MatMul of three inputs, which `to_onnx` writes as the two again."""
    constants = graph.constants
    nodes: list[Node] = []
    products: dict[str, int] = {}
    for node in graph.nodes:
        at = next((products[n] for n in node.inputs if n in products), None) if node.op == "Add" else None
        others = [n for n in node.inputs if n not in products]
        bias = constants.get(others[0]) if at is not None and len(others) == 1 else None
        if at is not None and bias is not None and bias.shape == constants[nodes[at].inputs[1]].shape[1:]:
            product = nodes[at]
            nodes[at] = replace(product, inputs=(*product.inputs, others[0]), outputs=node.outputs)
            continue
        weight = constants.get(node.inputs[1]) if node.op == "MatMul" and len(node.inputs) == 2 else None
        if weight is not None and weight.ndim == 2 and graph.only_reader(node.outputs[0]) is not None:
            products[node.outputs[0]] = len(nodes)
        nodes.append(node)
    return graph.with_nodes(nodes)


def _rank(graph: Graph, product: Node) -> int | None:
    """Axes of what a product reads or gives, where that is known."""
    known = {**graph.shapes, **{v.name: v.shape for v in (*graph.inputs, *graph.outputs)}}
    shape = next((known[n] for n in (product.outputs[0], product.inputs[0]) if n in known), None)
    return None if shape is None else len(shape)
