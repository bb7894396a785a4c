"""Which layers of a network compute on codes under a budget of time: `timed_recipe`.

A layer's time is measured, not counted: alone in the runtime, once for every distinct shape, from codes to codes and in floating point. What the whole
network takes beyond the sum of its layers is shared out among them, so that networks of one kind of layers cost what was measured. Where kinds
meet, values change between codes and numbers; what was chosen is therefore measured as a whole, and chosen anew under a smaller budget when it
takes too long; in the end all layers have the fastest kind. Source of the program: Hubara et al. 2020, arXiv:2006.10518.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from arrondi.errors import SchemeError
from arrondi.formats import Scheme
from arrondi.graph import Graph, Program, hold_codes
from arrondi.graph.ir import QDQ
from arrondi.graph.neighbourhood import rounded_around
from arrondi.graph.sizes import batch_of, sample_axes
from arrondi.pipeline.network import Chosen
from arrondi.pipeline.recipe import Recipe
from arrondi.search.alone import alike, layer_alone, nothing_of, numbers_for
from arrondi.search.budget import choose_under
from arrondi.search.clock import Clock
from arrondi.search.losses import loss_of, output_of, rounded_weight, sole_rule, with_bits
from arrondi.tensor.qtensor import QTensor

FLOAT: Final = "float"
_TRIES: Final = 5
"""Choices that are measured as a whole at most."""
Kind = int | None
"""Bits of a layer's weights; None where it stays in floating point."""


@dataclass(frozen=True)
class _Times:
    """Microseconds of one call.

    Attributes:
        layers: layer → kind → its own, and its share of the rest.
        whole: kind → the network whose layers all have it.
    """

    layers: Mapping[str, Mapping[Kind, float]]
    whole: Mapping[Kind, float]


@torch.no_grad()
def timed_recipe(
    graph: Graph, batches: Sequence[Sequence[torch.Tensor]], recipe: Recipe, budget: float, progress: Callable[[int, int, str], None],
) -> Chosen:  # fmt: skip
    """The recipe, and the graph, in which some layers stay in floating point.

    Args:
        graph: with what flows on stored grids.
        batches: inputs, calibration samples.
        recipe: see `mixed_recipe`.
        budget: microseconds of one call with one sample, or as many as the network always takes.

    Raises:
        SchemeError: as `mixed_recipe`; ranges follow each tensor; or floating point keeps the budget itself.
    """
    rule, scheme = sole_rule(recipe)
    if any(node.op == QDQ and len(node.inputs) == 1 for node in graph.nodes):
        raise SchemeError("A budget of time chooses between stored ranges and floating point. Give a scheme with static ranges, such as W8A8.")  # fmt: skip
    kinds: list[Kind] = [*sorted({scheme.weights.format.bits, 8}), None]
    net = _Net(graph, one_sample(graph, batches[0]), {k: with_bits(scheme.weights, k) for k in kinds if k is not None})
    if not net.layers:
        raise SchemeError(
            "The network has no layer that could be rounded, so there is nothing to choose. Leave --budget out."
        )
    clock = Clock()
    times = net.times(clock, kinds)
    if times.whole[None] <= budget:
        raise SchemeError(f"In floating point the network takes {times.whole[None]:,.0f} microseconds in {clock.runtime}, within the budget of {budget:,.0f}: nothing has to be rounded. Lower --budget, or leave it out.")  # fmt: skip
    wanted = [output_of(Program(net.plain), batch) for batch in batches]
    losses: list[list[float]] = []
    for i, layer in enumerate(net.layers):
        progress(i, len(net.layers), f"layer {i + 1} of {len(net.layers)} in {', '.join(FLOAT if k is None else f'{k} bits' for k in kinds)}")  # fmt: skip
        losses.append([0.0 if k is None else net.loss({layer: k}, batches, wanted) for k in kinds])
    costs = [[times.layers[layer][k] for k in kinds] for layer in net.layers]
    # The uniform network that is fastest keeps any budget that can be kept; between it and the budget the program's own is looked for.
    fastest = min(kinds, key=lambda k: times.whole[k])
    tried: list[tuple[bool, float, float, dict[str, Kind]]] = []

    def tries(chosen: dict[str, Kind]) -> bool:
        (took,) = clock.times([net.made(chosen)], [net.inputs])
        tried.append((took > budget, took if took > budget else net.loss(chosen, batches, wanted), took, chosen))
        return took <= budget

    low, target = times.whole[fastest], budget
    for _ in range(_TRIES):
        try:
            picks = choose_under(losses, costs, target, "microseconds")
        except SchemeError:
            if not tried:
                raise
            break
        if tries({layer: kinds[k] for layer, k in zip(net.layers, picks, strict=True)}):
            break
        target = (low + target) / 2
    if all(one[0] for one in tried):
        tries(dict.fromkeys(net.layers, fastest))
    _, _, took, chosen = min(tried, key=lambda one: one[:2])
    rows = [
        {
            "layer": layer, "bits": FLOAT if chosen[layer] is None else chosen[layer],
            "losses": {_word(k): v for k, v in zip(kinds, loss, strict=True)},
            "microseconds": {_word(k): round(v, 1) for k, v in times.layers[layer].items()},
        }
        for layer, loss in zip(net.layers, losses, strict=True)
    ]  # fmt: skip
    counts = {k: sum(kind == k for kind in chosen.values()) for k in kinds}
    note = f"Layers {', '.join(f'{_word(k)}: {n}' for k, n in counts.items() if n)}: {took:,.0f} of {budget:,.0f} microseconds in {clock.runtime}, threads: {clock.threads}, weights rounded to nearest; in floating point {times.whole[None]:,.0f}."  # fmt: skip
    kept = rounded_around(graph, {layer for layer, kind in chosen.items() if kind is not None})
    paths = net.paths(Program(kept))
    made = [
        replace(rule, scheme=replace(rule.scheme, weights=net.schemes[k]), targets=tuple(p for n, kind in chosen.items() if kind == k for p in paths[n]))
        for k in kinds if k is not None and counts[k] and rule.scheme is not None
    ]  # fmt: skip
    rules = tuple(r for one in recipe.rules for r in (made if one is rule else (one,)))
    return Chosen(replace(recipe, rules=rules), rows, note, kept)


