"""Repairs of networks that learn one layer after another on rows that it reads: `layer-sides` (AdaRound) and `layer-tune` (AdaQuant).

A layer is held to what it gives in the original, behind its activation, for what the network quantized so far gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from arrondi.formats import LayerScheme
from arrondi.model import Site, Source
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Choice, Declared, Step
from arrondi.pipeline.steps.layers import ROWS, Layer, layers_of, networks_only, sampled
from arrondi.pipeline.steps.options import Batch, Iterations, Rate, Regular, SampledRows
from arrondi.pipeline.work import Work
from arrondi.repair.layer import LayerLoss, LayerRows, descend, errors
from arrondi.repair.sides import SoftSides
from arrondi.repair.soft import SoftRounding, learns_rounding
from arrondi.rounding.adaround import beta_of
from arrondi.tensor.qtensor import QTensor


def learn_sides(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Iterations = 400,
    rate: Rate = 0.01,
    regular: Regular = 1.0,
    rows: SampledRows = ROWS,
    batch: Batch = 512,
) -> None:
    """Learn to which side every weight is rounded, with the activation in the loss.

    Outputs for which the codes that were there before do better keep them.

    Args:
        iterations: of Adam.
        rate: of Adam, of V.
        regular: weight of the regulariser, beside the error in units of what the first codes leave.
        rows: that are looked at; of convolutions, patches.
        batch: rows of one iteration.
    """
    for layer in layers_of(work, sites):
        q = _learned_q(work, layer.site)
        if q is not None:
            _learn_sides(work, layer, q, iterations, rate, regular, rows, batch)


def _learn_sides(
    work: Work, layer: Layer, q: QTensor, iterations: int, rate: float, regular: float, rows: int, batch: int
) -> None:
    seen, loss = _prepared(work, layer, rows)
    bias, soft = layer.bias, SoftSides.at(q, work.before[layer.site.name])
    first = float(loss(seen, q.dequantize(), bias))

    def error(chosen: torch.Tensor, step: int) -> torch.Tensor:
        own = loss(LayerRows(seen.x[chosen], seen.y[chosen]), soft.value(), bias)
        return own / max(first, 1e-12) + regular * soft.undecided(beta_of(step, iterations))

    descend(error, [(soft.v, rate)], len(seen), batch=batch, iterations=iterations, falls=False)
    learned = soft.hard()
    # What the layer has now may be better than nearest codes: another method's.
    better = errors(loss, seen, learned.dequantize(), bias) < errors(loss, seen, q.dequantize(), bias)
    kept = replace(q, codes=torch.where(better[:, None], learned.codes, q.codes))
    away, last = float((kept.codes != q.codes).float().mean()), float(loss(seen, kept.dequantize(), bias))
    work.replace(layer.site, kept, layer_error=[first, last], codes_changed=away)


def tune_layers(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Iterations = 400,
    rate: Rate = 0.003,
    grids: bool = True,
    rows: SampledRows = ROWS,
    batch: Batch = 512,
) -> None:
    """Learn weights, which may move by more than one step, with their scales, the bias and the scale of the input.

    The best iterate on rows that are held out is kept.

    Args:
        iterations: of Adam.
        rate: of Adam at first: steps of the grid a weight moves, and a tenth of it by which scales change.
        grids: learn the scale of the input too.
        rows: that are looked at; of convolutions, patches.
        batch: rows of one iteration.
    """
    for layer in layers_of(work, sites):
        q = _learned_q(work, layer.site)
        if q is not None:
            _tune(work, layer, q, iterations, rate, grids, rows, batch)


def _tune(
    work: Work, layer: Layer, q: QTensor, iterations: int, rate: float, grids: bool, rows: int, batch: int
) -> None:
    seen, _ = _prepared(work, layer, rows, rounded=False)
    soft = SoftRounding.at(q, work.before[layer.site.name])
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    rounder = layer.rounder if grids and layer.rounder is not None and layer.rounder.on else None
    loss = LayerLoss(layer.activation, layer.rounder or _unchanged)
    held, rest = seen.part(True), seen.part(False)
    paced = [(p, rate * speed) for p, speed in zip(soft.parameters, (1.0, 0.1), strict=True)]
    paced += [] if bias is None else [(bias, rate * max(float(seen.y.std()), 1e-6))]

    def judge() -> float:
        with torch.no_grad():
            return float(loss(held, soft.hard().dequantize(), bias))

    first = judge()
    if rounder is not None:
        rounder.change = torch.zeros((), requires_grad=True)
        paced.append((rounder.change, 0.1 * rate))
    try:
        last = descend(
            lambda chosen, step: loss(LayerRows(rest.x[chosen], rest.y[chosen]), soft.value(), bias),
            paced, len(rest), batch=batch, iterations=iterations, falls=True, limit=soft.limit, judge=judge,
        )  # fmt: skip
    finally:
        if rounder is not None:
            rounder.settle()
    work.replace(layer.site, soft.hard(), layer_error=[first, last])
    if bias is not None:
        work.change(layer.bias_name, bias.detach())


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _learned_q(work: Work, site: Site) -> QTensor | None:
    q = work.results[site.name].q if site.name in work.results else None
    return q if q is not None and learns_rounding(q) else None


def _prepared(work: Work, layer: Layer, rows: int, rounded: bool = True) -> tuple[LayerRows, LayerLoss]:
    """Rows, as the layer multiplies them or before they are rounded, and the loss on them."""
    seen = sampled(work, layer, rows)
    if rounded and layer.rounder is not None:
        seen = LayerRows(layer.rounder(seen.x), seen.y)
    return seen, LayerLoss(layer.activation, _unchanged)


def refuse_plain(site: Site, scheme: LayerScheme | None) -> str | None:
    """Why codes are not learned; None if they are."""
    if scheme is None or scheme.weights.format.kind != "integer" or scheme.weights.zero_point == "float":
        return f"its rounding is not learned: {scheme} has no integer codes with plain scales"
    return None


def of_units(source: Source, sites: Sequence[Site], **options: Any) -> Choice:
    """Sites of networks, those of a unit together."""
    return networks_only(source, sites, together=True)


def biases_change(source: Source, sites: Sequence[Site], **options: Any) -> Declared:
    """Biases of the layers change."""
    there = {t.name for t in source.tensors}
    names = (f"{s.tensor.removesuffix('.weight')}.bias" for s in sites)
    return Declared(changed=tuple(name for name in names if name in there))


FLOATS: frozenset[Need] = frozenset({"float outputs"})

SIDES = Step(
    "layer-sides", "repair", "Nagel et al. 2020, arXiv:2004.10568", apply=learn_sides, needs=FLOATS, scope="unit",
    refuse=refuse_plain, choose=of_units, cost=20_000.0,
)  # fmt: skip
LAYER_TUNE = Step(
    "layer-tune", "repair", "Hubara et al. 2020, arXiv:2006.10518", apply=tune_layers, needs=FLOATS, scope="unit",
    refuse=refuse_plain, choose=of_units, declare=biases_change, cost=20_000.0,
)  # fmt: skip
