"""What is done to the whole quantized model after its last unit: `Finishing`.

Everything has been written by then, and is written a second time. So that a run that is killed between two tensors goes on where it
was, the new values are kept aside first, and the journal says which tensors they replace before the first of them is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from arrondi.checkpoint import LayerValues, ShardPlan, ShardWriter, TensorSpec
from arrondi.model import Inputs, Instance
from arrondi.pipeline.finished import Finished
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.select import Selected

_ASIDE: Final = "aside: "
"""Before the name of a tensor that is kept aside, in the journal."""


class Finishing:
    """The steps of one run that need the whole model, with what they keep aside."""

    def __init__(self, plan: Plan, journal: Journal, writer: ShardWriter) -> None:
        self.plan, self.journal, self.writer = plan, journal, writer
        self.steps = [one for one in plan.selected if one.step.scope == "whole" and one.groups]
        self._aside: dict[str, ShardWriter] = {}
        for one in self.steps:
            specs = list(_specs(plan, one))
            shards = ShardPlan.split(specs, max(plan.output_bytes, 1))
            self._aside[one.step.name] = ShardWriter(journal.work / one.step.name, shards)

    def digest(self, name: str) -> str | None:
        """The digest of a tensor as it lies in the output, or of one that is kept aside."""
        if not name.startswith(_ASIDE):
            return self.writer.digest(name)
        step, _, tensor = name.removeprefix(_ASIDE).partition(" ")
        return self._aside[step].digest(tensor) if step in self._aside else None

    def carry_out(self, instance: Instance, original: Instance, batches: Sequence[Any]) -> None:
        """All of them, in the recipe's order; what earlier runs have done is not done again."""
        for one in self.steps:
            name, learned = one.step.name, f"{one.step.name}: learned"
            aside = self._aside[name]
            if name in self.journal.steps:
                continue
            if learned not in self.journal.steps:
                with _loaded(instance), _loaded(original):
                    finished = Finished(self.plan, self._values, instance, original, [Inputs.of(b) for b in batches])
                    assert one.step.apply is not None
                    one.step.apply(finished, one.sites, **one.options)
                written = self._written(finished)
                for tensor, value in written.items():
                    aside.put(tensor, value)
                wrote = {f"{_ASIDE}{name} {tensor}": digest for tensor, digest in aside.sync().items()}
                said = {"tensors": [], "replaces": sorted(written), "facts": finished.facts}
                self.journal.record(learned, said, wrote=wrote)
            for tensor in self.journal.steps[learned]["replaces"]:
                self.writer.put(tensor, aside.get(tensor))
            self.journal.record(name, {"tensors": []}, wrote=self.writer.sync())

    def _values(self, planned: PlannedTensor) -> LayerValues:
        return self.plan.layout.read(planned.placed, self.writer.get)

    def _written(self, finished: Finished) -> dict[str, torch.Tensor]:
        """Tensor of the file → its new value."""
        placed = {t.name: t.placed for t in self.plan.quantized if t.name in finished.replaced}
        packed = [self.plan.layout.write(placed[name], values) for name, values in finished.replaced.items()]
        return {**finished.changed, **{name: value for parts in packed for name, value in parts.items()}}

    def facts(self) -> dict[str, Any]:
        """What steps say of their work: step → facts."""
        return {one.step.name: self.journal.steps[f"{one.step.name}: learned"]["facts"] for one in self.steps}

    def after(self, row: dict[str, Any]) -> dict[str, Any]:
        """A tensor's line in the report. What was measured of it before it was written anew holds no more."""
        done = [one for one in self.steps if row["name"] in {s.tensor for s in one.sites}]
        replaced = {n for one in done for n in self.journal.steps[f"{one.step.name}: learned"]["replaces"]}
        planned = next((t for t in self.plan.quantized if t.name == row["name"]), None)
        if planned is None or not replaced & {name for name, _, _ in self.plan.specs(planned)}:
            return row
        names = [*row.get("steps", ()), *(one.step.name for one in done)]
        return {**row, "sqnr_db": None, "output_error": None, "steps": names}


def _specs(plan: Plan, one: Selected) -> Iterator[TensorSpec]:
    """The tensors of the file that a step may write."""
    names = {s.tensor for s in one.sites} | set(plan.declared.changed)
    for planned in plan.tensors:
        if planned.name in names:
            yield from plan.specs(planned)


@contextmanager
def _loaded(instance: Instance) -> Iterator[None]:
    """Inside, all of a model is in memory."""
    everything = list(instance.names.params)
    instance.fill(everything)
    instance.put_added(lambda name: True)
    try:
        yield
    finally:
        instance.drop(everything)
        instance.drop_added(lambda name: True)
