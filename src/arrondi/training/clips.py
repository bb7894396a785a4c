"""At which size gradients are clipped before they become int8.

Owns: `deviation`, `sensitive_clip`, `channel_clips`.
"""

from __future__ import annotations

import math
from typing import Final

import torch

_SAMPLE: Final = 1 << 18
"""Gradients that a search looks at, evenly spread."""

_CANDIDATES: Final = 20
_SMALLEST: Final = 0.05
_GOLDEN: Final = (math.sqrt(5) - 1) / 2
_SECTIONS: Final = 12
_FEW: Final = 256
"""Gradients of a channel below which their shape cannot be told."""


def deviation(slope: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
    """1 - cos of the angle between gradients and the same clipped and rounded to int8, () float32.

    Args:
        slope: any shape, floating.
        clip: (), above which everything is the largest code.
    """
    g = _sample(slope)
    step = clip / 127
    codes = (g / step).clamp(-127, 127).round()
    size = g.norm() * (codes * step).norm()
    away = 1 - (g * codes).sum() * step / size
    return torch.where(size > 0, away, torch.zeros_like(away)).clamp(0, 2)


def sensitive_clip(slope: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The share of the largest gradient at which clipping changes the direction least (Zhu et al., 2020, arXiv:1912.12607).

    The best of twenty shares in even ratios from 0.05 to 1, then a golden section between its neighbours.

    Args:
        slope: any shape, floating.
        largest: (), max |slope|.

    Returns:
        () float32 in [0.05, 1]; 1 where gradients are all zero or not finite.
    """
    if not bool(torch.isfinite(largest) & (largest > 0)):
        return torch.ones_like(largest)
    sample = _sample(slope)

    def away(share: float) -> float:
        return float(deviation(sample, largest * share))

    shares = [_SMALLEST ** (1 - i / (_CANDIDATES - 1)) for i in range(_CANDIDATES)]
    losses = [away(share) for share in shares]
    best = min(range(_CANDIDATES), key=losses.__getitem__)
    low, high = shares[max(best - 1, 0)], shares[min(best + 1, _CANDIDATES - 1)]
    for _ in range(_SECTIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if away(left) <= away(right):
            high = right
        else:
            low = left
    middle = (low + high) / 2
    return torch.full_like(largest, middle if away(middle) <= losses[best] else shares[best])


def channel_clips(slope: torch.Tensor, before: torch.Tensor | None, share: float, speed: float) -> torch.Tensor:
    """A clip for each channel's gradients by their shape (Zhao et al., 2021, arXiv:2102.04782).

    Bell-shaped channels are not clipped. The others, a sharp peak with long tails ("inverted T"), follow the largest one
    slowly, so that one of them alone does not make the step coarse.

    Args:
        slope: (rows, channels) floating.
        before: (channels,) clips of the step before; None at first.
        share: of gradients beyond one standard deviation, above which a channel is bell-shaped (a normal one has 0.317).
        speed: at which a clip moves.

    Returns:
        (channels,) float32.
    """
    g = slope.detach().float()
    if not g.numel():
        return g.new_zeros(g.shape[1])
    largest = g.abs().amax(0)
    if before is None:
        return largest
    spread = g.std(0, correction=0)
    bell = (g.abs() > spread).float().mean(0) > share if len(g) >= _FEW else torch.ones_like(largest, dtype=torch.bool)
    slow = (1 - speed) * before.to(largest) + speed * largest
    return torch.where(bell | ~torch.isfinite(slow), largest, slow)


def _sample(slope: torch.Tensor) -> torch.Tensor:
    flat = slope.detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLE, 1)].float()
