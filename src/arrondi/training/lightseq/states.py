"""Queries, keys and values with one learned clip, as an int8 cache holds them.

Owns: `StatesClip`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from arrondi.kernels.clipping import MOST, clip_codes, masked, widen
from arrondi.kernels.sides import extremes
from arrondi.training.first_batch import settle
from arrondi.training.lightseq.method import first_clip, positive
from arrondi.training.method import Layer


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        codes, beyond = clip_codes(rows, positive(clip), marked=True)
        ctx.save_for_backward(codes, beyond)
        ctx.clip = clip.shape, clip.dtype
        unit = positive(clip) / MOST + 0 * extremes(rows)  # codes would hide what is not finite
        return widen(codes, unit, None, x.dtype).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        codes, beyond = ctx.saved_tensors
        shape, dtype = ctx.clip
        by_x, ends = masked(slope.reshape(codes.shape), beyond, codes)
        assert ends is not None
        return by_x.reshape(slope.shape), ends.sum().to(dtype).reshape(shape)


class StatesClip(nn.Module):
    """Rounds tensors to codes of a byte with one clip, learned by what lies beyond it; the first batch sets it."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.clip = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=like.device))
        self.layer = Layer(None, (0, 0), 0, {"clip": self.clip})

    def forward(self, *states: torch.Tensor) -> list[torch.Tensor]:
        """Each as numbers that a code has, in its own shape and type; gradients pass within the clip."""
        self.layer.learned = {"clip": self.clip}

        def find() -> dict[str, torch.Tensor]:
            return {"clip": first_clip(torch.stack([s.detach().abs().amax().float() for s in states]))}

        if not bool(self.clip != 0) or "begun" not in self.layer.kept:
            settle(self.layer, "begun", find, loaded=True)
        return [_Rounded.apply(s, self.clip) for s in states]
