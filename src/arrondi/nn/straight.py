"""Gradients that pass a rounding as if it were not there.

Owns: `straight`, `sign` and `step`. Source: Bengio, Léonard, Courville 2013, arXiv:1308.3432. Unlike `x + (y - x).detach()` the value is
`y` bit for bit, so that what was trained and what is packed afterwards are one number.
"""

from __future__ import annotations

from typing import Any

import torch


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: torch.Tensor, value: torch.Tensor, window: float | None) -> torch.Tensor:
        ctx.window = window
        ctx.save_for_backward(*(() if window is None else (latent.detach().abs() <= window,)))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (grad,) = grads
        return (grad if ctx.window is None else grad * ctx.saved_tensors[0]), None, None


def straight(latent: torch.Tensor, value: torch.Tensor, window: float | None = None) -> torch.Tensor:
    """`value`, whose gradient goes to `latent`.

    Args:
        latent: any shape, any float dtype.
        value: the same shape; its own history is not followed.
        window: the gradient is 0 where |latent| is larger; None: it passes everywhere.
    """
    passed: torch.Tensor = _Straight.apply(latent, value.detach(), window)
    return passed


def sign(x: torch.Tensor, window: float | None = 1.0, *, at_zero: float = 1.0) -> torch.Tensor:
    """±1 for each number, of its dtype; the gradient passes where |x| ≤ window.

    Args:
        at_zero: the sign of zero. BiBERT says +1; the format `binary`, by which the inputs of a packed layer are rounded, says -1.
    """
    above = x >= 0 if at_zero > 0 else x > 0
    one = torch.ones((), dtype=x.dtype, device=x.device)
    return straight(x, torch.where(above, one, -one), window)


def step(x: torch.Tensor, window: float | None = 1.0) -> torch.Tensor:
    """1 where x ≥ 0, else 0 (also for NaN), of its dtype; the gradient passes where |x| ≤ window."""
    return straight(x, (x >= 0).to(x.dtype), window)
