"""Along which axis of a network's output classes lie: `class_axis`."""

from __future__ import annotations

from typing import Final

from arrondi.graph.ir import QDQ, Graph

_LAST: Final = frozenset({"MatMul", "Gemm", "LayerNormalization", "MatMulInteger"})
"""Operators that make classes along the last axis."""
_SAME: Final = frozenset((
    "Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Clip", "Cast", "Identity", "Dropout", QDQ, "QuantizeLinear", "DequantizeLinear",
))  # fmt: skip
"""Operators after which they lie where they lay."""
_PROBABLE: Final = frozenset({"Softmax", "LogSoftmax"})


def class_axis(graph: Graph, rank: int) -> int:
    """Of the first output: the last axis behind a product of matrices, as of what is said of every step of a sequence, else the second.

    Args:
        rank: how many axes the output has.
    """
    producers, name = graph.producers, graph.outputs[0].name
    turns: list[list[int]] = []
    axis = 1
    while name in producers:
        node = producers[name]
        if node.op == "Transpose":
            turns.append([int(a) for a in node.attrs.get("perm", range(rank)[::-1])])
        elif node.op in _LAST or node.op in _PROBABLE:
            axis = node.attrs.get("axis", -1) % rank if node.op in _PROBABLE else rank - 1
            break
        elif node.op not in _SAME:
            break
        name = next((n for n in node.inputs if n not in graph.constants), "")
    if any(len(turn) != rank for turn in turns):
        return 1
    for turn in reversed(turns):
        axis = turn.index(axis)
    return axis or 1
