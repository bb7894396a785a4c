"""Shorter steps for layers whose gradients lost their direction.

Owns: `follow_deviation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.training.modules import LowBitConv2d, LowBitLinear


class Pace:
    """Hooks on an optimizer that `remove` takes off again."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._layers = [
            (module, [p for p in module.parameters(recurse=False) if id(p) in held])
            for module in model.modules()
            if isinstance(module, LowBitLinear | LowBitConv2d)
        ]
        self._before: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        self._handles = [optimizer.register_step_pre_hook(self._keep), optimizer.register_step_post_hook(self._shorten)]

    def remove(self) -> None:
        """Leave the optimizer alone again."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before = [
            (p, p.detach().clone(), module.lowbit.layer.learning_rate)
            for module, parameters in self._layers
            for p in parameters
            if module.lowbit.layer.learning_rate != 1 and p.grad is not None
        ]

    @torch.no_grad()
    def _shorten(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for p, before, factor in self._before:
            p.copy_(torch.lerp(before, p, factor))
        self._before = []


def follow_deviation(model: nn.Module, optimizer: torch.optim.Optimizer) -> Pace:
    """Multiply every step of a layer by the factor that its method asks for (deviation counteractive learning rate scaling; Zhu
    et al., 2020, arXiv:1912.12607): the more the direction of a gradient was changed by rounding, the shorter the step.

    It is the step that is shortened, whatever optimizer or schedule made it; moments are untouched.

    Args:
        model: converted by `int8-unified`.
        optimizer: of its parameters.

    Returns:
        A handle, whose `remove()` undoes it.

    Raises:
        SchemeError: no layer of the model has a method that asks for a factor.
    """
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear | LowBitConv2d)]
    if not any(m.lowbit.method.name == "int8-unified" for m in layers):
        raise SchemeError("Only int8-unified asks for shorter steps: convert the model by it first.")
    return Pace(model, optimizer)
