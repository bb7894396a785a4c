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

from arrondi.errors import SchemeError, unknown
from arrondi.formats import Scheme, get_format
from arrondi.graph import Program
from arrondi.pipeline.network import Chosen, NetworkData, quantize_network
from arrondi.pipeline.recipe import Recipe, Rule
from arrondi.search.allowance import Allowance, products_of
from arrondi.search.budget import choose_under
from arrondi.search.nuclear import nuclear_losses
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor

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
        budget: see `Allowance`: `4bpw`, `200KB`, `2.5GBOP`.
        measure: what a width costs a layer: "loss", of the whole network; or "nuclear", by the layer's own outputs, faster: see `nuclear_losses`.
    """
    if measure not in MEASURES:
        raise unknown("measure of a budget", measure, MEASURES)
    say = progress or (lambda done, total, what: None)
    allowance = Allowance.parse(budget)

    def choose(program: Program, batches: Sequence[Sequence[torch.Tensor]], rules: Recipe) -> Chosen:
        return mixed_recipe(program, batches, rules, allowance, say, measure)

    return quantize_network(model, out, recipe, data, choose=choose, overwrite=overwrite, progress=progress)


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
    rules = [rule for rule in recipe.rules if rule.scheme is not None]
    if len(rules) != 1 or rules[0].scheme is None or rules[0].scheme.weights.format.kind != "integer":
        raise SchemeError("A budget chooses widths for one rule that rounds to integers. Give --scheme and --method.")
    (rule,) = rules
    scheme = rules[0].scheme
    layers = list(program.layers.values())
    budget = allowance.limit(sum(program.get_parameter(f"{path}.weight").numel() for path in layers))
    products = products_of(program, batches[0])
    wanted = [_output(program, batch) for batch in batches]
    schemes = [_with_bits(scheme.weights, bits) for bits in WIDTHS]
    choices = {path: [_rounded(program, path, scheme) for scheme in schemes] for path in layers}
    costs = [[allowance.cost(q, products[path]) for q in some] for path, some in choices.items()]
    by_norm = nuclear_losses(program, batches[0], choices) if measure == "nuclear" else {}
    losses: list[list[float]] = []
    for i, (path, some) in enumerate(choices.items()):
        progress(i, len(layers), f"layer {i + 1} of {len(layers)} at {', '.join(map(str, WIDTHS))} bits")
        # What is never called as a module (a recurrent cell) is measured by the network.
        losses.append(by_norm.get(path) or [_loss(program, batches, wanted, {path: q}) for q in some])
    picks = choose_under(losses, costs, budget, allowance.noun)
    note = ""
    uniform = [k for k in range(len(WIDTHS)) if sum(row[k] for row in costs) <= budget]
    if uniform and len(set(picks)) > 1:
        ours = _loss(
            program, batches, wanted, {p: _rounded(program, p, schemes[k]) for p, k in zip(layers, picks, strict=True)}
        )
        plain = _loss(program, batches, wanted, {p: _rounded(program, p, schemes[uniform[-1]]) for p in layers})
        if plain < ours:
            picks = [uniform[-1]] * len(layers)
            note = f"{WIDTHS[uniform[-1]]} bits for every layer lose less than any mix that was found."
    rows = [
        {"layer": path, "bits": WIDTHS[k], "losses": dict(zip(map(str, WIDTHS), loss, strict=True))}
        for path, k, loss in zip(layers, picks, losses, strict=True)
    ]
    chosen = {bits: tuple(path for path, k in zip(layers, picks, strict=True) if WIDTHS[k] == bits) for bits in WIDTHS}
    made = [
        replace(rule, scheme=replace(rule.scheme, weights=_with_bits(rule.scheme.weights, bits)), targets=paths)
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


def _with_bits(scheme: Scheme, bits: int) -> Scheme:
    return replace(scheme, format=get_format(f"{'int' if scheme.format.qmin < 0 else 'uint'}{bits}"))


def _rounded(program: Program, path: str, scheme: Scheme) -> QTensor:
    return quantize_tensor(program.get_parameter(f"{path}.weight").detach().flatten(1), scheme)


def _output(program: Program, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    output = program(*batch)
    return (output[0] if isinstance(output, tuple) else output).float()


def _loss(
    program: Program,
    batches: Sequence[Sequence[torch.Tensor]],
    wanted: Sequence[torch.Tensor],
    weights: dict[str, QTensor],
) -> float:
    """What the network loses with these weights: the divergence of its classes, or the squared difference where it gives no classes."""
    parameters = {path: program.get_parameter(f"{path}.weight") for path in weights}
    before = {path: weight.detach().clone() for path, weight in parameters.items()}
    for path, weight in parameters.items():
        weight.copy_(weights[path].dequantize().reshape(weight.shape))
    total = count = 0.0
    try:
        for batch, reference in zip(batches, wanted, strict=True):
            given = _output(program, batch)
            if reference.ndim == 2 and reference.shape[1] > 1:
                p, q = reference.log_softmax(1), given.log_softmax(1)
                total += float((p.exp() * (p - q)).sum())
                count += len(reference)
            else:
                total += float((given - reference).square().sum())
                count += float(reference.square().sum())
    finally:
        for path, weight in parameters.items():
            weight.copy_(before[path])
    return max(total / max(count, 1e-30), 1e-12)
