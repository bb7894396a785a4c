"""Layers that train in few bits in the place of PyTorch's.

Owns: `LowBitLinear`, `LowBitConv2d`. They are layers of PyTorch with another product: the same parameters under the same names,
so state dicts, optimizers, DDP and FSDP see what they saw before. What a method learns besides is a parameter too, but no state
dict has it: see `learned_state` in `convert`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.training.function import product
from arrondi.training.geometry import Geometry, Tokens, Windows
from arrondi.training.method import Layer, TrainingMethod

PREFIX = "lowbit_"
"""Of names of parameters that a method learns besides."""


class LowBitLinear(nn.Linear):
    """`nn.Linear` by a method of low-bit training."""

    lowbit: LowBit

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _left_to_pytorch(self, input):
            return super().forward(input) + _nothing(self)
        return _product(self, self.lowbit, input, Tokens)


class LowBitConv2d(nn.Conv2d):
    """`nn.Conv2d` without groups by a method of low-bit training, as a product with windows of its input."""

    lowbit: LowBit

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _left_to_pytorch(self, input):
            return super().forward(input) + _nothing(self)
        whole = input if input.dim() == 4 else input[None]
        y = _product(self, self.lowbit, whole, lambda shape: Windows.of(self, shape))
        return y if input.dim() == 4 else y[0]


class LowBit:
    """What a converted layer knows of its method; shared by nothing else."""

    def __init__(self, method: TrainingMethod, layer: Layer, origin: type[nn.Module]) -> None:
        self.method, self.layer, self.origin = method, layer, origin


def become(module: nn.Linear | nn.Conv2d, method: TrainingMethod, options: Any) -> None:
    """Give a layer a method, in place: parameters, hooks and places in the model stay what they are."""
    weight = module.weight
    sums = (int(weight.shape[0]), int(weight[0].numel()))
    learned = {
        name: nn.Parameter(value.to(weight.device), requires_grad=weight.requires_grad)
        for name, value in method.learn(weight.detach().reshape(sums), options).items()
    }
    layer = Layer(options, sums, int(weight.shape[1]), learned)
    lowbit = LowBit(method, layer, type(module))
    object.__setattr__(module, "lowbit", lowbit)
    for name, parameter in learned.items():
        module.register_parameter(PREFIX + name, parameter)
    module.__class__ = LowBitLinear if isinstance(module, nn.Linear) else LowBitConv2d
    if learned:
        handle = module.register_state_dict_post_hook(_forget)
        lenient = module.register_load_state_dict_pre_hook(_excuse)
        object.__setattr__(module, "lowbit_hooks", (handle, lenient))


def unbecome(module: LowBitLinear | LowBitConv2d) -> None:
    """The layer that it was."""
    lowbit = module.lowbit
    for name in lowbit.layer.learned:
        delattr(module, PREFIX + name)
    for hook in module.__dict__.pop("lowbit_hooks", ()):
        hook.remove()
    plain: nn.Module = module
    plain.__class__ = lowbit.origin
    object.__delattr__(module, "lowbit")


def _left_to_pytorch(module: nn.Linear | nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether PyTorch's own layer says what there is to say: of nothing, of the meta device, and of inputs that do not fit."""
    if torch.jit.is_tracing():
        return False  # to be refused
    if not x.numel() or x.is_meta or not x.is_floating_point():
        return True
    if isinstance(module, nn.Linear):
        return not x.dim() or x.shape[-1] != module.in_features
    if x.dim() not in (3, 4) or x.shape[-3] != module.in_channels:
        return True
    return min(Windows.of(module, torch.Size((1, *x.shape[-3:]))).out) < 1


@torch.compiler.disable(reason="products of codes are compiled kernels that cannot be traced")
def _product(module: Any, lowbit: LowBit, x: torch.Tensor, geometry: Any) -> torch.Tensor:
    weight, bias = module.weight, module.bias
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise SchemeError(
            "A layer that trains in few bits cannot be traced or exported: call restore_training() first."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    layer = lowbit.layer
    if layer.learned:  # DDP and FSDP may have put other tensors into their places
        layer.learned = {name: getattr(module, PREFIX + name) for name in layer.learned}
    where: Geometry = geometry(x.shape)
    with torch.autocast(x.device.type, enabled=False):
        return product(lowbit.method, layer, where, x, weight, bias)


def _nothing(module: nn.Module) -> torch.Tensor | float:
    """0, of which what is learned besides has a gradient: ranks whose batch is empty must not differ from the others."""
    return sum((0 * p.sum() for n, p in module.named_parameters(recurse=False) if n.startswith(PREFIX)), 0.0)


def _forget(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [key for key in state if key.startswith(prefix + PREFIX)]:
        del state[name]


def _excuse(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What no state dict has keeps its present value."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith(PREFIX):
            state.setdefault(prefix + name, parameter.detach())
