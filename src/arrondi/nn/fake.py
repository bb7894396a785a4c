"""Rounding to steps that are learned: what training with quantization in mind and training in few bits both need.

Owns: `first_step`, `lsq`, `step_slope`.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def first_step(x: torch.Tensor, highest: int) -> torch.Tensor:
    """The step that a learned one begins with, 2 mean|x| / √highest (Esser et al., 2020, arXiv:1902.08153).

    Args:
        x: any shape, floating.
        highest: the largest code.

    Returns:
        () float32, positive.
    """
    return (2 * x.detach().float().abs().mean() / math.sqrt(highest)).clamp_min(torch.finfo(torch.float32).tiny * 2**20)


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
