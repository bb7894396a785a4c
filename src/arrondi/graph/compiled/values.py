"""Rounding, sums, products, pools and limits of values as native steps."""

from __future__ import annotations

import math

import numpy as np
import torch

from arrondi.graph.codes import INTEGERS, tensor_of
from arrondi.graph.compiled.asks import codes_of, eight, ending, fixed, limits, numbers, plane, raised
from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.moves import table_step
from arrondi.graph.compiled.room import Held
from arrondi.graph.ir import ARITHMETIC, CODES, Node
from arrondi.graph.requantize import LEFT
from arrondi.graph.windows import window_counts, windows


def quantize(b: Builder, node: Node) -> bool:
    """float32 → codes."""
    grid = numbers(b, *node.inputs[1:3])
    kind = node.attrs.get(CODES, "uint8")
    if grid is None or len(grid) != 2 or kind not in ("uint8", "int8") or grid[0].size != 1 or not eight(grid[1]):
        return False
    x = b.value(node.inputs[0])
    if x is None or x.codes or grid[0].dtype != np.float32 or not x.numel or grid[1].dtype.name != kind:
        return False
    y = b.new(node.outputs[0], True, kind == "int8")
    n, channels = (1, 1) if x.last or not y.last else x.shape[:2]  # from one order to the other on the way
    up = 128 if y.signed else 0
    low, high = (end + up for end in INTEGERS[kind][:2])
    space = x.numel // (n * channels)
    b.plan.round(x.room.slot, y.room.slot, n, channels, space, float(grid[0].reshape(())), raised(grid[1]), low, high)
    return True


def dequantize(b: Builder, node: Node) -> bool:
    """Codes → float32."""
    grid = numbers(b, *node.inputs[1:3])
    if grid is None or len(grid) != 2 or grid[0].size != 1 or not eight(grid[1]) or grid[0].dtype != np.float32:
        return False
    x = codes_of(b, node.inputs[0], grid[1])
    if x is None:
        return False
    x, copied = b.ordered(x, False)
    y = b.new(node.outputs[0], False, last=False)
    b.plan.restore(x.room.slot, y.room.slot, x.numel, raised(grid[1]), float(grid[0].reshape(())))
    if copied:
        b.rooms.leave(x.room)
    return True


def pair(b: Builder, node: Node) -> bool:
    """QLinearAdd and QLinearMul of two values that broadcast."""
    grids = numbers(b, *node.inputs[1:3], *node.inputs[4:8])
    if grids is None or any(g.size != 1 for g in grids) or not eight(*grids[1::2]):
        return False
    sx, zx, sw, zw, sy, zy = grids
    x, w = codes_of(b, node.inputs[0], zx), codes_of(b, node.inputs[3], zw)
    if x is None or w is None or x.numel == 1 or w.numel == 1:  # a number for all is added in another order
        return False
    b.batched &= len(x.shape) == len(w.shape) and b.samples not in (x.numel, w.numel)
    product, fixed_point = node.op.endswith("Mul"), node.attrs.get(ARITHMETIC, "float") != "float"
    by = _fixed_pair(node, product, [float(s) for s in (sx, sw, sy)]) if fixed_point else [0] * 7
    if by is None:
        return False
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8, last=x.last if len(x.shape) == len(b.shapes[name][0]) else w.last)
    (x, x_copied), (w, w_copied) = (_spread(b, v, y.shape, y.last) for v in (x, w))
    zeros = [int(z) for z in (zx, zw, zy)]
    if fixed_point:
        of = [0.0, 0.0, float(zeros[2])]
    else:
        of = _float_pair(product, [tensor_of(s).reshape(()).float() for s in (sx, sw, sy)], zeros)
    down = [raised(zx), raised(zw)] if product or fixed_point else [x.up, w.up]
    codes = [*down, y.up, low - y.up, high - y.up]
    b.plan.pair(x.room.slot, w.room.slot, y.room.slot, y.numel, product, codes, of, by)
    for held, copied in ((x, x_copied), (w, w_copied)):
        if copied:
            b.rooms.leave(held.room)
    return True


def _float_pair(product: bool, scales: list[torch.Tensor], zeros: list[int]) -> list[float]:
    """Multipliers and the constant, as `integers.qlinear_mul` and `requantize.add_codes` have them."""
    if product:
        return [float(scales[0] * scales[1] / scales[2]), 0.0, float(zeros[2])]
    of_x, of_w = scales[0] / scales[2], scales[1] / scales[2]
    zero = torch.tensor(zeros, dtype=torch.float32)
    return [float(of_x), float(of_w), float(zero[2] - (of_x * zero[0] + of_w * zero[1]))]


def _fixed_pair(node: Node, product: bool, scales: list[float]) -> list[int] | None:
    """The arithmetic and three fixed-point multipliers, as `requantize` has them."""
    how = {"single": 1, "double": 2}[node.attrs[ARITHMETIC]]
    if product:
        one = [torch.tensor(s, dtype=torch.float32) for s in scales]
        found = fixed(float(one[0] * one[1] / one[2]), 0.0, 0.0)
    else:
        largest = 2.0 * max(scales[:2])
        found = fixed(scales[0] / largest, scales[1] / largest, largest / ((1 << LEFT) * scales[2]))
    return None if found is None else [how, *(int(v) for v in found.reshape(-1))]


