"""What a network computes of constants alone, computed once (`fold`), and products of matrices with their bias as one layer (`with_bias`).

Exporters slice and turn weights with operators; behind those a layer's weight would not be known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch

from arrondi.errors import SchemeError
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
        made = None if any(_odd(v) for v in given) else _computed(node, given, graph.opset)
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


def _computed(node: Node, given: list[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    try:
        found = evaluate(node, [None if v is None else tensor_of(v) for v in given], opset)
    except (SchemeError, RuntimeError, ValueError, IndexError, TypeError):
        return None  # what is wrong with it shows where the network runs
    return [np.ascontiguousarray(t.numpy()) for t in found]


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


def _rank(graph: Graph, product: Node) -> int | None:
    """Axes of what a product reads or gives, where that is known."""
    known = {**graph.shapes, **{v.name: v.shape for v in (*graph.inputs, *graph.outputs)}}
    shape = next((known[n] for n in (product.outputs[0], product.inputs[0]) if n in known), None)
    return None if shape is None else len(shape)
