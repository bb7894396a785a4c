"""Packed buffers under `nn.Module`'s own machinery.

Owns: `keep_types`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


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
