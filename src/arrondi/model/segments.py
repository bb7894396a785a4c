"""A module that is a line of parts, as units: `Straight` and `Segments`.

It answers like a `Chain`, but what goes from part to part may have any shape, and nothing comes before the first or after the last.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from arrondi.model.called import called
from arrondi.model.chain import Call, Inputs, result_of
from arrondi.model.flow_routers import tensors_of
from arrondi.model.instance import Instance


class Straight(torch.nn.Sequential):
    """Parts in a line: the first takes the arguments of the whole, every other what the part before it gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the last part gives."""
        first, *others = self
        value = first(*args, **kwargs)
        for part in others:
            value = part(value)
        return value

    def original(self) -> Straight:
        """A copy that computes what was there before anything is rounded."""
        return copy.deepcopy(self)


class Segments:
    """The parts of a `Straight` module that is in memory.

    Attributes:
        instance: model and weights.
        early: always empty: nothing comes before the first part.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance, self.model = instance, instance.model
        self.early: set[str] = set()

    def __len__(self) -> int:
        return len(self.model)

    def params(self, i: int) -> list[str]:
        """Names of the parameters of part i."""
        return [n for n in self.instance.empty if n.startswith(f"{i}.")]

    def fill(self, i: int) -> None:
        """Load part i."""
        self.instance.fill(self.params(i))

    def drop(self, i: int) -> None:
        """Release it."""
        self.instance.drop(self.params(i))

    def begin(self, inputs: Inputs) -> tuple[torch.Tensor, list[Call]]:
        """Nothing is run; the inputs are the arguments of the first part."""
        return torch.zeros(0), [Call(inputs.args, inputs.kwargs, None)] + [Call((), {}, None)] * (len(self) - 1)

    def run(
        self, i: int, hidden: torch.Tensor, call: Call, *, bfloat16: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What part i gives, and what it gives besides.

        Raises:
            SchemeError: it does not run on this data.
        """
        args, kwargs = (call.args, call.kwargs) if i == 0 else ((hidden,), {})
        output = called(self.model[i], args, kwargs, self.instance.device.type, bfloat16)
        first = result_of(output)
        return first.float(), [t for t in tensors_of(output) if t is not first]

    def finish(self, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        """What the last part gave."""
        return hidden

    @contextlib.contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """Nothing lies outside the parts."""
        yield
