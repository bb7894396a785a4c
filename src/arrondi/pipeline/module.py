"""A module in memory, quantized: `quantize_module`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch.nn.parameter import UninitializedParameter

from arrondi.checkpoint import LayerValues
from arrondi.errors import DataError, SchemeError
from arrondi.model import Budget, InMemory, Inputs, Instance, Site, Straight, Stream, Units, settle, walk
from arrondi.nn import QStack
from arrondi.pipeline.finished import Finished
from arrondi.pipeline.fisher import LossKnown, looks_at_loss
from arrondi.pipeline.foreseen import inputs_of_heads, largest_inputs
from arrondi.pipeline.plan import Plan, check, make_plan
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.select import Selected
from arrondi.pipeline.statistics import Forward, Seen
from arrondi.pipeline.unit import carry_out, check_finite
from arrondi.pipeline.work import Original, Work
from arrondi.runtime.install import install
from arrondi.runtime.modules import remember
from arrondi.tensor.rows import stack_rows

_KINDS: Final = "Calibration of a module is batches as it is called (tensors, tuples, dicts)"

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
    with _experts_one_by_one(model):
        source, plan, done = round_module(model, recipe, calibration, keep_misfits=keep_misfits, progress=progress)
        install_plan(source, plan, done)
    for name, value in plan.declared.config.items():
        if hasattr(getattr(model, "config", None), name) and not isinstance(value, Mapping):
            setattr(model.config, name, value)
    return model


@torch.no_grad()
def round_module(
    model: torch.nn.Module,
    recipe: Recipe,
    calibration: Any = None,
    *,
    keep_misfits: bool = False,
    layout: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[InMemory, Plan, dict[str, LayerValues]]:
    """Round the weights of a module where they are; its layers stay what they were.

    Takes the arguments of `quantize_module`, and:
        layout: see `make_plan`; a layout that holds every kind of layer, where codes are written elsewhere.

    Returns:
        the module as a source, what was planned, and tensor → its codes.
    """
    _check(model)
    source, batches = InMemory(model), _batches(model, calibration)
    training = model.training
    model.eval()
    try:
        with _experts_one_by_one(model), _without_cache(model):
            if batches:
                source.learn(batches[0])
                settle(source, batches[0])
            else:
                source.learn_alone()
            largest = largest_inputs(source, recipe, batches)
            plan = make_plan(source, recipe, layout=layout, keep_misfits=keep_misfits, largest=largest)
            check(plan)
            for site in [s for t in plan.quantized for s in t.sites]:
                check_finite(site, site.region(source.names.params[site.param]))
            if plan.calibrated and not batches:
                raise DataError("The recipe needs calibration batches, and none were given. Pass calibration=[…].")
            instance = source.instance()
            try:
                done = _rounded(source, instance, plan, batches, progress or (lambda done, total, what: None))
            finally:
                instance.leave_inputs()
    finally:
        model.train(training)
    return source, plan, done


@contextmanager
def _experts_one_by_one(model: torch.nn.Module) -> Iterator[None]:
    """transformers' experts are multiplied one by one, as packed ones are; afterwards too, if they were packed."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if hasattr(c, "_experts_implementation")}
    before = [(c, c._experts_implementation) for c in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if not any(isinstance(m, QStack) for m in model.modules()):
            for config, own in before:
                config._experts_implementation = own


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no block keeps its keys and values: a block is run several times on one text, and would see those of earlier runs."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    before = [(c, c.use_cache) for c in {id(c): c for c in found if hasattr(c, "use_cache")}.values()]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, own in before:
            config.use_cache = own


def _rounded(
    source: InMemory,
    instance: Instance,
    plan: Plan,
    batches: list[Inputs],
    progress: Callable[[int, int, str], None],
) -> dict[str, LayerValues]:
    """Tensor → its codes. The module's parameters hold the rounded values afterwards."""
    tensors = plan.tensors
    units = source.units_of(instance)
    found: dict[str, LayerValues] = {}
    heads: dict[str, Seen] = {}
    budget = Budget(1 << 62)
    loss = LossKnown(budget, None)

    def work(members: list[PlannedTensor], forwards: Sequence[Forward], originals: Sequence[Forward] = ()) -> None:
        own = Original(original.instance, originals) if originals else None
        work = Work(plan, instance, members, forwards, own, heads=heads, loss=loss)
        carry_out(work)
        for t in members:
            parts = [work.results[s.name].q for s in t.sites if s.name in work.results]
            if parts:
                found[t.name] = LayerValues(stack_rows(parts), work.grids.get(t.name))

    followed = batches if any(s.follows_original for s in plan.steps()) else []
    whole = [one for one in plan.selected if one.step.scope == "whole" and one.groups]
    original = _copy(source) if followed or whole else units
    # The copy that is followed is rewritten; what the whole model is held to stays as it was given.
    given = (_copy(source) if followed else original) if whole else units
    outside = [t for t in tensors if t.block is None]
    if not batches:
        work(list(tensors), ())
        return found
    with (
        Stream(units, batches, budget, None) as stream,
        Stream(original, followed, budget, None) as floats,
        loss,
    ):
        if looks_at_loss(plan):
            loss.learn(plan, original, batches, budget, None)
        stream.begin()
        floats.begin()
        # Without these nothing before the units is changed that the order of the work would matter for.
        tables = any(s.kind == "embedding" for t in plan.quantized for s in t.sites)
        rewrites = any(one.step.kind == "rewrite" for one in plan.selected)
        front = plan.front(units.early) if tables or rewrites else []
        if front:
            heads.update(inputs_of_heads(units, plan.told_by_heads, batches, budget, None))
            work(front, [partial(units.begin, b) for b in stream.batches])
            stream.begin()
            floats.begin()

        def visit(i: int, streams: Sequence[Stream]) -> None:
            if streams[0] is stream:
                work([t for t in tensors if t.block == i], stream.forwards(i), floats.forwards(i))

        for i in walk([[stream], [floats] if followed else []], visit):
            progress(i, len(units) + 1, f"unit {i + 1} of {len(units)}")
        ends = [[lambda p=p, s=s: s.output(*p) for p in s.pieces()] for s in (stream, floats)]
        work([t for t in outside if t not in front], *ends)
    for one in whole:
        _finish(Finished(plan, lambda t: found[t.name], instance, given.instance, batches), one, found)
    return found


def _finish(finished: Finished, one: Selected, found: dict[str, LayerValues]) -> None:
    """A repair of the whole model, and what it has learned put in its place."""
    assert one.step.apply is not None
    one.step.apply(finished, one.sites, **one.options)
    found.update(finished.replaced)
    for name, value in finished.changed.items():
        finished.tensor(name).copy_(value)


def _copy(source: InMemory) -> Units:
    """The original, whose weights stay as they are."""
    model = source.model
    copied = InMemory(model.original() if isinstance(model, Straight) else copy.deepcopy(model))
    if source.whole:
        copied.run_as_whole(source.facts)
    return copied.units_of(copied.instance())


def install_plan(source: InMemory, plan: Plan, values: dict[str, LayerValues]) -> None:
    """Packed modules in the place of those that a plan quantizes.

    Args:
        values: the numbers of every tensor that it quantizes.
    """
    planned = plan.quantized
    by_param: dict[str, list[Site]] = {}
    inputs = {}
    placed = {t.name: t.placed for t in planned}
    loose: set[str] = set()
    for t in planned:
        inputs[t.name] = t.scheme.inputs if t.scheme else None
        for site in t.sites:
            by_param.setdefault(site.param, []).append(site)
    for param, sites in by_param.items():
        layers = {s.tensor: (values[s.tensor], inputs[s.tensor]) for s in sites}
        if not install(source.model, source.names, sites, layers, source.names.params[param].dtype):
            loose |= layers.keys()
    remember(source.model, placed, values, loose, plan.facts, [s for t in planned for s in t.sites])


def _check(model: torch.nn.Module) -> None:
    """Refuse what cannot be changed in place, or has no numbers."""
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise SchemeError(
            f"{type(model).__name__} is compiled, and its layers cannot be replaced. Quantize the module that it was made of."
        )
    if any(name == "weight" for name, _ in model.named_parameters(recurse=False)) and not len(list(model.children())):
        raise SchemeError(
            f"{type(model).__name__} is a layer itself, and layers are replaced inside of a module. Wrap it in an nn.Sequential."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise DataError(f"{name} has no shape yet. Run the module once on a batch first.")
        if parameter.is_meta:
            raise DataError(f"{name} is on the meta device and has no numbers. Load the weights first.")


def _batches(model: torch.nn.Module, calibration: Any) -> list[Inputs]:
    if calibration is None:
        return []
    if isinstance(calibration, torch.Tensor):
        integers = not calibration.dtype.is_floating_point and calibration.ndim == 2
        calibration = calibration.split(_BATCH) if integers else [calibration]
    elif isinstance(calibration, Mapping):
        calibration = [calibration]
    elif isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise DataError(f"{_KINDS}, got {type(calibration).__name__}.")
    return [_inputs(model, batch) for batch in calibration]


def _inputs(model: torch.nn.Module, batch: Any) -> Inputs:
    if not isinstance(batch, (torch.Tensor, tuple, list, Mapping, Inputs)):
        raise DataError(f"{_KINDS}, got one of the type {type(batch).__name__}.")
    if isinstance(batch, torch.Tensor) and batch.is_meta:
        raise DataError(f"{_KINDS}, got one on the meta device, which has no numbers.")
    if isinstance(batch, torch.Tensor) and "input_ids" not in inspect.signature(model.forward).parameters:
        return Inputs((batch,))
    return Inputs.of(batch)
