"""Convolutions and products of matrices as native steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arrondi.graph.codes import tensor_of
from arrondi.graph.compiled import layers
from arrondi.graph.compiled.asks import codes_of, eight, float_arithmetic, limits, numbers, plane, raised
from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.room import Held
from arrondi.graph.ir import Node
from arrondi.graph.windows import edges

Array = np.ndarray


def conv(b: Builder, node: Node) -> bool:
    """QLinearConv of one or two axes of space."""
    grids = numbers(b, *node.inputs[1:8])
    bias = b.constants.get(node.inputs[8]) if len(node.inputs) > 8 and node.inputs[8] else None
    if grids is None or not float_arithmetic(node) or (bias is None and len(node.inputs) > 8 and node.inputs[8]):
        return False
    sx, zx, w, sw, zw, sy, zy = grids
    if w.ndim not in (3, 4) or not eight(zx, zy) or sx.size != 1 or sy.size != 1:
        return False
    x, weight = codes_of(b, node.inputs[0], zx), layers.centred(w, zw)
    if x is None or weight is None or len(x.shape) != w.ndim:
        return False
    zero = raised(zx)
    shift = layers.folded(weight, bias, zero)
    if shift is None:
        return False
    multiplier = (tensor_of(sx).reshape(()) * tensor_of(sw) / tensor_of(sy).reshape(())).numpy()
    multiplier = np.broadcast_to(multiplier.reshape(-1), (len(w),)).astype(np.float32)
    name, low, high = limits(b, node.outputs[0], zy)
    y = b.new(name, True, zy.dtype == np.int8)
    _window_layer(b, node, x, y, weight, shift, multiplier, (zero, raised(zy), low, high))
    return True


def _window_layer(
    b: Builder, node: Node, x: Held, y: Held, weight: Array, bias: Array, multiplier: Array, codes: tuple[int, int, int, int]
) -> None:  # fmt: skip
    """A convolution, its edges added before."""
    attrs: Mapping[str, Any] = node.attrs
    space = weight.ndim - 2
    strides, dilations = plane(attrs.get("strides", [1] * space)), plane(attrs.get("dilations", [1] * space))
    begin, end = edges(attrs, x.shape[2:], weight.shape[2:])
    weight = weight if space == 2 else weight[:, :, None]
    zero, made, low, high = codes
    given, copied = _edged(b, x, begin, end, zero)
    high_in, wide_in = plane(given.shape[2:])
    high_out, wide_out = plane(y.shape[2:])
    n, channels, outputs, groups = x.shape[0], x.shape[1], len(weight), attrs.get("group", 1)
    shape = [n, high_in, wide_in, channels, high_out, wide_out, *strides]
    x_slot, y_slot = given.room.slot, y.room.slot
    if groups == channels == outputs and groups > 1:
        p = layers.depthwise(weight, bias, multiplier, wide_in, channels, dilations)
        parts = [b.keep(v) for v in (p.offsets, p.weight, p.bias, p.multiplier)]
        b.plan.depthwise(x_slot, y_slot, [*shape, len(p.offsets)], *parts, made, low, high)
    else:
        inside, rows = channels // groups, outputs // groups
        for group in range(groups):
            own = slice(group * rows, (group + 1) * rows)
            p = layers.dense(weight[own], bias[own], multiplier[own], wide_in, channels, dilations)
            parts = [b.keep(v) for v in (p.offsets, p.weight, p.bias, p.multiplier)]
            whole = [*shape, group * inside, rows, group * rows, outputs, len(p.offsets), p.quads]
            b.plan.convolution(x_slot, y_slot, whole, *parts, made, low, high, False)
    if copied:
        b.rooms.leave(given.room)


def _edged(b: Builder, x: Held, begin: list[int], end: list[int], fill: int) -> tuple[Held, bool]:
    """A value with pixels around it, channels last, and whether it is a copy."""
    if not any((*begin, *end)):
        return b.ordered(x, True)
    space = tuple(size + f + t for size, f, t in zip(x.shape[2:], begin, end, strict=True))
    y = b.scratch((*x.shape[:2], *space), x, True)
    go = y.strides()
    to = sum(f * stride for f, stride in zip(begin, go[2:], strict=True))
    b.move(x, y, x.shape, x.strides(), go, 0, to, fill)
    return y, True


def _matrix(
    b: Builder, x: Held, name: str, weight: Array, bias: Array, multiplier: Array, end: tuple[int, int, int] | None, signed: bool
) -> None:  # fmt: skip
    """x (…, in) times weight (out, in)."""
    x, copied = b.ordered(x, False)
    y = b.new(name, end is not None, signed, last=False)
    p = layers.dense(weight[:, :, None, None], bias, multiplier, 1, weight.shape[1], (1, 1))
    parts = [b.keep(v) for v in (p.offsets, p.weight, p.bias, p.multiplier)]
    outputs, inside = weight.shape
    shape = [x.numel // inside, 1, 1, inside, 1, 1, 1, 1, 0, outputs, 0, outputs, 1, p.quads]
    b.plan.convolution(x.room.slot, y.room.slot, shape, *parts, *(end or (0, 0, 0)), end is None)
    if copied:
        b.rooms.leave(x.room)


def gemm(b: Builder, node: Node) -> bool:
    """QGemm with a constant weight, to codes or to float32."""
    inputs = [*node.inputs, *[""] * (9 - len(node.inputs))]
    grids, ends = numbers(b, *inputs[1:6]), numbers(b, *inputs[7:9]) if inputs[7] else []
    bias = b.constants.get(inputs[6]) if inputs[6] else None
    if (
        grids is None
        or ends is None
        or not float_arithmetic(node)
        or (inputs[6] and bias is None)
        or node.attrs.get("transA", 0)
    ):
        return False
    sx, zx, w, sw, zw = grids
    if w.ndim != 2 or not eight(zx, *ends[1:]) or sx.size != 1:
        return False
    transposed = node.attrs.get("transB", 0)
    x, weight = codes_of(b, inputs[0], zx), layers.centred(w if transposed else w.T, zw)
    if x is None or weight is None or x.shape[-1] != weight.shape[1]:
        return False
    shift = layers.folded(
        weight, None if bias is None else np.broadcast_to(bias.reshape(-1), (len(weight),)), raised(zx)
    )
    if shift is None or (bias is not None and bias.size not in (1, len(weight))):
        return False
    scale = node.attrs.get("alpha", 1.0) * tensor_of(sx).reshape(()) * tensor_of(sw).reshape(-1)
    if ends:
        scale = scale / tensor_of(ends[0]).reshape(())
    multiplier = np.broadcast_to(scale.float().numpy(), (len(weight),))
    if not ends:
        _matrix(b, x, node.outputs[0], weight, shift, multiplier, None, False)
        return True
    name, low, high = limits(b, node.outputs[0], ends[1])
    _matrix(b, x, name, weight, shift, multiplier, (raised(ends[1]), low, high), ends[1].dtype == np.int8)
    return True


def matmul(b: Builder, node: Node) -> bool:
    """QLinearMatMul with a constant matrix on the right."""
    grids = numbers(b, *node.inputs[1:8])
    if grids is None or not float_arithmetic(node):
        return False
    sx, zx, w, sw, zw, sy, zy = grids
    if w.ndim != 2 or not eight(zx, zy) or sx.size != 1 or sy.size != 1 or sw.ndim > 1:
        return False
    x, weight = codes_of(b, node.inputs[0], zx), layers.centred(w.T, zw)
    if x is None or weight is None or x.shape[-1] != weight.shape[1]:
        return False
    shift = layers.folded(weight, None, raised(zx))
    if shift is None:
        return False
    multiplier = (tensor_of(sx).reshape(()) * tensor_of(sw).reshape(-1) / tensor_of(sy).reshape(())).float().numpy()
    name, low, high = limits(b, node.outputs[0], zy)
    _matrix(
        b,
        x,
        name,
        weight,
        shift,
        np.broadcast_to(multiplier, (len(weight),)),
        (raised(zy), low, high),
        zy.dtype == np.int8,
    )
    return True
