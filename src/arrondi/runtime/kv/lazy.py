"""Keys or values that are still packed: `PackedStates`, which an attention function may read as they are.

To everything else they are an ordinary tensor: the first operator that touches them gets the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from arrondi.errors import ShapeError

_Tensor: Any = torch.Tensor  # whose methods are replaced here by others


class PackedStates(_Tensor):
    """States (batch, heads, tokens, width) of a `Side`; good until its next update."""

    side: Any
    tokens: int
    at: int
    numbers: torch.Tensor | None

    @staticmethod
    def of(side: Any, like: torch.Tensor, tokens: int) -> PackedStates:
        """The last `tokens` of a side, in the type of `like`."""
        shape = (*like.shape[:2], tokens, like.shape[-1])
        made = torch.Tensor._make_wrapper_subclass(PackedStates, shape, dtype=like.dtype, device=like.device)
        made.side, made.tokens, made.at, made.numbers = side, tokens, side.length, None
        found: PackedStates = made
        return found

    def restored(self) -> torch.Tensor:
        """The numbers."""
        if self.numbers is None:
            if self.side.length != self.at:
                raise ShapeError("These keys or values were read after the next tokens came. Read them before.")
            self.numbers = self.side.read(self.tokens, self.dtype)
        return self.numbers

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedStates({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, given = tree_map(lambda x: x.restored() if isinstance(x, PackedStates) else x, (args, dict(kwargs or {})))
        return func(*args, **given)
