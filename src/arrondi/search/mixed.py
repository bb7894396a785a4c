"""Bits for every layer of a network under a budget: `quantize_mixed`, and `mixed_recipe`, which chooses.

Every layer is rounded alone, to every width, and the loss of what the network gives is measured on calibration samples; an integer program then
picks widths. The losses of single layers are taken to add up, which is an approximation, so the choice is measured as a whole beside the best
uniform width that the budget allows, and the better one is taken. Source: Hubara et al. 2020, arXiv:2006.10518.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.documents import to_json
from arrondi.errors import SchemeError, unknown
from arrondi.graph import Program, read_graph
from arrondi.pipeline.network import Chosen, NetworkData, quantize_network
from arrondi.pipeline.recipe import Recipe, Rule
from arrondi.search.allowance import Allowance, products_of
from arrondi.search.budget import choose_under
from arrondi.search.losses import loss_of, output_of, rounded_weight, sole_rule, with_bits
from arrondi.search.nuclear import nuclear_losses
from arrondi.search.timed import measured, one_sample, timed_recipe

MEASURES: Final = ("loss", "nuclear")
WIDTHS: Final = (2, 4, 8)
"""Bits that a file really holds: codes of three bits take four."""


def quantize_mixed(
    model: Any,
    out: str | Path,
    recipe: Recipe,
    data: NetworkData,
    budget: str,
    *,
    measure: str = "loss",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Quantize a network with a width for every layer; see `arrondi.pipeline.network.quantize_network`.

    Args:
        budget: see `Allowance`: `4bpw`, `200KB`, `2.5GBOP`; or a time, `1.5ms`: see `arrondi.search.timed`.
        measure: what a width costs a layer: "loss", of the whole network; or "nuclear", by the layer's own outputs, faster: see `nuclear_losses`.
    """
    if measure not in MEASURES:
        raise unknown("measure of a budget", measure, MEASURES)
    say = progress or (lambda done, total, what: None)
    allowance = Allowance.parse(budget)

    time = allowance.microseconds
    if time is not None and measure != "loss":
        raise SchemeError(f"A budget of time is kept by losses, not by {measure}. Leave --budget-by out.")

    call: list[Sequence[torch.Tensor]] = []

    def choose(program: Program, batches: Sequence[Sequence[torch.Tensor]], rules: Recipe) -> Chosen:
        if time is not None:
            call.append(one_sample(program.graph, batches[0]))
            return timed_recipe(program.graph, batches, rules, time, say)
        return mixed_recipe(program, batches, rules, allowance, say, measure)

    report = quantize_network(model, out, recipe, data, choose=choose, overwrite=overwrite, progress=progress)
    if time is not None:
        report["latency"] = measured(read_graph(out), call[0], time)
        Path(out).with_suffix(".report.json").write_text(to_json(report), encoding="utf-8")
    return report


@torch.no_grad()
def mixed_recipe(
    program: Program,
    batches: Sequence[Sequence[torch.Tensor]],
    recipe: Recipe,
    allowance: Allowance,
    progress: Callable[[int, int, str], None],
    measure: str = "loss",
) -> Chosen:
    """The recipe with a width for every layer.

    Args:
        program: with what flows rounded as it will be.
        batches: its inputs.
        recipe: one rule that rounds weights; others (rewrites, repairs) stay.
        allowance: what all layers may take together.
        measure: see `quantize_mixed`.

    Raises:
        SchemeError: the recipe rounds by several rules, or not to integers; or the budget is too small.
    """
    rule, scheme = sole_rule(recipe)
    layers = list(program.layers.values())
    if not layers:
        raise SchemeError(
            "The network has no layer that could be rounded, so there is nothing to choose. Leave --budget out."
        )
    budget = allowance.limit(sum(program.get_parameter(f"{path}.weight").numel() for path in layers))
    products = products_of(program, batches[0])
    wanted = [output_of(program, batch) for batch in batches]
    schemes = [with_bits(scheme.weights, bits) for bits in WIDTHS]
    choices = {path: [rounded_weight(program, path, scheme) for scheme in schemes] for path in layers}
    costs = [[allowance.cost(q, products[path]) for q in some] for path, some in choices.items()]
    by_norm = nuclear_losses(program, batches[0], choices) if measure == "nuclear" else {}
    losses: list[list[float]] = []
    for i, (path, some) in enumerate(choices.items()):
        progress(i, len(layers), f"layer {i + 1} of {len(layers)} at {', '.join(map(str, WIDTHS))} bits")
        # What is never called as a module (a recurrent cell) is measured by the network.
        losses.append(by_norm.get(path) or [loss_of(program, batches, wanted, {path: q}) for q in some])
    picks = choose_under(losses, costs, budget, allowance.noun)
    note = ""
    uniform = [k for k in range(len(WIDTHS)) if sum(row[k] for row in costs) <= budget]
    if uniform and len(set(picks)) > 1:
        ours = loss_of(
            program,
            batches,
            wanted,
            {p: rounded_weight(program, p, schemes[k]) for p, k in zip(layers, picks, strict=True)},
        )
        plain = loss_of(program, batches, wanted, {p: rounded_weight(program, p, schemes[uniform[-1]]) for p in layers})
        if plain < ours:
            picks = [uniform[-1]] * len(layers)
            note = f"{WIDTHS[uniform[-1]]} bits for every layer lose less than any mix that was found."
    rows = [
        {"layer": path, "bits": WIDTHS[k], "losses": dict(zip(map(str, WIDTHS), loss, strict=True))}
        for path, k, loss in zip(layers, picks, losses, strict=True)
    ]
    chosen = {bits: tuple(path for path, k in zip(layers, picks, strict=True) if WIDTHS[k] == bits) for bits in WIDTHS}
    made = [
        replace(rule, scheme=replace(rule.scheme, weights=with_bits(rule.scheme.weights, bits)), targets=paths)
        for bits, paths in chosen.items()
        if paths and rule.scheme is not None
    ]
    spent = sum(row[k] for row, k in zip(costs, picks, strict=True))
    note = (
        note
        or f"Widths {', '.join(f'{b}: {len(p)} layers' for b, p in chosen.items() if p)} take {spent:,.0f} of {budget:,.0f} {allowance.noun}."
    )
    return Chosen(replace(recipe, rules=_in_place(recipe.rules, rule, made)), rows, note)


def _in_place(rules: Sequence[Rule], old: Rule, new: Sequence[Rule]) -> tuple[Rule, ...]:
    return tuple(r for rule in rules for r in (new if rule is old else (rule,)))