def measured(graph: Graph, inputs: Sequence[torch.Tensor], budget: float) -> dict[str, Any]:
    """What a network takes: `milliseconds` of one call, whether that is `kept` within `budget_ms`, the `runtime` and its `threads`."""
    clock = Clock()
    (took,) = clock.times([graph], [inputs])
    return {
        "milliseconds": took / 1e3, "budget_ms": budget / 1e3, "kept": took <= budget, "runtime": clock.runtime, "threads": clock.threads,
        "samples": batch_of(graph) or 1,
    }  # fmt: skip


def one_sample(graph: Graph, batch: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One sample, or as many as the network always takes."""
    count, axes = batch_of(graph) or 1, sample_axes(graph)
    return tuple(
        x if axis is None else x.narrow(axis, 0, 1).repeat_interleave(count, axis)
        for x, axis in zip(batch, axes, strict=True)
    )


def _word(kind: Kind) -> str:
    return FLOAT if kind is None else str(kind)


class _Net:
    """A network with grids of what flows, and what it becomes.

    Attributes:
        plain: it without grids.
        inputs: one call's.
        schemes: bits → the scheme of weights.
        layers: nodes whose weights are rounded.
    """

    def __init__(self, graph: Graph, inputs: tuple[torch.Tensor, ...], schemes: Mapping[int, Scheme]) -> None:
        self.graph, self.inputs, self.schemes = graph, inputs, schemes
        self.plain = rounded_around(graph, ())
        program = Program(graph)
        named = self.paths(program)
        self.layers = list(named)
        self.codes = {
            (node, k): {layer: rounded_weight(program, path, scheme) for layer, path in zip(self._parts[node], paths, strict=True)}
            for node, paths in named.items() for k, scheme in schemes.items()
        }  # fmt: skip
        self.values: dict[str, torch.Tensor] = {}
        Program(self.plain).watch(inputs, lambda name, value: self.values.setdefault(name, value))

    def paths(self, program: Program) -> dict[str, list[str]]:
        """Node → the modules of its layers in a program of the same layers."""
        self._parts: dict[str, list[str]] = {}
        for node in program.graph.nodes:
            own = [
                n
                for n in program.layers
                if n == node.name or n.startswith((f"{node.name}.enter.", f"{node.name}.again."))
            ]
            if own:
                self._parts[node.name] = own
        return {node: [program.layers[n] for n in own] for node, own in self._parts.items()}

    def made(self, chosen: Mapping[str, Kind]) -> Graph:
        """The graph as it would be written, weights rounded to nearest."""
        kept = rounded_around(self.graph, {layer for layer, kind in chosen.items() if kind is not None})
        return hold_codes(kept, self._weights(chosen))

    def _weights(self, chosen: Mapping[str, Kind]) -> dict[str, QTensor]:
        return {n: q for node, kind in chosen.items() if kind is not None for n, q in self.codes[node, kind].items()}

    def loss(self, chosen: Mapping[str, Kind], batches: Sequence[Sequence[torch.Tensor]], wanted: Sequence[torch.Tensor]) -> float:  # fmt: skip
        """What the network loses with these layers on codes, all others in floating point."""
        program = Program(rounded_around(self.graph, {layer for layer, kind in chosen.items() if kind is not None}))
        return loss_of(program, batches, wanted, {program.layers[n]: q for n, q in self._weights(chosen).items()})

    def times(self, clock: Clock, kinds: Sequence[Kind]) -> _Times:
        """Of every layer in every kind, and of the network."""
        seen: dict[Any, list[float]] = {}
        alone: dict[str, list[float]] = {}
        for layer in self.layers:
            forms = [layer_alone(self.made({layer: k} if k else {}), layer, self.values) for k in kinds]
            key = tuple(map(alike, forms))
            if key not in seen:
                graphs = [*forms, *map(nothing_of, forms)]
                took = clock.times(graphs, list(map(numbers_for, graphs)))
                pairs = zip(took[: len(forms)], took[len(forms) :], strict=True)
                seen[key] = [max(own - call, 0.0) for own, call in pairs]
            alone[layer] = seen[key]
        wholes = clock.times([self.made(dict.fromkeys(self.layers, k)) for k in kinds], [self.inputs] * len(kinds))
        rest = [
            (whole - sum(times[i] for times in alone.values())) / len(self.layers) for i, whole in enumerate(wholes)
        ]
        shared = {n: {k: t + r for k, t, r in zip(kinds, times, rest, strict=True)} for n, times in alone.items()}
        return _Times(shared, dict(zip(kinds, wholes, strict=True)))
