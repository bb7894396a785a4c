"""What repairs of networks know of one layer: `Layer`, and `sampled`, rows that it reads with what the original gives for them.

Networks are `arrondi.graph.Program`s: the unit of a site is a `Part`, whose rounders say how what flows is rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.graph import Part, Program, Rounder
from arrondi.model import Site, Source
from arrondi.nn.conv import given, multiplied, positions
from arrondi.pipeline.step import Choice
from arrondi.pipeline.work import Work
from arrondi.repair.layer import LayerRows

ROWS = 8192
"""Rows of a sample."""


@dataclass(frozen=True)
class Layer:
    """A layer of a network with what surrounds it.

    Attributes:
        site: its weight.
        module: it.
        rounder: what rounds its input, None where nothing does, or not on one uniform grid.
        activation: what follows it, on (rows, outputs).
    """

    site: Site
    module: torch.nn.Module
    rounder: Rounder | None
    activation: Callable[[torch.Tensor], torch.Tensor]

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.module._parameters.get("bias")
        return bias

    @property
    def bias_name(self) -> str:
        return f"{self.site.tensor.removesuffix('.weight')}.bias"


def layers_of(work: Work, sites: Sequence[Site]) -> list[Layer]:
    """The layers of a unit in the order in which they are run."""
    order = {param: i for i, param in enumerate(p for stage in work.stages for p in stage.leaders)}
    return [_layer(work, site) for site in sorted(sites, key=lambda s: order.get(s.param, len(order)))]


def _layer(work: Work, site: Site) -> Layer:
    number, _, name = site.modules[0].partition(".")
    part: Part = work.instance.model[int(number)]
    module, around = part.get_submodule(name), part.around(name)
    rounder = None if around.rounder is None else part.get_submodule(around.rounder)
    assert rounder is None or isinstance(rounder, Rounder)
    rounder = None if rounder is not None and rounder.uneven else rounder
    axes = site.shape[2:]
    return Layer(site, module, rounder, lambda y: part.activate(around, y, len(axes)))


class _Enough(Exception):
    """What was wanted has been seen."""


def sampled(work: Work, layer: Layer, rows: int = ROWS, seed: int = 0) -> LayerRows:
    """Rows that the layer reads in the quantized network, not yet rounded, and what it gives for them in the original.

    The same places of every calibration sample, chosen at random.
    """
    assert work.original is not None, "a step that needs float outputs says so"
    path = layer.site.modules[0]
    other = work.original.instance.model.get_submodule(path)
    wanted, read = [], []
    per = -(-rows // max(len(work.forwards), 1))
    for j, (ours, theirs) in enumerate(zip(work.forwards, work.original.forwards, strict=True)):
        y = _seen(other, theirs, False)
        count, generator = positions(y, other), torch.Generator().manual_seed(seed * 1000 + j)
        chosen = torch.randperm(count, generator=generator)[:per]
        wanted.append(given(y, other, chosen).clone())
        with _unrounded(layer.rounder):
            read.append(multiplied(_seen(layer.module, ours, True), layer.module, chosen))
    return LayerRows(torch.cat(read), torch.cat(wanted))


@contextlib.contextmanager
def _unrounded(rounder: Rounder | None) -> Iterator[None]:
    if rounder is None:
        yield
        return
    rounder.on = False
    try:
        yield
    finally:
        rounder.on = True


def _seen(module: torch.nn.Module, forward: Callable[[], object], before: bool) -> torch.Tensor:
    """What enters a module, or what leaves it, in one pass."""
    found: list[torch.Tensor] = []

    def note(*seen: Any) -> None:
        found.append(seen[1][0] if before else seen[2])
        raise _Enough

    handle = module.register_forward_pre_hook(note) if before else module.register_forward_hook(note)
    try:
        with contextlib.suppress(_Enough):
            forward()
    finally:
        handle.remove()
    return found[0]


def networks_only(source: Source, sites: Sequence[Site], together: bool = False) -> Choice:
    """The sites of a network, each alone or those of a unit together; of other models nothing."""
    if not isinstance(source.model, Program):
        return Choice((), {"it is for networks of operators, .onnx and .pt2 files": tuple(s.name for s in sites)})
    groups: dict[Any, list[Site]] = {}
    inner = tuple(s.name for s in sites if s.modules[0].count(".") > 1)
    for site in sites:
        if site.name in inner:
            continue
        groups.setdefault(site.block if together else site.name, []).append(site)
    refusals = {"it is a part of a recurrent layer, whose inputs come one after another": inner} if inner else {}
    return Choice(tuple(tuple(group) for group in groups.values()), refusals)


def entering(part: torch.nn.Module, forwards: Sequence[Callable[[], object]]) -> list[tuple[torch.Tensor, ...]]:
    """What enters a unit, for every batch: its arguments."""
    found: list[tuple[torch.Tensor, ...]] = []
    for forward in forwards:
        args: list[tuple[torch.Tensor, ...]] = []

        def note(module: Any, given: tuple[torch.Tensor, ...], args: list[Any] = args) -> None:
            args.append(given)
            raise _Enough

        handle = part.register_forward_pre_hook(note)
        try:
            with contextlib.suppress(_Enough):
                forward()
        finally:
            handle.remove()
        found.append(args[0])
    return found


def inside_only(program: Program, number: int) -> list[Rounder]:
    """The rounders of a unit that no other unit has, those that are on."""
    others = {id(m) for i, part in enumerate(program) if i != number for m in part.modules()}
    own = dict.fromkeys(m for m in program[number].modules() if isinstance(m, Rounder))
    return [m for m in own if id(m) not in others and m.on]
