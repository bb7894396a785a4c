"""What `integer.lower` asks of one operator: grids, weights as codes, what follows a layer, tables, biases, and whether int32 holds its sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from arrondi.graph.codes import dequantize, quantize, tensor_of
from arrondi.graph.ir import CODES, Graph, Node
from arrondi.graph.ops import evaluate

Constants = Mapping[str, np.ndarray]

_EIGHT: Final = ("uint8", "int8")
_HELD_IN: Final = {
    "int8": np.int8,
    "int4": np.int8,
    "int2": np.int8,
    "uint8": np.uint8,
    "uint4": np.uint8,
    "uint2": np.uint8,
}
_MOST_BIAS: Final = 2**30
_MOST_SUM: Final = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """A value as codes of eight bits: real = scale · (code − zero).

    Attributes:
        codes, scale, zero: names; the last two of constants with one number each.
    """

    codes: str
    scale: str
    zero: str

    def same(self, other: Grid, constants: Constants) -> bool:
        """Whether a code means the same on both."""
        mine, theirs = ((float(constants[g.scale]), constants[g.zero]) for g in (self, other))
        return mine[0] == theirs[0] and mine[1].dtype == theirs[1].dtype and int(mine[1]) == int(theirs[1])

    def quantized(self, x: torch.Tensor, constants: Constants) -> torch.Tensor:
        """Numbers as codes."""
        zero = constants[self.zero]
        return quantize({CODES: zero.dtype.name}, x, tensor_of(constants[self.scale]), tensor_of(zero))


@dataclass(frozen=True)
class Tail:
    """What follows an operator: a clamp, perhaps, and QuantizeLinear.

    Attributes:
        quantize: the last node of it.
        grid: of the codes that it makes.
        limits: smallest and largest code that the clamp leaves; empty where the grid's own range does that.
        nodes: all of it.
    """

    quantize: Node
    grid: Grid
    limits: tuple[int, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Weight:
    """A constant as codes.

    Attributes:
        codes: int8 or uint8.
        scale: float32; one, or one for each index of `axis`.
        zero: of the codes' type, as many.
        axis: along which they go.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int

    def centred(self) -> np.ndarray:
        """code − zero point, int64."""
        shape = [-1 if i == self.axis else 1 for i in range(self.codes.ndim)] if self.zero.size > 1 else ()
        return self.codes.astype(np.int64) - self.zero.astype(np.int64).reshape(shape)

    def one_zero(self) -> np.ndarray:
        """The zero points, as one number where they are all alike."""
        alike = self.zero.size == 1 or bool((self.zero == self.zero.reshape(-1)[0]).all())
        return self.zero.reshape(-1)[:1].reshape(()) if alike else self.zero


def pair(node: Node) -> list[Node]:
    """A QDQ as QuantizeLinear and DequantizeLinear."""
    x, *grid = node.inputs
    codes = f"{node.outputs[0]}_codes"
    own = {k: v for k, v in node.attrs.items() if k in ("axis", "block_size")}
    return [
        Node(f"{node.name}_quantize", "QuantizeLinear", (x, *grid), (codes,), {**own, CODES: node.attrs[CODES]}),
        Node(f"{node.name}_dequantize", "DequantizeLinear", (codes, *grid), node.outputs, own),
    ]


