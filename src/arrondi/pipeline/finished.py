"""What repairs of the whole model work on: `Finished`, both models in memory after the last unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from arrondi.checkpoint import LayerValues
from arrondi.model import Inputs, Instance, Site
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import separable, split_rows, stack_rows

if TYPE_CHECKING:  # steps import this file, and these look steps up
    from arrondi.pipeline.plan import Plan
    from arrondi.pipeline.resolve import PlannedTensor


@dataclass
class Finished:
    """Both models in memory, as they run.

    Attributes:
        plan: of the run.
        values: quantized tensor → its numbers now.
        instance: the quantized model.
        original: as it was given.
        batches: of the calibration data.
        replaced: quantized tensor → its new numbers.
        changed: any other tensor of the file → its new value, in its stored type.
        facts: for the report.
    """

    plan: Plan
    values: Callable[[PlannedTensor], LayerValues]
    instance: Instance
    original: Instance
    batches: Sequence[Inputs]
    replaced: dict[str, LayerValues] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def packed(self, sites: Sequence[Site]) -> dict[str, QTensor]:
        """Site → its weight as the file holds it; without matrices that share their scales."""
        found: dict[str, QTensor] = {}
        for planned in self._planned(sites):
            q = self.values(planned).weight
            count = len(planned.sites)
            if count == 1 or separable(q.scheme):
                parts = [q] if count == 1 else split_rows(q, [s.matrix_shape[0] for s in planned.sites])
                found |= {s.name: part for s, part in zip(planned.sites, parts, strict=True)}
        return found

    def replace(self, changed: dict[str, QTensor]) -> None:
        """Give sites other codes or scales, of the same scheme; those of one tensor together."""
        for planned in [t for t in self.plan.quantized if t.sites and t.sites[0].name in changed]:
            weight = stack_rows([changed[s.name] for s in planned.sites])
            self.replaced[planned.name] = replace(self.values(planned), weight=weight)

    def change(self, name: str, value: torch.Tensor) -> None:
        """Give any other tensor of the file, which the step declared, another value, in its stored type."""
        self.changed[name] = value.to(self.plan.source.stored_dtype(name)).cpu()

    def tensor(self, name: str) -> torch.Tensor:
        """Any other tensor of the file, as the parameter that it fills."""
        return self.instance.parameter(self.instance.names.targets_of[name][0])

    def _planned(self, sites: Sequence[Site]) -> list[PlannedTensor]:
        names = {s.tensor for s in sites}
        return [t for t in self.plan.quantized if t.name in names]
