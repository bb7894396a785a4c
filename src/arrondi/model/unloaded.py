"""Weights that are not loaded: `Unloaded`, a mode in which nothing is computed with them.

They are on the meta device. PyTorch lets some operations mix such tensors with real ones and gives whatever lies in memory (a look-up
with indices that were sent to the device of a weight), so an error is not enough to notice it. In the mode a weight
that is not loaded says that it is where it will be, and every operation that would make a tensor of it raises `NotLoaded`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEVICE: Any = torch.Tensor.device


class NotLoaded(Exception):
    """An operation wanted the numbers of a weight that is not loaded."""


class Unloaded(TorchFunctionMode):
    """See above.

    Attributes:
        device: where weights will be.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE.__get__:
            return self.device if args[0].is_meta else func(*args, **kwargs)
        if not (_meta(args) or _meta(kwargs.values())):
            return func(*args, **kwargs)
        try:
            output = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise NotLoaded(func.__name__) from error
        if isinstance(output, torch.Tensor):
            raise NotLoaded(func.__name__)
        return output


def _meta(values: Any) -> bool:
    """Whether a tensor on the meta device is among these, or in a list of them."""
    return any(v.is_meta if isinstance(v, torch.Tensor) else isinstance(v, (list, tuple)) and _meta(v) for v in values)
