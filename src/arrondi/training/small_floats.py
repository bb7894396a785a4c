"""Training with small floats: block-scaled fp4, and fp8.

Owns: `MXFP4`, `FP8`, `blocks_of_fp4`. Values lie on the grids of these formats; their products are taken in float32, in which they
are exact, since no CPU multiplies such floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch.nn import functional as F

from arrondi.arguments import check_fields
from arrondi.kernels import hadamard
from arrondi.kernels.sides import later, round_codes
from arrondi.training.geometry import Geometry
from arrondi.training.method import Arithmetic, Gradients, Layer, Passed, TrainingMethod, padding, seed
from arrondi.training.scales import padded

_BLOCK: Final = 32
_STRIP: Final = 1 << 12
"""Blocks that are rounded at a time."""

_E2M1_MAX: Final = 6.0
_SMALLEST: Final = -126.0


@dataclass(frozen=True)
class Mxfp4Options:
    """Of `mxfp4`.

    Attributes:
        turn: a Hadamard transform of each block before it is rounded, with random signs on the way back.
        stochastic: round gradients stochastically; False: to nearest.
    """

    turn: bool = True
    stochastic: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Fp8Options:
    """Of `fp8`, which has none."""


def blocks_of_fp4(x: torch.Tensor, noise: int | None = None) -> torch.Tensor:
    """x on the grid of MXFP4: E2M1 with a power of two for each 32 numbers of a row (OCP Microscaling Formats 1.0).

    The power is the least one by which nothing is clipped, so that stochastic rounding has no bias.

    Args:
        x: (rows, width) float32; the width a multiple of 32.
        noise: seed of stochastic rounding; None rounds to nearest, ties to even.

    Returns:
        Of x's shape; NaN for a block in which something is not finite.
    """
    blocks = x.reshape(-1, _BLOCK)
    y = torch.empty_like(blocks)
    for start in range(0, len(blocks), _STRIP):  # strips stay in cache
        part = blocks[start : start + _STRIP]
        most = part.abs().amax(1, keepdim=True)
        power = torch.exp2((most / _E2M1_MAX).log2().ceil().clamp_min(_SMALLEST))
        there = part / power
        size = there.abs()
        unit = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        steps = round_codes(there / unit, lowest=-8, highest=8, seed=later(noise, start))
        torch.addcmul(0 * most, unit.mul_(power), steps, out=y[start : start + _STRIP])
    return y.reshape(x.shape)


def _sides(
    left: torch.Tensor, right: torch.Tensor, options: Mxfp4Options, *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, k) and (n, k) on the grid, blocks along what is summed over; the transforms of both cancel in the product."""
    left, right = padded(left.float(), _BLOCK), padded(right.float(), _BLOCK)
    if options.turn:
        if back:
            generator = torch.Generator().manual_seed(seed())
            signs = (2 * torch.randint(0, 2, (left.shape[1],), generator=generator) - 1).to(left)
            left, right = left * signs, right * signs
        left, right = (hadamard(side.reshape(-1, _BLOCK)).reshape(side.shape) for side in (left, right))
    noisy = back and options.stochastic
    return blocks_of_fp4(left, seed() if noisy else None), blocks_of_fp4(right, seed() if noisy else None)


def _mx_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, layer: Layer
) -> tuple[torch.Tensor, Passed]:
    left, right = _sides(geometry.matrix(x), weight, layer.options, back=False)
    y = F.linear(left, right, None if bias is None else bias.float())
    return y.to(x.dtype), Passed((x, weight))


def _mx_backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    x, weight = passed.whole
    by_x = by_weight = None
    if wanted[0]:
        left, right = _sides(slope, weight.T, layer.options, back=True)
        by_x = geometry.back(left @ right.T)
    if wanted[1]:
        left, right = _sides(slope.T, geometry.matrix(x).T, layer.options, back=True)
        by_weight = left @ right.T
    return by_x, by_weight, {}


def _cast(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp8 with its largest value at the largest of the type, and the scale ()."""
    most = x.detach().float().abs().amax() if x.numel() else torch.zeros((), device=x.device)
    scale = torch.where(most > 0, most / torch.finfo(dtype).max, torch.ones_like(most))
    return (x.float() / scale).to(dtype), scale


def _fp8_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, layer: Layer
) -> tuple[torch.Tensor, Passed]:
    values, scale = _cast(x, torch.float8_e4m3fn)
    of_weight, weight_scale = _cast(weight, torch.float8_e4m3fn)
    y = geometry.matrix(values.float()) @ of_weight.float().T * (scale * weight_scale)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype), Passed((values, scale, of_weight, weight_scale))


def _fp8_backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    values, scale, of_weight, weight_scale = passed.whole
    slopes, slope_scale = _cast(slope, torch.float8_e5m2)
    by_x = by_weight = None
    if wanted[0]:
        by_x = geometry.back(slopes.float() @ of_weight.float() * (slope_scale * weight_scale))
    if wanted[1]:
        by_weight = slopes.float().T @ geometry.matrix(values.float()) * (slope_scale * scale)
    return by_x, by_weight, {}


def _arithmetic(layer: Layer, device: str, *, forward: str, backward: str, block: int = 1) -> Arithmetic:
    outputs, inputs = layer.sums
    wide = padding("inputs", inputs, block), padding("outputs", outputs, block)
    return f"{forward} in float32{wide[0]}", f"{backward} in float32{wide[1]}", f"{backward} in float32"


MXFP4: Final = TrainingMethod(
    "mxfp4",
    "E2M1 with a power of two for 32 numbers in all three products; Hadamard transforms, stochastic gradients.",
    "Castro et al., 2025, arXiv:2505.14669; Ashkboos et al., 2025, arXiv:2501.02625",
    Mxfp4Options,
    _mx_forward,
    _mx_backward,
    partial(_arithmetic, forward="mxfp4 values", backward="mxfp4 values", block=_BLOCK),
)

FP8: Final = TrainingMethod(
    "fp8",
    "E4M3 forward, E5M2 for gradients, one scale for a tensor.",
    "Micikevicius et al., 2022, arXiv:2209.05433",
    Fp8Options,
    _fp8_forward,
    _fp8_backward,
    partial(_arithmetic, forward="e4m3 × e4m3 values", backward="e5m2 × e4m3 values"),
)
