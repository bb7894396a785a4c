"""Repairs of networks that find scales without gradients: `scale-search` (EasyQuant) and `para-norm` (the light pipeline of AdaQuant)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import torch

from arrondi.arguments import Between
from arrondi.formats import LayerScheme, PerChannel
from arrondi.model import Site
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps.layers import Layer, inside_only, layers_of, sampled
from arrondi.pipeline.steps.options import SampledRows
from arrondi.pipeline.steps.reconstruct import FLOATS, biases_change, of_units
from arrondi.pipeline.work import Work
from arrondi.repair.cosine import best_input_scale, best_weight_scales, codes_at
from arrondi.repair.layer import LayerRows, product
from arrondi.tensor.encoding import code_dtype

_SETTLED = 1e-5


def search_scales(
    work: Work,
    sites: Sequence[Site],
    *,
    alpha: Annotated[float, Between(0.01, 1)] = 0.5,
    beta: Annotated[float, Between(1, 100)] = 2.0,
    candidates: Annotated[int, Between(1, 10_000)] = 100,
    rounds: Annotated[int, Between(1, 100)] = 2,
    rows: SampledRows = 4096,
) -> None:
    """Choose scales of weights and inputs, one after the other, with which every layer gives what is most like the original.

    Codes reach equally far on both sides of zero, as int7 codes of -63 … 63 want it.

    Args:
        alpha, beta: scales between the first one over `beta` and over `alpha` are tried.
        candidates: how many.
        rounds: over weights and input of a layer, at most.
        rows: that are looked at; of convolutions, patches.
    """
    layers = layers_of(work, sites)
    own = inside_only(work.instance.model, int(sites[0].modules[0].partition(".")[0])) if sites else []
    for layer in layers:
        if layer.site.name not in work.results:
            continue
        first = work.results[layer.site.name].q
        weight, most = work.before[layer.site.name].float(), first.scheme.format.qmax
        seen = sampled(work, layer, rows)
        bias = layer.bias
        seen = LayerRows(seen.x, seen.y if bias is None else seen.y - bias)
        shares = torch.linspace(alpha, beta, candidates) if candidates > 1 else torch.ones(1)
        start = scale = (weight.abs().amax(1, keepdim=True) / most).clamp(min=2.0**-100)
        before = -1.0
        for _ in range(rounds):
            given = seen if layer.rounder is None else LayerRows(layer.rounder(seen.x), seen.y)
            scale, cosine = best_weight_scales(weight, given, start, most, shares)
            if layer.rounder is not None and layer.rounder in own:
                share, _ = best_input_scale(seen, codes_at(weight, scale, most) * scale, _rounding(layer), shares)
                layer.rounder.scale.div_(share)
            if float(cosine.mean()) - before < _SETTLED:
                break
            before = float(cosine.mean())
        codes = codes_at(weight, scale, most).to(code_dtype(first.scheme.format))
        found = replace(first, codes=codes, scale=scale.reshape(first.real_scale.shape))
        work.replace(layer.site, found, cosine=float(cosine.mean()))
        if layer.rounder in own:
            own.remove(layer.rounder)  # the first reader of a value has chosen for all


def _rounding(layer: Layer) -> Callable[[torch.Tensor, float], torch.Tensor]:
    rounder = layer.rounder
    assert rounder is not None

    def rounds(x: torch.Tensor, share: float) -> torch.Tensor:
        rounder.change = torch.tensor(1 / share - 1)
        try:
            rounded: torch.Tensor = rounder(x)
            return rounded
        finally:
            rounder.change = None

    return rounds


def para_norm(work: Work, sites: Sequence[Site], *, rows: SampledRows = 16384) -> None:
    """Give every channel of every layer the mean and the variance that it has in the original: scales and biases follow, codes stay.

    Args:
        rows: that are looked at; of convolutions, patches.
    """
    for layer in layers_of(work, sites):
        if layer.site.name not in work.results or layer.bias is None:
            continue
        q, seen, bias = work.results[layer.site.name].q, sampled(work, layer, rows), layer.bias
        x = seen.x if layer.rounder is None else layer.rounder(seen.x)
        given = product(x, q.dequantize()) + bias
        floor = 1e-6 * seen.y.var(0).mean().clamp(min=1e-30)
        gain = ((seen.y.var(0) + floor) / (given.var(0) + floor)).sqrt().clamp(0.5, 2)
        changed = replace(q, scale=(q.real_scale.reshape(len(gain), -1) * gain[:, None]).reshape(q.real_scale.shape))
        work.replace(layer.site, changed, gain=[float(gain.min()), float(gain.max())])
        work.change(layer.bias_name, (bias - given.mean(0)) * gain + seen.y.mean(0))


def by_channel(site: Site, scheme: LayerScheme | None) -> str | None:
    """Why scales are not searched for; None if they are."""
    plain = scheme is not None and scheme.weights.format.kind == "integer" and scheme.weights.symmetric
    if not plain or scheme is None or not isinstance(scheme.weights.granularity, PerChannel):
        return f"scales are searched for symmetric integers by channel, got {scheme}"
    return None


SCALE_SEARCH = Step(
    "scale-search", "repair", "Wu et al. 2020, arXiv:2006.16669", apply=search_scales, needs=FLOATS, scope="unit",
    refuse=by_channel, choose=of_units, cost=20_000.0,
)  # fmt: skip
PARA_NORM = Step(
    "para-norm", "repair", "Hubara et al. 2020, arXiv:2006.10518", apply=para_norm, needs=FLOATS, scope="unit",
    refuse=by_channel, choose=of_units, declare=biases_change, cost=5000.0,
)  # fmt: skip
