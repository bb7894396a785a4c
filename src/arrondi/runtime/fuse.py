"""Fused blocks of a whole model: `fuse`, `unfuse` and `is_fused`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from arrondi.model.memory import release
from arrondi.nn import QLinear, QStack
from arrondi.runtime.fused_block import FusedBlock
from arrondi.runtime.pattern import Differs
from arrondi.runtime.recognize import recognize


def fuse(model: nn.Module) -> dict[str, str | None]:
    """Put a block of few compiled calls in the place of every block that has such a form.

    Which blocks these are is decided by what their forward computes, see `arrondi.runtime.recognize`. Packed weights that are
    read together are put side by side in memory; every layer keeps its part.

    Args:
        model: of transformers, its quantized linears `QLinear`.

    Returns:
        for every block by name: None if it was replaced, else one sentence why not.
    """
    found: dict[str, str | None] = {}
    for name, block in list(_blocks(model)):
        try:
            _replace(model, block, FusedBlock.of(block, *recognize(block)))
            found[name] = None
        except Differs as reason:
            found[name] = str(reason)
        release()  # what the parts held before they were put side by side
    return found


def unfuse(model: nn.Module) -> None:
    """Put the original blocks back, with the layers and parameters that the fused ones hold now."""
    for block in [m for m in model.modules() if isinstance(m, FusedBlock)]:
        block.original.train(block.training)
        _replace(model, block, block.original)


def is_fused(model: nn.Module) -> bool:
    """Whether every layer with quantized weights is part of a fused block."""
    inside = {m for block in model.modules() if isinstance(block, FusedBlock) for m in block.modules()}
    packed = [m for m in model.modules() if isinstance(m, (QLinear, QStack))]
    return bool(packed) and inside.issuperset(packed)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The elements of lists of modules that hold quantized linears; of lists inside lists the outermost."""
    known: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(known)):
            continue
        known.append(f"{name}.")
        for number, block in module.named_children():
            if not isinstance(block, FusedBlock) and any(isinstance(m, QLinear) for m in block.modules()):
                yield f"{name}.{number}" if name else number, block


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
