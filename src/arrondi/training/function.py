"""A method's products in PyTorch's autograd.

Owns: `product`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from arrondi.training.geometry import Geometry
from arrondi.training.method import Layer, Passed, TrainingMethod


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        method: TrainingMethod,
        layer: Layer,
        geometry: Geometry,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *learned: torch.Tensor,
    ) -> torch.Tensor:
        y, passed = method.forward(geometry.points(x), geometry.weight(weight), bias, geometry, layer)
        ctx.method, ctx.layer, ctx.geometry = method, layer, geometry
        ctx.facts, ctx.types = passed.facts, (x.dtype, weight.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*passed.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        # What is learned of the input's side is found with the gradient of the input, which may not be asked for itself.
        wanted = (ctx.needs_input_grad[3] or any(ctx.needs_input_grad[6:]), ctx.needs_input_grad[4])
        passed = Passed(ctx.saved_tensors, ctx.facts)
        by_x, by_weight, by_learned = ctx.method.backward(slope, passed, ctx.geometry, ctx.layer, wanted)
        by_x = ctx.geometry.shaped(by_x).to(ctx.types[0]) if by_x is not None and ctx.needs_input_grad[3] else None
        if by_weight is not None:
            by_weight = ctx.geometry.like_weight(by_weight).to(ctx.types[1])
        by_bias = slope.float().sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return None, None, None, by_x, by_weight, by_bias, *(by_learned.get(name) for name in ctx.layer.learned)


def product(
    method: TrainingMethod,
    layer: Layer,
    geometry: Geometry,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The layer's output by a method, with the method's gradients."""
    y: torch.Tensor = _Product.apply(method, layer, geometry, x, weight, bias, *layer.learned.values())
    return geometry.result(y)  # a view that is made in the function itself could not be changed in place, as a ReLU may
