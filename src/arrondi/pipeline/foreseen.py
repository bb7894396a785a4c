"""How large inputs become, where a plan has to know that: how many columns reach a threshold decides how large a file gets.

Owns: `largest_inputs` and `inputs_of_heads`. One walk of the original through the calibration data, before anything is planned or done.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arrondi.model import Budget, InMemory, Inputs, OnDisk, Stream, Units, device_named, walk
from arrondi.pipeline.importance import sums_of_inputs
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.statistics import Seen, Side, collect
from arrondi.pipeline.steps import get_step


def largest_inputs(
    source: OnDisk | InMemory,
    recipe: Recipe,
    batches: Sequence[Any],
    device: str = "cpu",
    known: MutableMapping[bool, Mapping[str, torch.Tensor]] | None = None,
) -> Mapping[str, torch.Tensor]:
    """Site → max |x| of every column of its input in the original, float32 (n,); nothing where no rule of the recipe asks.

    Args:
        batches: calibration data; empty: nothing is known.
        device: where units are run.
        known: what was found on the same batches, without and with the output head; is added to.
    """
    asks = any(r.scheme is not None and get_step(r.method).foresees(r.scheme, r.options) for r in recipe.rules)
    if not asks or not batches:
        return {}
    if isinstance(source, OnDisk):
        head, found = recipe.ignore is not None, {} if known is None else known
        if head not in found:
            sums = sums_of_inputs(source, batches, device_named(device), head=head)
            found[head] = {name: energy.absmax.amax(0) for name, energy in sums.items()}
        return found[head]
    sites = [s for s in source.sites if s.kind == "linear"]
    side = Side(
        source.names.params.__getitem__, [partial(_run, source.model, b) for b in batches], source.instance().owner
    )
    with torch.no_grad():
        seen = collect({s.param for s in sites}, {}, side, {"absmax"})
    of_sites = {s.name: seen.get((s.param, s.param_index)) for s in sites}
    return {name: one.absmax for name, one in of_sites.items() if one is not None and one.absmax is not None}


@torch.no_grad()
def inputs_of_heads(
    units: Units, told: Mapping[str, str], batches: Sequence[Any], budget: Budget, folder: Path | None
) -> dict[str, Seen]:
    """What heads are given that are tied to tables, before anything is rounded: their second moments, in one walk.

    Args:
        units: of the original; nothing of it stays filled.
        told: site of a table → its parameter.
        batches: calibration data.
    """
    if not told or not batches:
        return {}
    instance, params = units.instance, set(told.values())
    with Stream(units, batches, budget, folder) as stream:
        stream.begin()
        stream.to_the_end = True
        for _ in walk([[stream]]):
            pass
        with units.outer_loaded():
            instance.fill(params)
            ends = [partial(stream.output, *p) for p in stream.pieces()]
            seen = collect(params, {}, Side(instance.parameter, ends, instance.owner), {"moment"})
    return {name: seen[param, None] for name, param in told.items() if (param, None) in seen}


def _run(model: torch.nn.Module, batch: Inputs) -> object:
    return model(*batch.args, **batch.kwargs)
