"""What the files of the output hold so far, and a model that holds the same: `Written`.

A step is done once: its bytes are on the disk before the journal says so, and a run that goes on reads them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from arrondi.checkpoint import LayerValues, ShardWriter
from arrondi.model import Instance, OnDisk, Overlay
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.ledger import Ledger
from arrondi.pipeline.plan import Plan
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.rounded import Rounded, row_of
from arrondi.pipeline.step import Added
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.rows import stack_rows


class Written:
    """The output of one run.

    Attributes:
        rows: what is said of every tensor, of the steps done so far.
        instance: the model that is to hold what the files hold; None where tensors go from file to file.
    """

    def __init__(
        self, plan: Plan, source: OnDisk, journal: Journal, ledger: Ledger, writer: ShardWriter, overlay: Overlay
    ) -> None:
        self.plan, self.source, self.journal, self.ledger = plan, source, journal, ledger
        self.writer, self.overlay = writer, overlay
        self.rows: list[dict[str, Any]] = []
        self.instance: Instance | None = None

    def step(self, name: str, members: list[PlannedTensor], work: Callable[[], list[dict[str, Any]]]) -> None:
        """Do a step once: its bytes are on the disk before the journal says so."""
        if name not in self.journal.steps:
            self.record(name, {"rows": work(), "tensors": [t.name for t in members]})
        self.rows += self.journal.steps[name]["rows"]
        self.adopt(members)

    def record(self, name: str, data: dict[str, Any]) -> None:
        """Note something as done."""
        self.journal.record(name, data, wrote=self.writer.sync(), read=self.ledger.taken())

    def adopt(self, members: Sequence[PlannedTensor]) -> None:
        """From now on the quantized model, if one is followed, has the values that the file holds."""
        if self.instance is None:
            return
        for planned in members:
            if planned.status == "quantized":
                self.overlay.changed[planned.name] = partial(self._restored, planned)
                inputs = planned.scheme.inputs if planned.scheme else None
                if inputs is not None and inputs.spread:
                    modules = [m for s in planned.sites for m in s.rounds_inputs]
                    self.instance.spread_inputs(dict.fromkeys(modules, inputs.spread))
                apart = planned.scheme.weights.apart if planned.scheme else None
                if inputs is not None and (inputs.dynamic is not True or apart is not None):
                    values = self.plan.layout.read(planned.placed, self.writer.get)
                    modules = [m for s in planned.sites for m in s.rounds_inputs]
                    self.instance.round_inputs(dict.fromkeys(modules, (inputs, values.inputs, values.whole_columns)))
            elif planned.name in self.plan.declared.changed:
                self.overlay.changed[planned.name] = partial(self._written, planned.name)
        for added in self._added(members):
            self.overlay.added[added.param] = partial(self._written, added.name)

    def _added(self, members: Sequence[PlannedTensor]) -> list[Added]:
        """What steps add for these tensors."""
        names = {t.name for t in members}
        return [a for a in self.plan.declared.added if a.tensor in names]

    def put_added(self, members: Sequence[PlannedTensor], values: Mapping[str, torch.Tensor]) -> None:
        """Write what steps add for these tensors."""
        for added in self._added(members):
            self.writer.put(added.name, values[added.name])

    def _written(self, name: str) -> torch.Tensor:
        return self.writer.get(name).float()

    def _restored(self, planned: PlannedTensor) -> torch.Tensor:
        values = self.plan.layout.read(planned.placed, self.writer.get)
        return planned.placed.restored(values.weight.dequantize())

    def put(self, planned: PlannedTensor, parts: Sequence[Rounded], inputs: Grid | None) -> dict[str, Any]:
        """Write a quantized tensor; what the report says of it."""
        assert planned.scheme is not None
        values = LayerValues(stack_rows([p.q.to("cpu") for p in parts]), inputs)
        for name, value in self.plan.layout.write(planned.placed, values).items():
            self.writer.put(name, value)
        return row_of(
            planned.name,
            planned.scheme,
            parts,
            self.plan.nbytes(planned),
            experts=planned.sites[0].param_index is not None,
        )

    def keep(self, planned: PlannedTensor, changed: Mapping[str, torch.Tensor]) -> None:
        """Write a tensor that is not quantized, as a step changed it or as it was."""
        if planned.name in changed:
            self.writer.put(planned.name, changed[planned.name])
        elif planned.tensor.converted:
            instance = self.source.instance()
            instance.fill(planned.tensor.params)
            self.writer.put(planned.name, instance.parameter(planned.tensor.params[0]).to(planned.dtype))
        else:
            self.ledger.note(planned.name, self.writer.copy(self.source.checkpoint.folder.entries[planned.name]))
