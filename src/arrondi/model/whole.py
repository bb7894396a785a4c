"""A model that is no chain of blocks, as one unit that is in memory as a whole: `Whole`.

It answers like a `Chain` of one block: encoders with several inputs, models with skips between blocks, any nn.Module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from arrondi.model.called import called
from arrondi.model.chain import Call, Inputs, result_of
from arrondi.model.instance import Instance


class Whole:
    """All of an instance as one unit.

    Attributes:
        instance: model and weights.
        early: always empty: nothing comes before the unit.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance, self.model = instance, instance.model
        self.early: set[str] = set()

    def __len__(self) -> int:
        return 1

    def params(self, i: int) -> list[str]:
        """Names of all parameters."""
        return list(self.instance.empty)

    def fill(self, i: int) -> None:
        """Load the model."""
        self.instance.fill(self.params(i))
        self.instance.put_added(lambda name: True)

    def drop(self, i: int) -> None:
        """Release it."""
        self.instance.drop(self.params(i))
        self.instance.drop_added(lambda name: True)

    def begin(self, inputs: Inputs) -> tuple[torch.Tensor, list[Call]]:
        """Nothing is run; the inputs are the arguments of the unit."""
        return torch.zeros(0), [Call(inputs.args, inputs.kwargs, None)]

    def run(
        self, i: int, hidden: torch.Tensor, call: Call, *, bfloat16: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the model computes, and nothing else.

        Raises:
            SchemeError: it does not run on these inputs.
        """
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        return result_of(called(self.model, call.args, call.kwargs, device, bfloat16)).float(), []

    def finish(self, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        """What it computed."""
        return hidden

    @contextlib.contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """Nothing lies outside the unit."""
        yield