def grid_of(node: Node, constants: Constants) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear: constants, one scale, eight bits; None for any other."""
    if len(node.inputs) < 3 or any(n not in constants for n in node.inputs[1:]):
        return None
    scale, zero = (constants[n] for n in node.inputs[1:3])
    if scale.size != 1 or zero.size != 1 or zero.dtype.name not in _EIGHT or scale.dtype != np.float32:
        return None
    return Grid("", node.inputs[1], node.inputs[2])


def weight_of(node: Node, constants: Constants) -> Weight | None:
    """The codes behind a DequantizeLinear of constants of eight bits or fewer; None where scales change along two axes."""
    if any(n and n not in constants for n in node.inputs) or node.attrs.get("block_size", 0):
        return None
    codes, scale = (constants[n] for n in node.inputs[:2])
    held = _HELD_IN.get(codes.dtype.name)
    if held is None or scale.ndim > 1 or scale.dtype != np.float32:
        return None
    zero = constants[node.inputs[2]] if len(node.inputs) > 2 and node.inputs[2] else np.zeros(scale.shape)
    zero = np.broadcast_to(np.asarray(zero).astype(held), scale.shape).copy()
    axis = int(node.attrs.get("axis", 1)) % max(codes.ndim, 1)
    one = scale.size == 1
    return Weight(codes.astype(held), scale.reshape(()) if one else scale, zero.reshape(()) if one else zero, axis)


def tail_of(graph: Graph, value: str, constants: Constants) -> Tail | None:
    """What follows a value if nothing else reads it: QuantizeLinear, with Relu or Clip before it or without."""
    passed: list[Node] = []
    node = graph.only_reader(value)
    if node is not None and node.op in ("Relu", "Clip") and node.inputs[0] == value:
        if any(n and n not in constants for n in node.inputs[1:]):
            return None
        passed.append(node)
        node = graph.only_reader(node.outputs[0])
    grid = grid_of(node, constants) if node is not None and node.op == "QuantizeLinear" else None
    if node is None or grid is None:
        return None
    grid = replace(grid, codes=node.outputs[0])
    limits = _limits(passed[0], grid, constants) if passed else ()
    return Tail(node, grid, limits, (*passed, node))


def _limits(node: Node, grid: Grid, constants: Constants) -> tuple[int, ...]:
    full = np.iinfo(constants[grid.zero].dtype)
    ends = [-np.inf, np.inf]
    if node.op == "Relu":
        ends[0] = 0.0
    for i, name in enumerate(node.inputs[1:3]):
        if name:
            ends[i] = float(constants[name])
    low, high = (int(c) for c in grid.quantized(torch.tensor(ends), constants))
    return () if (low, high) == (full.min, full.max) else (low, high)


def table_of(node: Node | None, given: Grid, tail: Tail, constants: Constants, opset: int) -> np.ndarray:
    """The output's code of every code of the input, 0 … 255 or 0 … 127, −128 … −1.

    Args:
        node: a function of one value; None changes the grid alone.
    """
    kind = constants[given.zero].dtype
    codes = torch.from_numpy(np.arange(256).astype(np.uint8).view(kind).copy())
    x = dequantize({}, codes, tensor_of(constants[given.scale]), tensor_of(constants[given.zero]))
    for step in (*([] if node is None else [node]), *tail.nodes):
        if step.op != "QuantizeLinear":
            read = [x, *(tensor_of(constants[n]) if n else None for n in step.inputs[1:])]
            (x, *_) = evaluate(step, read, opset)
    return tail.grid.quantized(x, constants).numpy().astype(constants[tail.grid.zero].dtype)


def biases(
    node: Node, given: Grid, weight: Weight, constants: Constants, waiting: Mapping[str, Node]
) -> np.ndarray | str | None:
    """The bias as int32 codes of scale S_x · S_w; None where there is none; a reason where it cannot be one."""
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if not name:
        return None
    rows = int(np.prod(weight.codes.shape)) // max(int(np.prod(_row(node, weight)[0].shape)), 1)
    value = constants.get(name)
    if value is None and name in waiting and all(n in constants for n in waiting[name].inputs):
        made = waiting[name]
        parts = [tensor_of(constants[n]) for n in made.inputs]
        value = dequantize(dict(made.attrs), *parts).numpy()
    if value is None or value.size not in (1, rows):
        return "its bias is not constant, or not one number a row"
    scale = np.asarray(constants[given.scale]).reshape(()) * weight.scale
    codes = np.rint(np.broadcast_to(value.reshape(-1), (rows,)).astype(np.float64) / scale.astype(np.float64))
    if np.abs(codes).max(initial=0) >= _MOST_BIAS:
        return "its bias does not fit int32 at the scale of its products"
    return codes.astype(np.int32)


def _row(node: Node, weight: Weight) -> np.ndarray:
    """The centred weight as a matrix with one row for each output."""
    whole = weight.centred()
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return whole.reshape(len(whole), -1)
    return np.moveaxis(whole, -1, 0).reshape(whole.shape[-1], -1)


def fits(node: Node, given: Grid, weight: Weight, bias: np.ndarray | None, constants: Constants) -> str:
    """Why a layer's sums are no int32, or nothing: with codes as they are, and with zero points taken off."""
    zero = constants[given.zero]
    ends = np.iinfo(zero.dtype)
    rows = _row(node, weight)
    if weight.scale.size > 1 and weight.axis != (
        0 if node.op == "Conv" or node.attrs.get("transB", 0) else weight.codes.ndim - 1
    ):
        return "its scales go along the inputs"
    raw = np.abs(_row(node, replace(weight, zero=np.zeros_like(weight.zero)))).sum(1) * max(ends.max, -ends.min)
    reach = max(int(ends.max) - int(zero), int(zero) - int(ends.min))
    centred = np.abs(rows).sum(1) * reach + (0 if bias is None else np.abs(bias.astype(np.int64)))
    if max(raw.max(initial=0), centred.max(initial=0)) > _MOST_SUM:
        return f"its sums of {rows.shape[1]} products may leave int32"
    return ""
