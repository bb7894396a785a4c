"""A module in memory, quantized: `quantize_module`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from arrondi.checkpoint import LayerValues
from arrondi.errors import DataError
from arrondi.model import Budget, Chain, InMemory, Inputs, Site, Stream, Whole, settle, walk
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.statistics import Forward, Side
from arrondi.pipeline.step import OF_ORIGINAL
from arrondi.pipeline.unit import carry_out
from arrondi.pipeline.work import Work
from arrondi.runtime.install import install
from arrondi.runtime.modules import remember
from arrondi.tensor.rows import stack_rows

_BATCH = 8
"""Windows of token ids that are sent through a model together."""


@torch.no_grad()
def quantize_module(
    model: torch.nn.Module,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep_misfits: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> torch.nn.Module:
    """Replace the layers of a module by layers that hold packed codes.

    Args:
        model: any module made of linear layers, convolutions and recurrent cells; changed in place.
        recipe: what becomes what. Targets are class names, names of modules, or patterns; "Linear" are linear layers.
        calibration: batches as the module is called: tensors, tuples of positional or dicts of keyword arguments; or token
            ids (n, tokens). Needed by methods that look at inputs.
        keep_misfits: see `make_plan`.
        progress: called with (units done, units, what).

    Returns:
        the module, in the mode (training or not) that it was in. Recurrent cells keep rounded floating-point weights.

    Raises:
        SchemeError: the recipe picks nothing, or the module does not run on the batches.
        DataError: a method needs calibration and there is none, or a weight is not finite.
    """
    source, batches = InMemory(model), _batches(model, calibration)
    training = model.training
    model.eval()
    try:
        if batches:
            source.learn(lambda: _call(model, batches[0]))
            settle(source, batches[0])
        plan = make_plan(source, recipe, keep_misfits=keep_misfits)
        check(plan)
        if plan.calibrated and not batches:
            raise DataError("The recipe needs calibration batches, and none were given. Pass calibration=[…].")
        done = _rounded(source, plan, batches, progress or (lambda done, total, what: None))
        _install(source, plan.quantized, done)
    finally:
        model.train(training)
    return model


def _rounded(
    source: InMemory,
    plan: Plan,
    batches: list[Inputs],
    progress: Callable[[int, int, str], None],
) -> dict[str, LayerValues]:
    """Tensor → its codes. The module's parameters hold the rounded values afterwards."""
    instance, tensors = source.instance(), plan.tensors
    units = source.units_of(instance)
    found: dict[str, LayerValues] = {}

    def work(members: list[PlannedTensor], forwards: Sequence[Forward], originals: Sequence[Forward] = ()) -> None:
        work = Work(
            plan, instance, members, forwards, Side(original.instance.parameter, originals) if originals else None
        )
        carry_out(work)
        for t in members:
            parts = [work.results[s.name].q for s in t.sites if s.name in work.results]
            if parts:
                found[t.name] = LayerValues(stack_rows(parts), work.grids.get(t.name))

    followed = batches if any(s.needs & OF_ORIGINAL for s in plan.steps()) else []
    original = _copy(source) if followed else units
    outside = [t for t in tensors if t.block is None]
    if not batches:
        work(list(tensors), ())
        return found
    budget = Budget(1 << 62)
    with Stream(units, batches, budget, None) as stream, Stream(original, followed, budget, None) as floats:
        stream.begin()
        floats.begin()

        def visit(i: int, streams: Sequence[Stream]) -> None:
            if streams[0] is stream:
                work([t for t in tensors if t.block == i], stream.forwards(i), floats.forwards(i))

        for i in walk([[stream], [floats] if followed else []], visit):
            progress(i, len(units) + 1, f"unit {i + 1} of {len(units)}")
        ends = [[lambda p=p, s=s: s.output(*p) for p in s.pieces()] for s in (stream, floats)]
        work(outside, *ends)
    return found


def _copy(source: InMemory) -> Chain | Whole:
    """The original, whose weights stay as they are."""
    copied = InMemory(copy.deepcopy(source.model))
    if source.whole:
        copied.run_as_whole(source.facts)
    return copied.units_of(copied.instance())


def _install(source: InMemory, planned: Sequence[PlannedTensor], values: dict[str, LayerValues]) -> None:
    by_param: dict[str, list[Site]] = {}
    inputs = {}
    placed = {t.name: t.placed for t in planned}
    loose: dict[str, LayerValues] = {}
    for t in planned:
        inputs[t.name] = t.scheme.inputs if t.scheme else None
        for site in t.sites:
            by_param.setdefault(site.param, []).append(site)
    for param, sites in by_param.items():
        layers = {s.tensor: (values[s.tensor], inputs[s.tensor]) for s in sites}
        if not install(source.model, source.names, sites, layers, source.names.params[param].dtype):
            loose |= {name: found for name, (found, _) in layers.items()}
    remember(source.model, placed, loose)


def _call(model: torch.nn.Module, batch: Inputs) -> Any:
    try:
        return model(*batch.args, **batch.kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"The module does not run on its first calibration batch ({str(error).splitlines()[0]}). Give batches as it is called."
        ) from error


def _batches(model: torch.nn.Module, calibration: Any) -> list[Inputs]:
    if calibration is None:
        return []
    if isinstance(calibration, torch.Tensor):
        integers = not calibration.dtype.is_floating_point and calibration.ndim == 2
        return [_inputs(model, b) for b in (calibration.split(_BATCH) if integers else [calibration])]
    readable = isinstance(calibration, Iterable) and not isinstance(calibration, str)
    found = list(calibration) if readable else [calibration]
    for batch in found:
        if not isinstance(batch, (Inputs, torch.Tensor, tuple, list, Mapping)):
            raise DataError(
                f"Calibration of a module is batches as it is called (tensors, tuples, dicts), got {type(batch).__name__}."
            )
    return [_inputs(model, b) for b in found]


def _inputs(model: torch.nn.Module, batch: Any) -> Inputs:
    """A batch as the module is called: token ids by their name only where it has that name."""
    inputs = Inputs.of(batch)
    named = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, torch.Tensor) and not any(p.name in inputs.kwargs or p.kind is p.VAR_KEYWORD for p in named):
        return Inputs((batch,))
    return inputs
