"""Layers whose class has a program of its own: what it computes beside the product.

Owns: `has_own_program` and `Beside`. A packed layer computes what PyTorch's class computes, so that a subclass which does more (scales
its output, normalises its weight, adds an adapter) cannot be one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from arrondi.model.flow_regions import storage_key
from arrondi.model.flow_routers import tensors_of

_T = torch.Tensor
COPIES: Final = frozenset({_T.to, _T.type, _T.float, _T.half, _T.bfloat16, _T.double, _T.clone, _T.contiguous, _T.cpu, _T.cuda, _T.type_as, torch.clone})  # fmt: skip
"""Functions that give the same numbers again, or rounded to another type."""
_SUMS: Final = frozenset({torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__})
_KNOWN: Final = ("torch.nn.modules.", "arrondi.nn.")
"""Where programs are at home that compute the product and nothing else."""
_PROGRAM: Final = ("forward", "_conv_forward")


def has_own_program(module: nn.Module) -> bool:
    """Whether a linear layer or a convolution computes by another program than PyTorch's."""
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return False
    found = [getattr(module, name) for name in _PROGRAM if hasattr(module, name)]
    programs = [getattr(method, "__func__", method) for method in found]
    return not all(getattr(p, "__module__", "").startswith(_KNOWN) for p in programs)


def changes_in_place(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return name.endswith("_")


class Beside:
    """Watches the programs of such linear layers.

    Attributes:
        reasons: parameter → the first function that is neither the product, nor its bias, nor a view.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._weights: dict[int, str] = {}

    def look_at(self, model: nn.Module, names: Callable[[torch.Tensor], list[str]]) -> None:
        """Watch the layers of a model; `names` are those of a parameter."""
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and has_own_program(module):
                self._weights[id(module)] = next(iter(names(weight)), "")

    def called(self, module: nn.Module, func: Any, args: Any, kwargs: Any, results: list[Any], seen: set[str]) -> None:
        """A function was called while `module` was the innermost that runs; `seen` are the parameters it multiplied by."""
        weight = self._weights.get(id(module))
        if weight is None or weight in seen or not results or func in COPIES:
            return
        operands = list(tensors_of((args, kwargs)))
        if func in _SUMS and any(t is module._parameters.get("bias") for t in operands):
            return
        name = getattr(func, "__name__", str(func))
        keys = {storage_key(t) for t in operands}
        if changes_in_place(name) or not all(storage_key(t) in keys for t in results):
            self.reasons.setdefault(weight, name)

    def turned(self, param: str) -> None:
        """A parameter was multiplied over its first axis."""
        if param in self._weights.values():
            self.reasons.setdefault(param, "a product over the weight's first axis")
