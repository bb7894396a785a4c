"""Which operator a weight is for, and how it lies there: `Uses`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from arrondi.checkpoint.containers.onnx.header import Model, Node

_PASS: Final = ("Identity", "Cast", "Transpose")
_BIAS: Final = ".bias"
_DEEP: Final = 6
"""Operators between a weight and what it is for."""


@dataclass(frozen=True)
class Use:
    """What a matrix or kernel is for.

    Attributes:
        node: the operator.
        kind: class of a layer of PyTorch's: Linear, Embedding, Conv2d, ConvTranspose1d, …; "" where it is none.
        transposed: it is stored (in, out).
    """

    node: Node
    kind: str
    transposed: bool = False


class Uses:
    """The operators of a graph, by what they read and make."""

    def __init__(self, model: Model) -> None:
        self.constants = model.constants.keys()
        self.makers = {name: node for node in model.nodes for name in node.outputs if name}
        self.readers: dict[str, list[tuple[int, Node]]] = {}
        for node in model.nodes:
            for place, name in enumerate(node.inputs):
                if name:
                    self.readers.setdefault(name, []).append((place, node))

    def bias_of(self, node: Node) -> str:
        """Name of the constant that is added to the result of an operator, or that it adds itself; "" where there is none."""
        own = [name for name in node.inputs[2:] if name.endswith(_BIAS) and name in self.constants]
        if own or not node.outputs:
            return own[0] if own else ""
        readers = self.readers.get(node.outputs[0], [])
        added = [name for _, after in readers if after.op == "Add" for name in after.inputs if name in self.constants]
        return next((name for name in added if name.endswith(_BIAS)), "")

    def of(self, value: str, rank: int, flipped: bool = False, depth: int = 0) -> Use | None:
        """What a constant of so many axes is for: the first layer that reads it."""
        for place, node in self.readers.get(value, []):
            found = _use(node, place, rank, flipped)
            if found is None and node.op in _PASS and node.outputs and depth < _DEEP:
                turns = node.op == "Transpose" and node.attrs.get("perm", [1, 0]) == [1, 0] and rank == 2
                if node.op != "Transpose" or turns:
                    found = self.of(node.outputs[0], rank, flipped ^ turns, depth + 1)
            if found is not None:
                return found
        return None


def _use(node: Node, place: int, rank: int, flipped: bool) -> Use | None:
    op = node.op.rpartition(".")[2]
    if op in ("MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul") and place and rank == 2:
        return Use(node, "Linear", not flipped ^ bool(node.attrs.get("transB", 0)))
    if op in ("Gemm", "QGemm") and place and rank == 2:
        return Use(node, "Linear", not flipped ^ bool(node.attrs.get("transB", 0)))
    if op in ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "ConvTranspose") and place and rank in (3, 4, 5):
        return Use(node, f"{'ConvTranspose' if op == 'ConvTranspose' else 'Conv'}{rank - 2}d")
    if op in ("Gather", "GatherBlockQuantized") and not place and rank == 2 and node.attrs.get("axis", 0) == 0:
        return Use(node, "Embedding", flipped)
    return None
