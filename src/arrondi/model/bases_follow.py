"""What rules know and write down while a model is followed: `Follower`, and `otherwise`, where there is no rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from arrondi.model.bases import Axis, Gain, Value


class Follower(Protocol):
    """What rules write down besides bases."""

    def value(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor."""

    def contracted(self, param: str, axis: Axis, gain: Gain | None, bias: str | None) -> None:
        """An axis of a parameter was summed over with an input that has this gain; `bias` is added to the result."""

    def produced(self, param: str, axis: Axis) -> None:
        """An axis of a parameter went into a result."""


Rule = Callable[..., "Value | tuple[Value, ...] | None"]
"""(follower, name, result, *args, **kwargs) → the value of the result, or of every tensor of it; None leaves it to `otherwise`."""


def said_of(value: Value, name: str) -> str:
    return f"{name} of {value.param}" if value.param else name


def otherwise(
    follow: Follower, name: str, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> list[Value]:
    """An operator of which nothing is known."""
    for tensor in tensors:
        value = follow.value(tensor)
        value.fix(said_of(value, name))
    return [Value.fixed(r.shape, name) for r in results]
