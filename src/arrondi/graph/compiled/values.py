"""Rounding, sums, products, pools and limits of values as native steps."""

from __future__ import annotations

import math

import numpy as np
import torch

from arrondi.graph.codes import INTEGERS, tensor_of
from arrondi.graph.compiled.asks import codes_of, eight, float_arithmetic, limits, numbers, plane, raised
from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.moves import table_step
from arrondi.graph.ir import CODES, Node
from arrondi.graph.windows import windows


def quantize(b: Builder, node: Node) -> bool:
    """float32 → codes."""
    grid = numbers(b, *node.inputs[1:3])
    kind = node.attrs.get(CODES, "uint8")
    if grid is None or len(grid) != 2 or kind not in ("uint8", "int8") or grid[0].size != 1 or not eight(grid[1]):
        return False
    x = b.value(node.inputs[0])
    if x is None or x.codes or grid[0].dtype != np.float32 or not x.numel or grid[1].dtype.name != kind:
        return False
    x, copied = b.ordered(x, False)
    y = b.new(node.outputs[0], True, kind == "int8")
    n, channels = (x.shape[0], x.shape[1]) if y.last else (1, 1)
    up = 128 if y.signed else 0
    low, high = (end + up for end in INTEGERS[kind][:2])
    space = x.numel // (n * channels)
    b.plan.round(x.room.slot, y.room.slot, n, channels, space, float(grid[0].reshape(())), raised(grid[1]), low, high)
    if copied:
        b.rooms.leave(x.room)
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
    """QLinearAdd and QLinearMul of two values of one shape."""
    grids = numbers(b, *node.inputs[1:3], *node.inputs[4:8])
    if grids is None or not float_arithmetic(node) or any(g.size != 1 for g in grids):
        return False
    sx, zx, sw, zw, sy, zy = grids
    if not eight(zx, zw, zy):
        return False
    x, w = codes_of(b, node.inputs[0], zx), codes_of(b, node.inputs[3], zw)
    if x is None or w is None or x.shape != w.shape or x.numel == 1:
        return False
    last = x.last
    w, copied = b.ordered(w, last)
    product = node.op.endswith("Mul")
    scales = [tensor_of(s).reshape(()).float() for s in (sx, sw, sy)]
    zeros = [int(z) for z in (zx, zw, zy)]
    if product:
        down = [raised(zx), raised(zw)]
        of = [float(scales[0] * scales[1] / scales[2]), 0.0, float(zeros[2])]
    else:
        down = [x.up, w.up]
        of_x, of_w = scales[0] / scales[2], scales[1] / scales[2]
        zero = torch.tensor(zeros, dtype=torch.float32)
        of = [float(of_x), float(of_w), float(zero[2] - (of_x * zero[0] + of_w * zero[1]))]
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8, last=last)
    b.plan.pair(
        x.room.slot, w.room.slot, y.room.slot, x.numel, product, *down, y.up, *of, low - y.up, high - y.up
    )  # fmt: skip
    if copied:
        b.rooms.leave(w.room)
    return True


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
    if grids is None or not float_arithmetic(node) or node.attrs.get("channels_last", 0):
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
    x, copied = b.ordered(x, True)
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8)
    scale = (tensor_of(sx).reshape(()) / (tensor_of(sy).reshape(()) * count)).float().reshape(1).numpy()
    b.plan.mean(
        x.room.slot, y.room.slot, [x.shape[0], 1, count, x.shape[1]], raised(zx), b.keep(scale), raised(zy), low, high
    )  # fmt: skip
    if copied:
        b.rooms.leave(x.room)
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
