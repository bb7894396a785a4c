"""What the first batch decides.

Owns: `settle`, which gives a layer its first learned values and makes ranks agree on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import distributed

from arrondi.errors import ArrondiError
from arrondi.training.method import Layer


def settle(layer: Layer, key: str, find: Callable[[], Mapping[str, torch.Tensor]], *, loaded: bool = False) -> None:
    """Give a layer what its first batch says, once; ranks take what the first of them found.

    Args:
        layer: whose parameters and kept tensors get their values.
        key: a name that stands in `layer.kept` from then on.
        find: gives the values by name, those of parameters as ().
        loaded: parameters that are not zero may come from a state dict, and stay; else they are what memory held before.

    Raises:
        ArrondiError: they were set once and are zero again, since FSDP put parameters of its own into their places.
    """
    if key not in layer.kept:
        found = {name: value.detach().clone() for name, value in find().items()}
        if distributed.is_available() and distributed.is_initialized():
            for value in found.values():
                distributed.broadcast(value, 0)
        with torch.no_grad():
            for name, value in found.items():
                if name not in layer.learned:
                    layer.kept[name] = value
                elif not loaded or not bool(layer.learned[name] != 0):
                    layer.learned[name].copy_(value)
        layer.kept.setdefault(key, torch.ones(()))
    if any(not bool(value != 0) for value in layer.learned.values()):
        raise ArrondiError(
            "The steps of low-bit training are set by the first batch and were lost: run one batch before fully_shard() or functional_call()."
        )
