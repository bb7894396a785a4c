"""Gradients through layers whose weight is packed.

Owns: `through`, the product of a packed layer in a graph of gradients. Nothing of the weight is kept between the two passes but the
codes: it is decoded again for the gradient and forgotten (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3). Inputs that
a layer rounds count as if they were not rounded, so their gradient passes straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arrondi.native import multiplies_bfloat16

Back = Callable[[torch.Tensor], torch.Tensor]
"""The gradient of y (..., out) → that of x (..., in), linear and differentiable."""


def wanted(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a call has to be recorded."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def through(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    product: Callable[[torch.Tensor], torch.Tensor],
    back: Back,
    axis: int = -1,
) -> torch.Tensor:
    """`product(x)`, with the gradients of x and of the bias.

    Args:
        x: (..., in).
        bias: which the product adds, None if it has none.
        product: gives (..., out), in the type of x; called once, unrecorded.
        back: of the weight; called once for each backward pass that needs the gradient of x.
        axis: of y, along which the bias lies.
    """
    y: torch.Tensor = _Through.apply(x, bias, product, back, axis)
    return y


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        product: Callable[[torch.Tensor], torch.Tensor],
        back: Back,
        axis: int,
    ) -> torch.Tensor:
        ctx.back, ctx.axis, ctx.kind = back, axis, x.dtype
        ctx.bias_kind = None if bias is None else bias.dtype
        return product(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        of_x = of_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = ctx.back(grad).to(ctx.kind)
            if ctx.needs_input_grad[1]:
                others = [i for i in range(grad.ndim) if i != ctx.axis % grad.ndim]
                of_bias = (grad.float() if grad.dtype.itemsize < 4 else grad).sum(others).to(ctx.bias_kind)
        return of_x, of_bias, None, None, None


def times(grad: torch.Tensor, weight: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """grad (..., out) @ W, where `weight(dtype)` decodes W (out, in)."""
    slow = dtype != torch.float64 and dtype.itemsize < 4 and grad.device.type == "cpu" and not multiplies_bfloat16()
    kind = torch.float32 if slow else dtype
    return grad.to(kind) @ weight(kind)
