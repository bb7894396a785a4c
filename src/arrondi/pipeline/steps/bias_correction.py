"""The repair `bias-correction`: a layer's mean error over the calibration tokens is taken out of its bias, see `arrondi.repair.bias`.

A layer without a bias stays as it is and is named: a bias that the model's code does not have would be loaded by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arrondi.errors import SchemeError
from arrondi.model import Site, Source
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Choice, Declared, Step
from arrondi.pipeline.work import Work
from arrondi.repair.bias import mean_shift


def correct(work: Work, sites: Sequence[Site], *, analytic: bool = False) -> None:
    """Let every layer with a bias give, on average over the calibration tokens, what it gives in the original.

    Where the original sends a layer other tokens, only what the rounding of its own weight shifts is taken out. A layer that no token
    reaches keeps its bias.

    Args:
        analytic: of networks of ONNX operators, which have normalizations that tell means without data, and never come here.

    Raises:
        SchemeError: `analytic` of any other model.
    """
    if analytic:
        raise SchemeError("Means without data are those of normalizations in networks of ONNX operators. Leave bias-correction.analytic out.")  # fmt: skip
    for site in sites:
        seen, name = work.seen.get(site.name), _bias_of(site)
        if seen is None or not seen.tokens or any(part.total is None for part in seen.parts):
            continue
        bias, count = work.tensor(name), len(seen.parts)
        pairs = zip(work.before[site.name].chunk(count), work.weight(site).chunk(count), seen.parts, strict=True)
        shift = torch.cat([mean_shift(w, rounded, own.mean, own.float_mean) for w, rounded, own in pairs]).to(bias)
        work.change(name, bias - shift)
        work.facts.setdefault(site.tensor, {})["bias_shift"] = float(shift.square().mean().sqrt())


def choose(source: Source, sites: Sequence[Site], **options: Any) -> Choice:
    """Layers in the blocks that have a bias of their own."""
    own = {
        t.name: t.shape for t in source.tensors if t.block is not None and len(t.params) == 1 and not (t.sites or t.converted)
    }  # fmt: skip
    taken: list[tuple[Site, ...]] = []
    refusals: dict[str, tuple[str, ...]] = {}
    for site in sites:
        whole = site.index is None and site.param_index is None and len(site.modules) == 1
        why = ""
        if site.block is None:
            why = "it lies outside the blocks"
        elif not whole or own.get(_bias_of(site)) != (site.shape[0],):
            why = "there is no bias for its outputs alone, and one that is added would be loaded by nobody"
        if why:
            refusals[why] = (*refusals.get(why, ()), site.name)
        else:
            taken.append((site,))
    return Choice(tuple(taken), refusals)


def declare(source: Source, sites: Sequence[Site], **options: Any) -> Declared:
    """Biases change."""
    return Declared(changed=tuple(_bias_of(site) for site in sites))


def _bias_of(site: Site) -> str:
    return f"{site.tensor.removesuffix('.weight')}.bias"


_NEEDS: frozenset[Need] = frozenset({"mean", "float mean"})

STEP = Step(
    "bias-correction", "repair", "Nagel et al. 2019, arXiv:1906.04721", apply=correct, needs=_NEEDS, scope="site",
    choose=choose, declare=declare, cost=1.0,
)  # fmt: skip
