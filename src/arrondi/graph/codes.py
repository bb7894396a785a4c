"""ONNX's quantizers in PyTorch: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear and a value rounded to a grid.

Codes of fewer than eight bits are held in bytes; the name of their type goes with the node as the attribute `codes`.
Source: the ONNX operator specification, operator sets 13 to 23: x / scale, rounded half to even, plus the zero point, saturated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from arrondi.formats import get_format
from arrondi.tensor.encoding import nearest

Tensor = torch.Tensor

INTEGERS: Final[Mapping[str, tuple[int, int, torch.dtype]]] = {
    "uint2": (0, 3, torch.uint8), "int2": (-2, 1, torch.int8), "uint4": (0, 15, torch.uint8), "int4": (-8, 7, torch.int8),
    "uint8": (0, 255, torch.uint8), "int8": (-128, 127, torch.int8), "uint16": (0, 65535, torch.int32),
    "int16": (-32768, 32767, torch.int16), "int32": (-(2**31), 2**31 - 1, torch.int32),
}  # fmt: skip
"""Type → smallest and largest code, and the type that holds them here."""


def tensor_of(values: np.ndarray) -> Tensor:
    """An array as a tensor; types that PyTorch does not have in the next one that holds their numbers."""
    values = np.asarray(values)
    name = values.dtype.name
    if name in INTEGERS:
        return torch.from_numpy(values.astype(np.int64)).to(INTEGERS[name][2])
    if values.dtype.kind == "V" or name.startswith(("float8", "float4", "bfloat")):
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(np.array(values))


def spread(part: Tensor, x: Tensor, attrs: Mapping[str, Any]) -> Tensor:
    """A scale or zero point in a shape that goes with x: one for all, for every index of an axis, or for blocks along it."""
    if part.numel() == 1:
        return part.reshape(())
    axis = attrs.get("axis", 1) % x.ndim
    if attrs.get("block_size", 0):
        return part.repeat_interleave(attrs["block_size"], axis).narrow(axis, 0, x.shape[axis])
    return part.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


FLOATS: Final[Mapping[str, str]] = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "float4_e2m1fn": "fp4_e2m1"}
"""Type of ONNX whose codes are small floats → our format of the same values."""


def quantize(attrs: Mapping[str, Any], x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """x → codes; small floats are held as the numbers that they mean."""
    small = FLOATS.get(attrs.get("codes", "uint8"))
    if small is not None:
        return nearest(x.float() / spread(scale, x, attrs).float(), get_format(small))
    low, high, held = INTEGERS[attrs.get("codes", "uint8")]
    codes = torch.round(x / spread(scale, x, attrs).to(x.dtype))
    if zero is not None:
        codes = codes + spread(zero, x, attrs).to(x.dtype)
    return codes.clamp(low, high).to(held)


def dequantize(attrs: Mapping[str, Any], codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Codes → numbers of the scale's type."""
    whole = codes.to(scale.dtype) if codes.dtype.is_floating_point else codes.to(torch.int32)
    if zero is not None:
        whole = whole - spread(zero, codes, attrs).to(whole.dtype)
    return whole.to(scale.dtype) * spread(scale, codes, attrs)


def rounded(attrs: Mapping[str, Any], x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """x on its grid, whose codes may be limited to `low` … `high`; the gradient passes where x lies within the grid's range.

    Without a grid: that which spans x and zero, beyond which nothing lies.
    """
    if scale is None or zero is None:
        given = dequantize(attrs, *dynamic(attrs, x.detach()))
        return x + (given - x).detach() if x.requires_grad else given
    low, high, _ = INTEGERS[attrs["codes"]]
    low, high = attrs.get("low", low), attrs.get("high", high)
    step, center = spread(scale, x, attrs), spread(zero, x, attrs).to(x.dtype)
    codes = (torch.round(x / step) + center).clamp(low, high)
    given = (codes - center) * step
    if not x.requires_grad:
        return given
    clipped = torch.minimum(torch.maximum(x, (low - center) * step), (high - center) * step)
    return clipped + (given - clipped).detach()


def dynamic(attrs: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x → uint8 codes on the grid that spans x and zero, its scale and zero point."""
    low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
    return quantize({"codes": "uint8"}, x, scale, zero), scale, zero
