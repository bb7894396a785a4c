"""The repairs `hessian-search` (PTQ4ViT) and `similarity-search` (Liu et al.): scales of weights and of what flows, by what products give.

Every product is looked at on what the original has there, those of two values, as in attention, among them; one side is searched, then the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from arrondi.arguments import Between
from arrondi.graph import Rounder, Use
from arrondi.model import Site
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps.layers import entering, inside_only
from arrondi.pipeline.steps.options import Batch
from arrondi.pipeline.steps.reconstruct import FLOATS, of_units
from arrondi.pipeline.steps.scale_search import by_channel
from arrondi.pipeline.work import Work
from arrondi.repair.cosine import codes_at
from arrondi.repair.products import correlation, disorder, weighted
from arrondi.tensor.encoding import code_dtype

Tensor = torch.Tensor


@dataclass
class Seen:
    """A product on samples of the original.

    Attributes:
        use: it.
        sides: what it multiplies, not rounded; one tensor of a layer, two of others.
        output: what it gives. slope: the gradient of the loss there.
    """

    use: Use
    sides: list[Tensor]
    output: Tensor
    slope: Tensor


def hessian_search(
    work: Work,
    sites: Sequence[Site],
    *,
    alpha: Annotated[float, Between(0.001, 1)] = 0.01,
    beta: Annotated[float, Between(1, 100)] = 1.2,
    candidates: Annotated[int, Between(1, 10_000)] = 100,
    rounds: Annotated[int, Between(1, 100)] = 3,
    samples: Batch = 32,
) -> None:
    """Choose scales by the errors of products, weighted by the gradient of the loss, weights and values one after the other.

    Args:
        alpha, beta: shares of the scale of the whole range between which is looked.
        candidates: how many.
        rounds: over both sides of a product.
        samples: of calibration that are looked at.
    """
    _search(work, sites, torch.linspace(alpha, beta, candidates).tolist(), rounds, samples, None)


def similarity_search(
    work: Work,
    sites: Sequence[Site],
    *,
    alpha: Annotated[float, Between(0.001, 1)] = 0.5,
    beta: Annotated[float, Between(1, 100)] = 1.2,
    candidates: Annotated[int, Between(1, 10_000)] = 100,
    rounds: Annotated[int, Between(1, 100)] = 2,
    samples: Batch = 32,
    ranking: Annotated[float, Between(0, 1000)] = 0.1,
) -> None:
    """Choose scales by the correlation of what products give with what they should, weights and values one after the other.

    Args:
        alpha, beta: shares of the scale of the whole range between which is looked.
        candidates: how many.
        rounds: over both sides of a product.
        samples: of calibration that are looked at.
        ranking: weight of the order of attention scores, beside the correlation.
    """
    _search(work, sites, torch.linspace(alpha, beta, candidates).tolist(), rounds, samples, ranking)


def _search(
    work: Work, sites: Sequence[Site], shares: Sequence[float], rounds: int, samples: int, ranking: float | None
) -> None:
    """Both; `ranking` None: by weighted errors."""
    if not sites:
        return
    number = int(sites[0].modules[0].partition(".")[0])
    part, own = work.instance.model[number], set(inside_only(work.instance.model, number))
    by_module = {s.modules[0].partition(".")[2]: s for s in sites if s.name in work.results}
    for seen in _seen(work, number, samples):

        def score(given: Tensor, axis: int | None = None, seen: Seen = seen) -> Tensor:
            if ranking is None:
                return weighted(seen.output, given, seen.slope, axis)
            found = correlation(seen.output, given, axis)
            scores = axis is None and ranking > 0 and seen.use.scores
            return found - ranking * disorder(seen.output, given) if scores else found

        use = seen.use
        rounders = [None if n is None else part.get_submodule(n) for n in use.rounders]
        free = [r if isinstance(r, Rounder) and r in own and r.on else None for r in rounders]
        looks = [None if r is None else r.looks(x, shares) for r, x in zip(free, seen.sides, strict=True)]
        site = by_module.get(use.module or "")
        if use.module is not None and site is not None:
            _layer(work, site, part, seen, rounders[0], score, shares, rounds, looks[0])
        elif use.module is None:
            _pair(seen, rounders, score, rounds, looks)
        own -= {r for r in free if r is not None}  # the first reader of a value has chosen for all


def _layer(
    work: Work, site: Site, part: Any, seen: Seen, rounder: Any, score: Callable[..., Tensor],
    shares: Sequence[float], rounds: int, looks: list[Tensor] | None,
) -> None:  # fmt: skip
    """A layer: its weight, channel by channel, then its input."""
    assert seen.use.module is not None
    module, first = part.get_submodule(seen.use.module), work.results[site.name].q
    weight, most = work.before[site.name].float(), first.scheme.format.qmax
    axis = -1 if isinstance(module, torch.nn.Linear) else 1

    def product(x: Tensor, w: Tensor) -> Tensor:
        x = x if seen.use.padding is None else seen.use.padding(x)
        return torch.func.functional_call(module, {"weight": w.reshape(module.weight.shape)}, (x,))

    def by_weight(w: Tensor, side: Tensor) -> Tensor:
        return score(product(side, w))

    start = (weight.abs().amax(1, keepdim=True) / most).clamp(min=2.0**-100)
    scale, (x,) = start, seen.sides
    for _ in range(rounds):
        given = x if rounder is None else rounder(x)
        tried = [score(product(given, codes_at(weight, start * s, most) * start * s), axis) for s in shares]
        best = torch.stack(tried).argmax(0)
        scale = start * torch.tensor(shares)[best][:, None]
        if looks is None:
            break
        rounded = codes_at(weight, scale, most) * scale
        _choose(rounder, x, looks, partial(by_weight, rounded))
    codes = codes_at(weight, scale, most).to(code_dtype(first.scheme.format))
    work.replace(site, replace(first, codes=codes, scale=scale.reshape(first.real_scale.shape)))


def _pair(
    seen: Seen, rounders: Sequence[Any], score: Callable[..., Tensor], rounds: int, looks: Sequence[list[Tensor] | None],
) -> None:  # fmt: skip
    """A product of two values: one, then the other."""

    def rounded(k: int) -> Tensor:
        return seen.sides[k] if rounders[k] is None else rounders[k](seen.sides[k])

    def left(other: Tensor, side: Tensor) -> Tensor:
        return score(side @ other)

    def right(other: Tensor, side: Tensor) -> Tensor:
        return score(other @ side)

    for _ in range(rounds):
        for k, own in enumerate(looks):
            if own is not None:
                other = rounded(1 - k)
                _choose(rounders[k], seen.sides[k], own, partial(left if k == 0 else right, other))


def _choose(rounder: Rounder, x: Tensor, looks: Sequence[Tensor], score: Callable[[Tensor], Tensor]) -> None:
    """Give a rounder the scale with which x gives most."""
    found = []
    for scale in looks:
        rounder.scale.copy_(scale)
        found.append(float(score(rounder(x))))
    rounder.scale.copy_(looks[max(range(len(found)), key=found.__getitem__)])


def _seen(work: Work, number: int, samples: int) -> list[Seen]:
    """The products of a unit, on the first samples, with the gradient of the divergence from the class that the original names."""
    assert work.original is not None, "a step that needs float outputs says so"
    model = work.original.instance.model
    part, batches = model[number], entering(model[number], work.original.forwards)
    x = tuple(torch.cat(own)[:samples].detach() for own in zip(*batches, strict=True))
    x = tuple(t.requires_grad_() if t.dtype.is_floating_point else t for t in x)
    values: dict[str, Tensor] = {}
    with torch.enable_grad():
        output = part(*x, see=values.__setitem__)
        for after in list(model)[number + 1 :]:
            output = after(output)
        if output.ndim == 2 and output.shape[1] > 1:
            loss = F.cross_entropy(output.float(), output.detach().argmax(1), reduction="sum")
        else:
            loss = output.float().square().sum() / 2
        uses = part.uses()
        slopes = torch.autograd.grad(loss, [values[u.node.outputs[0]] for u in uses], allow_unused=True)
    found = []
    for use, slope in zip(uses, slopes, strict=True):
        given = values[use.node.outputs[0]].detach()
        sides = [values[n].detach() for n in use.node.inputs[: len(use.rounders)]]
        found.append(Seen(use, sides, given, torch.ones_like(given) if slope is None else slope))
    return found


HESSIAN_SEARCH = Step(
    "hessian-search", "repair", "Yuan et al. 2022, arXiv:2111.12293", apply=hessian_search, needs=FLOATS, scope="unit",
    refuse=by_channel, choose=of_units, cost=50_000.0,
)  # fmt: skip
SIMILARITY_SEARCH = Step(
    "similarity-search", "repair", "Liu et al. 2021, arXiv:2106.14156", apply=similarity_search, needs=FLOATS, scope="unit",
    refuse=by_channel, choose=of_units, cost=50_000.0,
)  # fmt: skip
