"""Rounding to steps that are learned: what training with quantization in mind and training in few bits both need.

Owns: `first_step`, `lsq`, `step_slope`, and `even_stride`, how a sample is taken.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

_SAMPLE: Final = 1 << 15
_TRIED: Final = 24
_RATIO: Final = 4
"""First steps that are tried for each factor of two."""

_LEAST: Final = 2.0**-100
"""Numbers below it count as zeros."""


def even_stride(total: int, count: int) -> int:
    """A step through `total` things by which about `count` of them are looked at: it has no factor in common with the total, so
    no axis is seen at some of its places only."""
    stride = max(total // max(count, 1), 1)
    while math.gcd(stride, total) > 1:
        stride += 1
    return stride


def first_step(x: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """The step that a learned one begins with: of 24 in even ratios the one that changes x least.

    LSQ begins with 2 mean|x| / √highest (Esser et al., 2020, arXiv:1902.08153). With 4 bits that is almost twice the best step of normal and of
    uniform numbers, and a short training does not come back from it.

    Args:
        x: any shape, floating; some of it is looked at.
        lowest, highest: codes.

    Returns:
        () float32; 0 where nothing of x is finite and above 0.
    """
    some = x.detach().reshape(-1)[:: even_stride(x.numel(), _SAMPLE)].float()
    some = some[torch.isfinite(some)]
    largest = some.abs().amax() if some.numel() else some.new_zeros(())
    tried = [largest / highest * 2 ** (-i / _RATIO) for i in range(_TRIED)]
    lost = [((some / step).round_().clamp_(lowest, highest) * step - some).square_().sum() for step in tried]
    return torch.stack(tried)[torch.stack(lost).argmin()] if bool(largest > _LEAST) else torch.zeros_like(largest)


def step_slope(
    there: torch.Tensor, codes: torch.Tensor, slope: torch.Tensor, lowest: int, highest: int, numel: int = 0
) -> torch.Tensor:
    """The gradient of a learned step, scaled by 1 / √(numel · highest) as LSQ does.

    Args:
        there: x / step.
        codes: clip(round(there)).
        slope: gradient of codes · step. All of one shape.
        lowest, highest: codes.
        numel: of the whole tensor, where this is a part of it.

    Returns:
        () float32.
    """
    inside = (there > lowest) & (there < highest)
    by_step = torch.where(inside, codes - there, codes)
    return (slope * by_step).sum() / math.sqrt(max(numel or there.numel(), 1) * highest)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, step: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
        there = x / step
        codes = there.clamp(lowest, highest).round()
        ctx.save_for_backward(there, codes)
        ctx.range = (lowest, highest)
        return codes * step

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        there, codes = ctx.saved_tensors
        lowest, highest = ctx.range
        inside = (there > lowest) & (there < highest)
        return slopes[0] * inside, step_slope(there, codes, slopes[0], lowest, highest), None, None


def lsq(x: torch.Tensor, step: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """x rounded to a learned step: clip(round(x / step), lowest, highest) · step (Esser et al., 2020, arXiv:1902.08153).

    Args:
        x: any shape, float32.
        step: () float32, positive; its gradient is scaled by 1 / √(numel · highest).
        lowest, highest: codes.
    """
    result: torch.Tensor = _Learned.apply(x, step, lowest, highest)
    return result
