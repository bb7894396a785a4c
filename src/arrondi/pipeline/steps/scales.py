"""What the steps that search for scales have in common: the readers of an activation, with their deployed rounding.

Owns: `seen_by`, `readers_of` and the reductions from columns to channels. Weights are rounded to nearest by the scheme that the plan
gives them, whatever method will round them: what is best for the nearest codes is what later methods start from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from arrondi.formats import ActivationScheme, Scheme
from arrondi.formats.format import integer
from arrondi.model import Site
from arrondi.pipeline.folding import Joint
from arrondi.pipeline.statistics import Need, Seen
from arrondi.pipeline.work import Work
from arrondi.rewrite.channels import reduce_columns
from arrondi.rewrite.search import Reader
from arrondi.rounding.rtn import nearest
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.ranges.observed import static_grid
from arrondi.tensor.rows import rowwise

_ROWS = 512
"""Rows of a weight by which a scale is judged, where each row is rounded by itself; they are spread evenly."""


def seen_by(work: Work, joints: Sequence[Joint], needs: Collection[Need]) -> dict[str, Seen]:
    """Site → what calibration says of its input as it is before it is rounded, for all readers of all joints in one pass."""
    readers = [s for joint in joints for s in joint.readers]
    with work.instance.plain_inputs():
        return work.statistics(readers, needs)


def needs_of_search(work: Work, joints: Sequence[Joint]) -> set[Need]:
    """What has to be known to judge scales: second moments, and a sample where inputs are rounded too."""
    planned = [work.planned[s.name] for joint in joints for s in joint.readers]
    rounded = any(t.scheme is not None and t.scheme.inputs is not None for t in planned)
    return {"moment", "sample", "absmax"} if rounded else {"moment"}


def say(work: Work, joint: Joint, **facts: object) -> None:
    """What the report says of every reader."""
    for site in joint.readers:
        work.facts.setdefault(site.tensor, {}).update(facts)


def shared(joint: Joint, seen: dict[str, Seen]) -> Seen | None:
    """What is known of an activation: by the reader that most tokens reach. Experts see a part of them."""
    known = [seen[s.name] for s in joint.readers if s.name in seen]
    return max(known, key=lambda one: one.tokens) if known else None


def largest_weights(work: Work, joint: Joint) -> torch.Tensor:
    """(channels,) the largest |w| of the columns that read a channel, over all readers."""
    largest = torch.stack([work.weight(s).abs().float().amax(0) for s in joint.readers]).amax(0)
    return reduce_columns(largest, joint.columns(largest.device), joint.count, "amax")


def readers_of(work: Work, joint: Joint, seen: dict[str, Seen]) -> list[Reader]:
    """The readers that tokens reach and that are rounded."""
    hessians: dict[int, torch.Tensor] = {}
    found = []
    for site in joint.readers:
        one = seen.get(site.name)
        if one is None or work.planned[site.name].scheme is None:
            continue
        scheme, weight = work.scheme(site), work.weight(site).float()
        stride = max(len(weight) // _ROWS, 1) if rowwise(scheme.weights) else 1
        some = weight[::stride]
        inputs = scheme.inputs if site.rounds_inputs else None
        hessian = diagonal = None
        if one.moment is not None:
            if inputs is None and id(one) not in hessians:
                hessians[id(one)] = one.moment.matrix().to(weight.device)
            hessian, diagonal = hessians.get(id(one)), one.moment.diagonal().to(weight.device)
        sample = None if one.sample is None else one.sample.rows().to(weight.device)
        rounds = _weight_rounding(_judged_by(scheme.weights), diagonal, site)
        rounds_inputs = None if inputs is None else _input_rounding(inputs, one)
        found.append(Reader(some, rounds, hessian, rounds_inputs, sample, one.tokens, len(weight) / len(some)))
    return found


def _judged_by(scheme: Scheme) -> Scheme:
    """A scheme that a weight is rounded to again and again: integers for learned values, and nothing is kept apart."""
    format = integer(scheme.format.bits) if scheme.format.learned else scheme.format
    return replace(scheme, format=format, table=None, apart=None)


def _weight_rounding(
    scheme: Scheme, diagonal: torch.Tensor | None, site: Site
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def rounds(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        importance = None if diagonal is None else diagonal / columns.square()
        return nearest(weight, scheme, importance, name=site.name).dequantize()

    return rounds


def _input_rounding(inputs: ActivationScheme, seen: Seen) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def rounds(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        if inputs.dynamic is True:
            return fake_quantize(x, inputs.scheme)
        assert seen.absmax is not None
        # The stored range will be that of all tokens; on which side the largest lies is read off the sample.
        reach = (seen.absmax.to(x.device) / columns).max()
        low, high = torch.aminmax(x)
        widened = reach / torch.maximum(-low, high).clamp(min=torch.finfo(torch.float32).tiny)
        grid = static_grid((low * widened).clamp(max=0).cpu(), (high * widened).clamp(min=0).cpu(), inputs)
        return fake_quantize(x, inputs.scheme, grid)

    return rounds
