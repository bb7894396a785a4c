"""What the original's loss says of the outputs of sites: `LossKnown`, found in one walk back through the original.

Owns: the Fisher information of the model's own predictions, of which every site gets the part that its outputs have, Σ g gᵀ (in blocks). It is found
before anything is rounded, from the original alone, so that a run that is continued finds the same again. One unit is in memory at a
time; moments and what enters units lie in the run's folder beyond the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.calibration import OutputMoment
from arrondi.errors import SchemeError
from arrondi.measure.compare import is_causal
from arrondi.model import Budget, Inputs, Site, Stream, TreeStore, Units, Whole, sampled_loss, walk, walk_back
from arrondi.pipeline.plan import Plan

DRAWS: Final = 2
"""Walks with other tokens drawn. One more halves what is noise in the moments, and costs as much again."""
OUTPUT_BYTES: Final = 64 << 20
"""Of the outputs of a batch."""


class LossKnown:
    """Moments of gradients by site.

    Use as a context manager.

    Attributes:
        why: why nothing is known, "" if something is.
    """

    def __init__(self, budget: Budget, folder: Path | None) -> None:
        self._store = TreeStore(budget, folder)
        self._places: dict[str, tuple[int, str]] = {}
        self.why = ""

    def of(self, sites: Sequence[Site]) -> tuple[torch.Tensor, ...] | None:
        """The moments of sites below each other, an identity for those of which nothing is known; None if that is all of them."""
        if not any(s.name in self._places for s in sites):
            return None
        found: list[torch.Tensor] = []
        for site in sites:
            if site.name in self._places:
                number, key = self._places[site.name]
                found += self._store[number][key]
            else:
                found += [torch.eye(len(part)) for part in torch.empty(site.shape[0]).split(OutputMoment().widest)]
        return tuple(found)

    def learn(self, plan: Plan, units: Units, batches: Sequence[Any], budget: Budget, folder: Path | None) -> None:
        """Walk through the original and back, if that can be done; `why` says if not."""
        wanted = _wanted(plan, units)
        if isinstance(units, Whole):
            self.why = "the model is run as one unit, and gradients are followed unit by unit"
        elif plan.spreads or any(one.step.kind == "rewrite" and one.groups for one in plan.selected):
            self.why = "rewrites change what layers give, and gradients are those of the model as it was given"
        if self.why or not wanted:
            return
        small = _small(batches, units)
        with Stream(units, small * DRAWS, budget, folder, keep_inputs=True) as stream:
            stream.begin()
            for _ in walk([[stream]]):
                pass
            try:
                self._walk_back(stream, wanted)
            except (SchemeError, NotImplementedError) as error:
                self.why = f"gradients could not be followed: {error}"

    def _walk_back(self, stream: Stream, wanted: dict[int, dict[str, str]]) -> None:
        moments: dict[str, OutputMoment] = {}
        loss = sampled_loss(is_causal(stream.units.model))
        for found in walk_back(stream, loss, modules=lambda i: list(wanted.get(i, {}))):
            for module, products in found.modules.items():
                for product in products:
                    moments.setdefault(module, OutputMoment()).add(product.gradient)
            if found.batch == len(stream) - 1:
                names = {module: wanted[found.unit][module] for module in moments if moments[module].blocks}
                self._places |= {name: (len(self._store), module) for module, name in names.items()}
                self._store.append({module: one.blocks for module, one in moments.items()})
                moments = {}

    def close(self) -> None:
        """Give memory and files back."""
        self._places = {}
        self._store.close()

    def __enter__(self) -> LossKnown:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def looks_at_loss(plan: Plan) -> bool:
    """Whether a step of a plan asks for moments of gradients."""
    return any("output moments" in step.needs | step.wants for step in plan.steps())


def _wanted(plan: Plan, units: Units) -> dict[int, dict[str, str]]:
    """Unit → module → site, of matrices that are all that a linear layer multiplies by."""
    from arrondi.pipeline.steps import get_step

    found: dict[int, dict[str, str]] = {}
    for planned in plan.quantized:
        step = None if planned.rule is None else get_step(planned.rule.method)
        if step is None or planned.block is None or "output moments" not in step.needs | step.wants:
            continue
        for site in planned.sites:
            whole = units.instance.parameter(site.param).numel() == site.shape[0] * site.matrix_shape[1]
            if site.kind == "linear" and site.param_index is None and site.modules and whole:
                found.setdefault(planned.block, {})[site.modules[0]] = site.name
    return found


def _small(batches: Sequence[Any], units: Units) -> list[Inputs]:
    """Batches of token ids in parts whose outputs are of some size."""
    config: Any = getattr(units.model, "config", None)
    width = getattr(config.get_text_config(), "vocab_size", 1) if hasattr(config, "get_text_config") else 1
    found: list[Inputs] = []
    for batch in map(Inputs.of, batches):
        ids = batch.kwargs.get("input_ids")
        if ids is None or batch.args or len(batch.kwargs) > 1:
            found.append(batch)
        else:
            rows = max(OUTPUT_BYTES // (4 * width * ids.shape[1]), 1)
            found += map(Inputs.of, ids.split(rows))
    return found
