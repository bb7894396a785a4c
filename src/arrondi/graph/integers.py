"""Operators that compute with integer codes, in PyTorch: ONNX's QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger, and ONNX Runtime's
QLinearAdd, QLinearMul, QLinearAveragePool, QLinearGlobalAveragePool, QLinearConcat and QGemm.

Sums are exact: products of codes are added in float64, whose 53 bits hold every int32. `ARITHMETIC` among a node's attributes says how
sums become codes (see `requantize`); "float", the default, is bit for bit what ONNX Runtime computes on x86.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch

from arrondi.graph.ir import ARITHMETIC, Unusual
from arrondi.graph.requantize import Arithmetic, add_codes, requantize
from arrondi.graph.windows import average_pool, conv

Tensor = torch.Tensor
Attrs = Mapping[str, Any]

_RANGE: Final = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def _how(attrs: Attrs) -> Arithmetic:
    return cast(Arithmetic, attrs.get(ARITHMETIC, "float"))


def _multiplier(attrs: Attrs, sx: Tensor, sw: Tensor, sy: Tensor) -> Tensor:
    """S_x · S_w / S_y: in float32, or, as TFLite prepares fixed-point multipliers, in float64; S_x · S_w of a tensor is a float32 product there."""
    sx, sy = sx.reshape(()), sy.reshape(())
    if _how(attrs) == "float":
        return sx * sw / sy
    return (sx * sw).double() / sy.double() if sw.numel() == 1 else sx.double() * sw.double() / sy.double()


def _along(part: Tensor, ndim: int, axis: int) -> Tensor:
    """A scale or zero point for each index of an axis, or one for all."""
    return part.reshape(()) if part.numel() == 1 else part.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def _centred(codes: Tensor, zero: Tensor | None, axis: int = 0) -> Tensor:
    x = codes.double()
    return x if zero is None else x - _along(zero, codes.ndim, axis).double()


def _fit(codes: Tensor, kind: torch.dtype) -> Tensor:
    low, high = _RANGE[kind]
    return codes.clamp(low, high).to(kind)


def conv_integer(attrs: Attrs, x: Tensor, w: Tensor, zx: Tensor | None = None, zw: Tensor | None = None) -> Tensor:
    """Σ (x − Z_x)(w − Z_w) of a convolution, int32. What lies beyond the edges counts as Z_x."""
    return conv(attrs, _centred(x, zx), _centred(w, zw)).to(torch.int32)


def matmul_integer(attrs: Attrs, a: Tensor, b: Tensor, za: Tensor | None = None, zb: Tensor | None = None) -> Tensor:
    """Σ (a − Z_a)(b − Z_b), int32; zero points of one number, of a's rows, of b's columns, or as the specification's batches have them."""
    rows = (
        a.double()
        if za is None
        else a.double() - (za.double() if za.ndim != 1 or za.numel() == 1 else za.double()[:, None])
    )
    return torch.matmul(rows, b.double() if zb is None else b.double() - zb.double()).to(torch.int32)  # fmt: skip


