"""Training in int8: all three products of a layer multiply 8-bit codes.

Owns: `INT8`, `INT8_UNIFIED`, `INT8_ADAPTIVE`. Activations and weights are rounded to nearest, gradients stochastically, so that
what is lost has no direction. What a gradient is clipped at is chosen in `clips`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from arrondi.kernels.sides import integer_product, round_codes, scaled
from arrondi.training.clips import channel_clips, deviation, sensitive_clip
from arrondi.training.geometry import Geometry
from arrondi.training.method import Arithmetic, Gradients, Layer, Passed, TrainingMethod, lanes, seed
from arrondi.training.scales import Rounded, inverse, rounded


@dataclass(frozen=True)
class Int8Options:
    """Of `int8`.

    Attributes:
        stochastic: round gradients stochastically; False: to nearest.
    """

    stochastic: bool = True


@dataclass(frozen=True)
class UnifiedOptions(Int8Options):
    """Of `int8-unified`.

    Attributes:
        period: steps after which the clip is searched for again.
        alpha, least: the learning rate's factor is max(exp(-alpha · deviation), least).
    """

    period: int = 100
    alpha: float = 20.0
    least: float = 0.1


@dataclass(frozen=True)
class AdaptiveOptions(Int8Options):
    """Of `int8-adaptive`.

    Attributes:
        share: of a channel's gradients beyond one standard deviation, above which the channel counts as bell-shaped.
        speed: A of the running clip s ← (1 - A) s + A max|g| of other channels.
    """

    share: float = 0.3
    speed: float = 0.8


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    layer: Layer,
    *,
    whole: bool = False,
) -> tuple[torch.Tensor, Passed]:
    """Products of codes, with one scale for each token and each output, or (`whole`) one for each side."""
    units = rounded(geometry.units(x), whole=whole)
    codes = units.codes.reshape(x.shape)
    of_weight = rounded(weight, whole=whole)
    sums = integer_product(geometry.matrix(codes), of_weight.codes)
    y = scaled(sums, geometry.spread(units.scale), of_weight.scale, bias, x.dtype)
    return y, Passed((codes, units.scale, *of_weight))


def _by_input(slopes: Rounded, weight: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """(rows, in) from codes of gradients (rows, out) and of the weight (out, in)."""
    return scaled(integer_product(slopes.codes, weight.T), slopes.scale, factor, None, torch.float32)


def _by_weight(slopes: Rounded, codes: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """(out, in) from codes of gradients (rows, out), with a scale for each output, and of x (rows, in)."""
    return scaled(integer_product(slopes.codes.T, codes.T), slopes.scale, factor, None, torch.float32)


def _backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    """Scales of what is summed over cannot leave the sum: the gradient takes them in before it is rounded."""
    codes, scale, of_weight, weight_scale = passed.whole
    noise = layer.options.stochastic
    by_x = by_weight = None
    if wanted[0]:
        tokens = rounded(slope, column=weight_scale, seed=seed() if noise else None)
        by_x = geometry.back(_by_input(tokens, of_weight, None))
    if wanted[1]:
        outputs = rounded(slope, row=geometry.spread(scale), by_column=True, seed=seed() if noise else None)
        by_weight = _by_weight(outputs, geometry.matrix(codes), None)
    return by_x, by_weight, {}


def _clipped(slope: torch.Tensor, clip: torch.Tensor, by_column: bool, noise: bool) -> Rounded:
    """Gradients as codes with a scale for each row, or each column, of which the largest code is the clip."""
    scale = clip / 127
    there = inverse(scale)
    row, column = (None, there) if by_column else (there, None)
    return Rounded(round_codes(slope, row=row, column=column, seed=seed() if noise else None), scale)


def _unified_backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    """One clip for the layer, by the direction of what is left; it is kept as a share of the largest gradient, which a
    loss scale does not change."""
    codes, scale, of_weight, weight_scale = passed.whole
    options: UnifiedOptions = layer.options
    largest = slope.detach().float().abs().amax() if slope.numel() else slope.new_zeros((), dtype=torch.float32)
    count = layer.kept.get("steps", torch.zeros((), dtype=torch.int64))
    if int(count) % options.period == 0:
        layer.kept["clip"] = sensitive_clip(slope, largest)
    layer.kept["steps"] = count + 1
    clip = largest * layer.kept["clip"].to(largest.device)
    away = deviation(slope, clip)
    if bool(torch.isfinite(away)):
        layer.learning_rate = max(float(torch.exp(-options.alpha * away)), options.least)
    slopes = _clipped(slope, clip.expand(slope.shape[0]), False, options.stochastic)
    by_x = by_weight = None
    if wanted[0]:
        by_x = geometry.back(_by_input(slopes, of_weight, weight_scale[:1].expand(of_weight.shape[1])))
    if wanted[1]:
        matrix = geometry.matrix(codes)
        outputs = Rounded(slopes.codes, (clip / 127).expand(slope.shape[1]))
        by_weight = _by_weight(outputs, matrix, scale[:1].expand(matrix.shape[1]))
    return by_x, by_weight, {}


def _adaptive_backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    """A clip for each output in the product that keeps outputs apart, and one for all in the one that sums over them."""
    codes, scale, of_weight, weight_scale = passed.whole
    options: AdaptiveOptions = layer.options
    by_x = by_weight = None
    if wanted[0]:
        tokens = rounded(slope, whole=True, seed=seed() if options.stochastic else None)
        by_x = geometry.back(_by_input(tokens, of_weight, weight_scale[:1].expand(of_weight.shape[1])))
    if wanted[1]:
        clips = channel_clips(slope, layer.kept.get("clips"), options.share, options.speed)
        layer.kept["clips"] = clips
        matrix = geometry.matrix(codes)
        outputs = _clipped(slope, clips, True, options.stochastic)
        by_weight = _by_weight(outputs, matrix, scale[:1].expand(matrix.shape[1]))
    return by_x, by_weight, {}


def _arithmetic(layer: Layer, device: str) -> Arithmetic:
    way = f"int8 × int8 → int32{lanes(device)}"
    return way, way, way


INT8: Final = TrainingMethod(
    "int8",
    "Activations and gradients by token, weights by output; gradients rounded stochastically.",
    "the plain baseline; Jetfire and others refine it (Xi et al., 2024, arXiv:2403.12422)",
    Int8Options,
    _forward,
    _backward,
    _arithmetic,
)

INT8_UNIFIED: Final = TrainingMethod(
    "int8-unified",
    "Gradients clipped where their direction changes least; the learning rate shrinks with what is lost.",
    "Zhu et al., 2020, arXiv:1912.12607",
    UnifiedOptions,
    partial(_forward, whole=True),
    _unified_backward,
    _arithmetic,
)

INT8_ADAPTIVE: Final = TrainingMethod(
    "int8-adaptive",
    "Gradients by output channel, clipped by the shape of their distribution.",
    "Zhao et al., 2021, arXiv:2102.04782",
    AdaptiveOptions,
    partial(_forward, whole=True),
    _adaptive_backward,
    _arithmetic,
)
