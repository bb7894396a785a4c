"""Convolutions and products of matrices as native steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from arrondi.graph.codes import tensor_of
from arrondi.graph.compiled import layers
from arrondi.graph.compiled.asks import Ending, codes_of, eight, ending, limits, numbers, plane, raised
from arrondi.graph.compiled.builder import Builder
from arrondi.graph.compiled.room import Held
from arrondi.graph.ir import ARITHMETIC, Node
from arrondi.graph.requantize import multiplier_of
from arrondi.graph.windows import edges

Array = np.ndarray


@dataclass(frozen=True)
class _Layer:
    """A product with a constant weight.

    Attributes:
        x: what it reads.
        zero: the zero point of x in memory.
        weight: (out, …) int8, centred.
        bias: int32, with the zero point in it.
        ending: its multipliers.
        name, made, signed: the output, its zero point, smallest and largest code in memory, and whether codes are signed; without
            `made` the output is float32.
    """

    x: Held
    zero: int
    weight: Array
    bias: Array
    ending: Ending
    name: str
    made: tuple[int, int, int] | None
    signed: bool = False


def _layer(
    b: Builder, node: Node, x: str, zx: Array, weight: Array, zw: Array, bias: Array | None, scale: torch.Tensor,
    output: tuple[str, Array | None],
) -> _Layer | None:  # fmt: skip
    """A layer if the kernels take it.

    Args:
        weight: (out, …).
        scale: what multiplies the sums; one, or one for each output.
        output: its name, and the zero point of its codes; None: it is float32.
    """
    if (
        not eight(zx)
        or (bias is not None and bias.size not in (1, len(weight)))
        or scale.numel() not in (1, len(weight))
    ):
        return None
    held, centred = codes_of(b, x, zx), layers.centred(weight, zw)
    if held is None or centred is None:
        return None
    spread = None if bias is None else np.broadcast_to(bias.reshape(-1), (len(weight),))
    shift, last = layers.folded(centred, spread, raised(zx)), ending(node, scale, len(weight))
    if shift is None or last is None:
        return None
    name, zy = output
    if zy is None:
        return _Layer(held, raised(zx), centred, shift, last, name, None)
    name, low, high = limits(b, name, zy)
    return _Layer(held, raised(zx), centred, shift, last, name, (raised(zy), low, high), zy.dtype == np.int8)


def conv(b: Builder, node: Node) -> bool:
    """QLinearConv of one or two axes of space."""
    grids = numbers(b, *node.inputs[1:8])
    with_bias = len(node.inputs) > 8 and node.inputs[8]
    bias = b.constants.get(node.inputs[8]) if with_bias else None
    if grids is None or (with_bias and bias is None):
        return False
    sx, zx, w, sw, zw, sy, zy = grids
    if not _slides(b, node, w) or not eight(zy) or sx.size != 1 or sy.size != 1:
        return False
    scale = multiplier_of(tensor_of(sx), tensor_of(sw), tensor_of(sy), node.attrs.get(ARITHMETIC, "float"))
    layer = _layer(b, node, node.inputs[0], zx, w, zw, bias, scale, (node.outputs[0], zy))
    if layer is not None:
        _window_layer(b, node.attrs, layer)
    return layer is not None


def _slides(b: Builder, node: Node, weight: Array) -> bool:
    """Whether a weight slides along one or two axes of its input."""
    shape = b.shapes[node.inputs[0]][0] if node.inputs[0] in b.shapes else ()
    return weight.ndim in (3, 4) and len(shape) == weight.ndim


def _window_layer(b: Builder, attrs: Mapping[str, Any], layer: _Layer) -> None:
    """A convolution, its edges added before."""
    x, weight, space = layer.x, layer.weight, layer.weight.ndim - 2
    strides, dilations = plane(attrs.get("strides", [1] * space)), plane(attrs.get("dilations", [1] * space))
    begin, end = edges(attrs, x.shape[2:], weight.shape[2:])
    weight = weight if space == 2 else weight[:, :, None]
    y = b.new(layer.name, layer.made is not None, layer.signed)
    given, copied = _edged(b, x, begin, end, layer.zero)
    high, wide = plane(given.shape[2:])
    n, channels, outputs, groups = x.shape[0], x.shape[1], len(weight), attrs.get("group", 1)
    shape = [n, high, wide, channels, *plane(y.shape[2:]), *strides]
    codes = [*(layer.made or (0, 0, 0)), layer.ending.how]
    slots, floats = (given.room.slot, y.room.slot), layer.made is None
    if groups == channels == outputs and groups > 1 and not floats:
        p = layers.depthwise(weight, layer.bias, layer.ending.multiplier, wide, channels, dilations)
        b.plan.depthwise(*slots, [*shape, len(p.offsets)], *_kept(b, p), codes)
    else:
        inside, rows = channels // groups, outputs // groups
        for group in range(groups):
            own = slice(group * rows, (group + 1) * rows)
            p = layers.dense(weight[own], layer.bias[own], layer.ending.multiplier[own], wide, channels, dilations)
            whole = [*shape, group * inside, rows, group * rows, outputs, len(p.offsets), p.quads]
            b.plan.convolution(*slots, whole, *_kept(b, p), codes, floats)
    if copied:
        b.rooms.leave(given.room)


def _kept(b: Builder, p: layers.Packed) -> list[int]:
    return [b.keep(v) for v in (p.offsets, p.weight, p.bias, p.multiplier)]


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


def _matrix(b: Builder, layer: _Layer) -> bool:
    """x (…, in) times a weight (out, in)."""
    if layer.x.shape[-1] != layer.weight.shape[1]:
        return False
    x, copied = b.ordered(layer.x, False)
    y = b.new(layer.name, layer.made is not None, layer.signed, last=False)
    outputs, inside = layer.weight.shape
    p = layers.dense(layer.weight[:, :, None, None], layer.bias, layer.ending.multiplier, 1, inside, (1, 1))
    shape = [x.numel // inside, 1, 1, inside, 1, 1, 1, 1, 0, outputs, 0, outputs, 1, p.quads]
    codes = [*(layer.made or (0, 0, 0)), layer.ending.how]
    b.plan.convolution(x.room.slot, y.room.slot, shape, *_kept(b, p), codes, layer.made is None)
    if copied:
        b.rooms.leave(x.room)
    return True


def gemm(b: Builder, node: Node) -> bool:
    """QGemm with a constant weight, to codes or to float32."""
    inputs = [*node.inputs, *[""] * (9 - len(node.inputs))]
    grids, ends = numbers(b, *inputs[1:6]), numbers(b, *inputs[7:9]) if inputs[7] else []
    bias = b.constants.get(inputs[6]) if inputs[6] else None
    if grids is None or ends is None or (inputs[6] and bias is None) or node.attrs.get("transA", 0):
        return False
    sx, zx, w, sw, zw = grids
    if w.ndim != 2 or sx.size != 1 or (ends and not eight(ends[1])):
        return False
    first = node.attrs.get("alpha", 1.0) * tensor_of(sx).reshape(())
    scale = (
        multiplier_of(first, tensor_of(sw), tensor_of(ends[0]), node.attrs.get(ARITHMETIC, "float"))
        if ends
        else first * tensor_of(sw)
    )
    weight = w if node.attrs.get("transB", 0) else w.T
    layer = _layer(b, node, inputs[0], zx, weight, zw, bias, scale, (node.outputs[0], ends[1] if ends else None))
    return layer is not None and _matrix(b, layer)


def matmul(b: Builder, node: Node) -> bool:
    """QLinearMatMul with a constant matrix on the right."""
    grids = numbers(b, *node.inputs[1:8])
    if grids is None:
        return False
    sx, zx, w, sw, zw, sy, zy = grids
    if w.ndim != 2 or not eight(zy) or sx.size != 1 or sy.size != 1 or sw.ndim > 1:
        return False
    scale = tensor_of(sx).reshape(()) * tensor_of(sw) / tensor_of(sy).reshape(())
    layer = _layer(b, node, node.inputs[0], zx, w.T, zw, None, scale, (node.outputs[0], zy))
    return layer is not None and _matrix(b, layer)


def sums(b: Builder, node: Node) -> bool:
    """ConvInteger or MatMulInteger, a bias, Cast and Mul, as `lower` writes an integer product whose result goes on in float32."""
    inputs = [*node.inputs, *[""] * (4 - len(node.inputs))]
    w, zx = b.constants.get(inputs[1]), b.constants.get(inputs[2])
    zw = b.constants.get(inputs[3]) if inputs[3] else np.zeros((), np.int8)
    slides = node.op == "ConvInteger"
    if w is None or zx is None or zw is None or not (_slides(b, node, w) if slides else w.ndim == 2):
        return False
    tail = _float_tail(b, node.outputs[0], w.ndim - 2 if slides else 0)
    if tail is None:
        return False
    bias, scale, name, passed = tail
    layer = _layer(b, node, inputs[0], zx, w if slides else w.T, zw, bias, tensor_of(scale), (name, None))
    if layer is None or (not slides and layer.x.shape[-1] != w.shape[0]):
        return False
    b.skipped = passed
    if slides:
        _window_layer(b, node.attrs, layer)
        return True
    return _matrix(b, layer)


def _float_tail(b: Builder, name: str, space: int) -> tuple[Array | None, Array, str, set[str]] | None:
    """Bias, step and output of the nodes after integer sums, and these nodes."""
    bias, passed, at = None, set(), b.graph.only_reader(name)
    if at is not None and at.op == "Add" and at.inputs[0] == name:
        bias = b.constants.get(at.inputs[1])
        if bias is None or bias.dtype != np.int32 or not _by_output(bias, space):
            return None
        passed.add(at.name)
        name = at.outputs[0]
        at = b.graph.only_reader(name)
    if at is None or at.op != "Cast" or at.attrs.get("to") != 1:
        return None
    passed.add(at.name)
    name = at.outputs[0]
    at = b.graph.only_reader(name)
    step = b.constants.get(at.inputs[1]) if at is not None and at.op == "Mul" and at.inputs[0] == name else None
    if at is None or step is None or step.dtype != np.float32 or not _by_output(step, space):
        return None
    return bias, step, at.outputs[0], {*passed, at.name}


def _by_output(values: Array, space: int) -> bool:
    """Whether numbers go along the outputs, with so many axes of space behind them."""
    return values.size == 1 or (values.ndim == space + 1 and values.size == len(values))