def qlinear_conv(
    attrs: Attrs, x: Tensor, sx: Tensor, zx: Tensor, w: Tensor, sw: Tensor, zw: Tensor, sy: Tensor, zy: Tensor, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A convolution from codes to codes; bias int32 of scale S_x · S_w."""
    sums = conv(attrs, _centred(x, zx), _centred(w, zw), None if bias is None else bias.double())
    multiplier = _along(_multiplier(attrs, sx, sw, sy), sums.ndim, 1)
    return requantize(sums, multiplier, zy, *_RANGE[zy.dtype], _how(attrs)).to(zy.dtype)


def qlinear_matmul(
    attrs: Attrs, a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor
) -> Tensor:
    """A product of matrices from codes to codes."""
    sums = matmul_integer(attrs, a, b, za, zb)
    scale = (sa if sa.ndim != 1 or sa.numel() == 1 else sa[:, None]) * sb / sy
    return requantize(sums, scale.float(), zy, *_RANGE[zy.dtype], _how(attrs)).to(zy.dtype)


def qgemm(
    attrs: Attrs, a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, c: Tensor | None = None,
    sy: Tensor | None = None, zy: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A · B + C of codes; bias int32 of scale S_a · S_b. To float32 where no output grid is given."""
    a = a.mT if attrs.get("transA", 0) else a
    transposed = attrs.get("transB", 0)
    weight = _centred(b, zb, 0 if transposed else 1)
    sums = torch.matmul(_centred(a, za), weight.mT if transposed else weight)
    sums = sums if c is None else sums + c.double()
    if sy is None or zy is None:
        return sums.to(torch.float32) * (attrs.get("alpha", 1.0) * sa.reshape(()) * _along(sb, 2, 1))
    scale = attrs.get("alpha", 1.0) * _along(_multiplier(attrs, sa, sb, sy), 2, 1)
    return requantize(sums, scale, zy, *_RANGE[zy.dtype], _how(attrs)).to(zy.dtype)


def qlinear_add(
    attrs: Attrs, a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor
) -> Tensor:
    """The sum of two values from codes to codes."""
    scales, zeros = (float(sa), float(sb), float(sy)), (int(za), int(zb), int(zy))
    return _fit(add_codes(a, b, scales, zeros, _how(attrs)), zy.dtype)


def qlinear_mul(
    attrs: Attrs, a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor
) -> Tensor:
    """The product of two values from codes to codes."""
    product = (a.int() - za.int()) * (b.int() - zb.int())
    scale = (sa * sb / sy).reshape(())
    if _how(attrs) != "float":
        return requantize(product, scale, zy, *_RANGE[zy.dtype], _how(attrs)).to(zy.dtype)
    return _fit(torch.round(product.float() * scale + zy.float()), zy.dtype)


def qlinear_global_average(attrs: Attrs, x: Tensor, sx: Tensor, zx: Tensor, sy: Tensor, zy: Tensor) -> Tensor:
    """The mean over space from codes to codes."""
    if attrs.get("channels_last", 0):
        raise Unusual("channels last")
    space = tuple(range(2, x.ndim))
    count = x[0, 0].numel()
    sums = x.long().sum(space, keepdim=True) - count * int(zx)
    scale = sx.reshape(()) / (sy.reshape(()) * count)
    return requantize(sums, scale, zy, *_RANGE[zy.dtype], _how(attrs)).to(zy.dtype)


def qlinear_average(attrs: Attrs, x: Tensor, sx: Tensor, zx: Tensor, sy: Tensor, zy: Tensor | None = None) -> Tensor:
    """The mean of windows from codes to codes: by way of float32 as ONNX Runtime does, or, on one grid, of the codes with halves away
    from zero as TFLite does."""
    zero = torch.zeros((), dtype=x.dtype) if zy is None else zy
    if _how(attrs) != "float" and float(sx) == float(sy) and int(zx) == int(zero):
        exact = average_pool(attrs, x.double())
        return _fit(torch.trunc(exact + torch.copysign(torch.full_like(exact, 0.5), exact)), zero.dtype)
    mean = average_pool(attrs, (x.float() - zx.float()) * sx)
    return _fit(torch.round(mean / sy + zero.float()), zero.dtype)


def qlinear_concat(attrs: Attrs, sy: Tensor, zy: Tensor, *parts: Tensor) -> Tensor:
    """Values joined on the grid of the output; `parts` are codes, scale and zero point of each."""
    joined = []
    for codes, scale, zero in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        same = float(scale) == float(sy) and int(zero) == int(zy)
        value = (codes.float() - zero.float()) * scale
        joined.append(codes if same else _fit(torch.round(value / sy) + zy.float(), zy.dtype))
    return torch.cat(joined, attrs["axis"])
