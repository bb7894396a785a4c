"""From int32 sums to codes of eight bits, in three arithmetics: `requantize`, `add_codes`, `multiplier_of`, `shift_of`.

* "float": ONNX Runtime's. The sum as float32 times a float32 multiplier, rounded half to even.
* "double": TFLite's reference kernels (gemmlowp): a 32-bit multiplier with a doubling high product that rounds half away from zero, then a
  shift that rounds half away from zero: two roundings.
* "single": TFLite built with single rounding: one product of 64 bits, half a step added, one shift: half goes up.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.2; differences between the variants were measured (see the tests).
"""

from __future__ import annotations

import math
from typing import Final, Literal

import torch

Tensor = torch.Tensor
Arithmetic = Literal["float", "double", "single"]
ARITHMETICS: Final = ("float", "double", "single")

LEFT: Final = 20
"""Bits by which codes are shifted left before they are added in fixed point."""


def shift_of(multiplier: float) -> tuple[int, int]:
    """A positive real number as (m, e): m · 2^(e − 31) with m of 31 bits."""
    if multiplier <= 0.0:
        return 0, 0
    fraction, exponent = math.frexp(multiplier)
    whole = math.floor(fraction * 2.0**31 + 0.5)
    return (whole // 2, exponent + 1) if whole == 2**31 else (whole, exponent)


def multiplier_of(sx: Tensor, sw: Tensor, sy: Tensor, how: Arithmetic) -> Tensor:
    """S_x · S_w / S_y, S_w one or several: in float32, or, as TFLite prepares fixed-point multipliers, in float64, where the product with
    the one S_w of a tensor is a float32 one."""
    sx, sy = sx.reshape(()), sy.reshape(())
    if how == "float":
        return sx * sw / sy
    return (sx * sw).double() / sy.double() if sw.numel() == 1 else sx.double() * sw.double() / sy.double()


def _high_product(a: Tensor, b: Tensor) -> Tensor:
    """2 a b / 2³², rounded half away from zero, of 32-bit numbers held in 64 bits."""
    product = a * b
    nudge = torch.where(product >= 0, 1 << 30, 1 - (1 << 30))
    return torch.div(product + nudge, 1 << 31, rounding_mode="trunc").clamp(max=2**31 - 1)


def _shift_right(x: Tensor, by: Tensor) -> Tensor:
    """x / 2^by, rounded half away from zero."""
    mask = (1 << by) - 1
    rest = x & mask
    limit = (mask >> 1) + (x < 0).long()
    return (x >> by) + (rest > limit).long()


def times(x: Tensor, m: Tensor, e: Tensor, how: Arithmetic) -> Tensor:
    """x · m · 2^(e − 31) in fixed point, int64 holding 32 bits; m and e broadcast against x."""
    x, m, e = x.long(), m.long(), e.long()
    if how == "single":
        shift = 31 - e
        return (x * m + (1 << (shift - 1))) >> shift
    left, right = e.clamp(min=0), (-e).clamp(min=0)
    return _shift_right(_high_product((x << left).clamp(-(2**31), 2**31 - 1), m), right)


def requantize(
    sums: Tensor, multiplier: Tensor, zero: Tensor, low: int, high: int, how: Arithmetic = "float"
) -> Tensor:
    """Sums → codes.

    Args:
        sums: integers of any shape, in any type that holds them.
        multiplier: float32, or float64 for fixed point, S_x · S_w / S_y; broadcasts against the sums.
        zero: the output's zero point.
        low, high: smallest and largest code; a fused activation narrows them.

    Returns:
        int32 codes.
    """
    center = int(zero)
    if how == "float":
        return (torch.round(sums.to(torch.float32) * multiplier) + center).clamp(low, high).to(torch.int32)
    pairs = [shift_of(float(v)) for v in multiplier.double().reshape(-1)]
    m, e = (torch.tensor(part).reshape(multiplier.shape) for part in zip(*pairs, strict=True))
    return (times(sums, m, e, how) + center).clamp(low, high).to(torch.int32)


def add_codes(
    a: Tensor, b: Tensor, scales: tuple[float, float, float], zeros: tuple[int, int, int], how: Arithmetic
) -> Tensor:
    """The sum of two values given as codes, not yet clipped.

    Args:
        a, b: codes that broadcast.
        scales, zeros: of a, b and the sum.

    Returns:
        int64 codes, zero point added.
    """
    if how == "float":
        return _add_float(a, b, scales, zeros)
    largest = 2.0 * max(scales[0], scales[1])
    parts = []
    for codes, scale, zero in zip((a, b), scales, zeros, strict=False):
        m, e = (torch.tensor(v) for v in shift_of(scale / largest))
        parts.append(times((codes.long() - zero) << LEFT, m, e, how))
    m, e = (torch.tensor(v) for v in shift_of(largest / ((1 << LEFT) * scales[2])))
    return times(parts[0] + parts[1], m, e, how) + zeros[2]


def _add_float(a: Tensor, b: Tensor, scales: tuple[float, float, float], zeros: tuple[int, int, int]) -> Tensor:
    """As ONNX Runtime does: everything that is constant in one float32 number, then two fused products."""
    one = torch.tensor(scales, dtype=torch.float32)
    of_a, of_b = one[0] / one[2], one[1] / one[2]
    zero = torch.tensor(zeros, dtype=torch.float32)
    fixed = zero[2] - (of_a * zero[0] + of_b * zero[1])
    if a.numel() == 1 or b.numel() == 1:  # a number for all goes into the constant, unfused
        (codes, by), (alone, times_) = ((b, of_b), (a, of_a)) if a.numel() == 1 else ((a, of_a), (b, of_b))
        fixed = fixed + alone.to(torch.float32) * times_
        return torch.round(_fused(codes, by, fixed)).long()
    return torch.round(_fused(a, of_a, _fused(b, of_b, fixed))).long()


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x · y + z with one rounding to float32: x has so few bits that float64 holds the product exactly."""
    return (x.double() * y.double() + z.double()).float()
