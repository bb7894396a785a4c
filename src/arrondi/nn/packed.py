"""Packed buffers under `nn.Module`'s own machinery, and under code that asks a layer for its weight.

Owns: `keep_types`, `keep_hooks` and `PackedWeight`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from arrondi.errors import SchemeError


def keep_types(module: nn.Module, change: Callable[[], object]) -> None:
    """Run `change`, which moves or casts the module, and undo the casts of its floating buffers.

    `model.to(torch.bfloat16)` means the model's own numbers; scales that go with packed codes must stay as they are.
    """
    before = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
    change()
    for name, old in before.items():
        new = module._buffers[name]
        if new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """What was registered to run before and after a layer runs with the one in its place, and its handles still remove it."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new.train(old.training)


_HOOKS: Final = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


class _NoTensor(SchemeError, AttributeError):
    """A packed weight is asked for what only a tensor has. `hasattr` takes it for the answer no."""


@dataclass(frozen=True)
class PackedWeight:
    """What the `weight` of a packed layer answers: facts for code that asks a layer where its weight lies.

    It holds no numbers; a product or another function of torch (Mamba multiplies by a layer's weight itself) decodes them.

    Raises:
        SchemeError: anything else is asked of it, or a function would write to it.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    decode: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    what: str = field(repr=False, compare=False)

    requires_grad = False
    is_meta = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def size(self, axis: int | None = None) -> torch.Size | int:
        """Its shape, or one number of it."""
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        """How many numbers it stands for."""
        return self.shape.numel()

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return self._in(other.dtype) @ other

    def __rmatmul__(self, other: torch.Tensor) -> torch.Tensor:
        return other @ self._in(other.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        found = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, PackedWeight)]
        if found and ((name.endswith("_") and not name.endswith("__")) or "out" in (kwargs or {})):
            raise found[0]._lacks(name)
        values = [*args, *(kwargs or {}).values()]
        kind = next((v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()), None)
        dense = [a._in(kind) if isinstance(a, PackedWeight) else a for a in args]
        named = {k: v._in(kind) if isinstance(v, PackedWeight) else v for k, v in (kwargs or {}).items()}
        return func(*dense, **named)

    def _in(self, dtype: torch.dtype | None) -> torch.Tensor:
        """The numbers in the type of what they meet: a model that was cast after it was packed has another than this layer."""
        return self.decode().to(dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols of Python that ask first
            raise AttributeError(name)
        raise self._lacks(name)

    def _lacks(self, name: str) -> _NoTensor:
        return _NoTensor(
            f"The model's own code uses {name!r} of a weight that is packed ({self.what}) and has only a shape, a type and a device. Keep this layer unquantized."
        )