def _spread(b: Builder, x: Held, shape: tuple[int, ...], last: bool) -> tuple[Held, bool]:
    """A value in another shape that it broadcasts to, and whether that is a copy."""
    if x.shape == shape:
        return b.ordered(x, last)
    made = b.scratch(shape, x, last and len(shape) > 2)
    come = [0 if n == 1 else s for n, s in zip(x.shape, x.strides(), strict=True)]
    b.move(x, made, shape, [0] * (len(shape) - len(come)) + come, made.strides())
    return made, True


def largest(b: Builder, node: Node) -> bool:
    """MaxPool of codes."""
    x = b.value(node.inputs[0])
    if x is None or not x.codes or not 3 <= len(x.shape) <= 4 or len(node.outputs) > 1 or not x.numel:
        return False
    kernel, strides, dilations, begin, _ = windows(node.attrs, x.shape)
    x, copied = b.ordered(x, True)
    y = b.new(node.outputs[0], True, x.signed)
    shape = [
        x.shape[0], *plane(x.shape[2:]), x.shape[1], *plane(y.shape[2:]), *plane(kernel), *plane(strides), *plane(dilations),
        *plane(begin, 0),
    ]  # fmt: skip
    b.plan.largest(x.room.slot, y.room.slot, shape)
    if copied:
        b.rooms.leave(x.room)
    return True


def global_mean(b: Builder, node: Node) -> bool:
    """QLinearGlobalAveragePool."""
    grids = numbers(b, *node.inputs[1:5])
    if grids is None or node.attrs.get("channels_last", 0):
        return False
    sx, zx, sy, zy = grids
    if not eight(zx, zy) or sx.size != 1 or sy.size != 1:
        return False
    x = codes_of(b, node.inputs[0], zx)
    if x is None or len(x.shape) < 3:
        return False
    count = math.prod(x.shape[2:])
    if count > 2**20:
        return False
    last = ending(node, tensor_of(sx).reshape(()) / (tensor_of(sy).reshape(()) * count), 16)
    if last is None:
        return False
    x, copied = b.ordered(x, True)
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8)
    shape = [x.shape[0], 1, count, x.shape[1], *[1] * 8, 0, 0]
    codes = [raised(zy), low, high, last.how]
    b.plan.mean(x.room.slot, y.room.slot, shape, raised(zx), b.keep(last.multiplier), codes)
    if copied:
        b.rooms.leave(x.room)
    return True


def average(b: Builder, node: Node) -> bool:
    """QLinearAveragePool, by way of float32; fixed point has a mean of its own."""
    grids = numbers(b, *node.inputs[1:5])
    if grids is None or len(grids) != 4 or node.attrs.get("channels_last", 0) or not eight(*grids[1::2]):
        return False
    sx, zx, sy, zy = grids
    x = codes_of(b, node.inputs[0], zx)
    if x is None or not 3 <= len(x.shape) <= 4 or any(s.size != 1 or s.dtype != np.float32 for s in (sx, sy)):
        return False
    if any(d != 1 for d in node.attrs.get("dilations", [])) or node.attrs.get(ARITHMETIC, "float") != "float":
        return False
    kernel, strides, _, begin, _ = windows(node.attrs, x.shape)
    counts = b.keep(window_counts(node.attrs, torch.ones(1, 1, *x.shape[2:])).numpy())
    x, copied = b.ordered(x, True)
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8)
    shape = [
        x.shape[0], *plane(x.shape[2:]), x.shape[1], *plane(y.shape[2:]), *plane(kernel), *plane(strides), 1, 1, *plane(begin, 0),
    ]  # fmt: skip
    scales, codes = (float(sx.reshape(())), float(sy.reshape(()))), [raised(zy), low, high, 0]
    b.plan.average(x.room.slot, y.room.slot, shape, raised(zx), *scales, y.up, counts, codes)
    if copied:
        b.rooms.leave(x.room)
    return True


def leaky(b: Builder, node: Node) -> bool:
    """LeakyRelu of float32."""
    x = b.value(node.inputs[0])
    if x is None or x.codes:
        return False
    y = b.new(node.outputs[0], False, last=x.last)
    b.plan.leaky(x.room.slot, y.room.slot, x.numel, float(node.attrs.get("alpha", 0.01)))
    return True


def clip(b: Builder, node: Node) -> bool:
    """Limits of codes, where no layer has them in itself."""
    x = b.value(node.inputs[0])
    found = [b.constants.get(n) if n else None for n in node.inputs[1:3]]
    if x is None or not x.codes or any(v is None and n for v, n in zip(found, node.inputs[1:3], strict=True)):
        return False
    codes = np.arange(256) - x.up
    for bound, limit in zip(found, (np.maximum, np.minimum), strict=False):
        codes = codes if bound is None else limit(codes, int(bound))
    table_step(b, x, node.outputs[0], codes + x.up, x.signed)
    return True
