"""Repairs that learn from what the unit should give: `tune` (scales, norms, biases), `signround` (AutoRound), `lkd` (ZeroQuant).

No labels and no other units are needed: the outputs of the original are the teacher. What is learned is kept only if the error on
a part of the calibration batches has fallen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

from arrondi.arguments import Between
from arrondi.formats import LayerScheme
from arrondi.model import Site, Source, TreeStore
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Declared, Step
from arrondi.pipeline.steps.learning import Learner, Rule, Targets, norms_and_biases
from arrondi.pipeline.steps.options import Share
from arrondi.pipeline.work import Work
from arrondi.repair.soft import Soft, SoftRounding, SoftScale, is_nearest, learns_rounding, learns_scales

_RANGE_RATE: Final = 0.003
"""Of Adam, relative to the size of a scale."""


def tune(
    work: Work,
    sites: Sequence[Site],
    *,
    passes: Annotated[int, Between(1, 1000)] = 4,
    rate: Share = 0.003,
    scales: bool = True,
    norms: bool = True,
    codes: bool = False,
) -> None:
    """Learn scales, norms and biases of a unit on the original's outputs for the original's inputs.

    Args:
        passes: over the calibration batches.
        rate: of Adam, relative to the size of what is learned.
        scales: learn the scales of the weights.
        norms: learn norms and biases.
        codes: learn integer codes, too, from those that were chosen.
    """
    soft: dict[str, Soft] = {}
    for site in sites if scales else ():
        q = work.results[site.name].q if site.name in work.results else None
        if q is not None and codes and learns_rounding(q):
            soft[site.name] = SoftRounding.at(q, work.before[site.name])
        elif q is not None and learns_scales(q.scheme) and q.group_index is None:
            soft[site.name] = SoftScale.of(q)
    tensors = [name for name in norms_and_biases(work.plan.source, sites) if norms]
    with work.targets() as wanted:
        _learn(work, sites, soft, tensors, lambda j: wanted[j], "adam", rate, passes * len(wanted))


def signround(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Annotated[int, Between(1, 100_000)] = 200,
    rate: Share = 0.0,
    shrink: bool = True,
    ranges: Annotated[int, Between(0, 100_000)] = 8,
) -> None:
    """Learn to which side weights are rounded, and how far ranges shrink, by the sign of the gradient.

    That is for nearest codes. From codes that were chosen by the outputs, as GPTAQ's are, steps of one size for all weights lead away from
    the optimum that these lie in, however small; of those the ranges alone are learned, by Adam.

    Args:
        iterations: batches.
        rate: at first; 0 is 1 / iterations, so that every weight can just reach its neighbouring level.
        shrink: learn ranges, too.
        ranges: batches on which ranges are learned where codes are not nearest ones.
    """
    if not _nearest(work, sites):
        scales: dict[str, Soft] = {s.name: SoftScale.of(work.results[s.name].q) for s in _learned(work, sites)}
        if ranges:
            with work.targets() as wanted:
                _learn(work, sites, scales, (), lambda j: wanted[j], "adam", _RANGE_RATE, ranges)
        return
    soft = _rounding(work, sites, 0.5, shrink)
    with work.targets() as wanted:
        _learn(work, sites, soft, (), lambda j: wanted[j], "sign", rate or 1 / iterations, iterations)


def lkd(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Annotated[int, Between(1, 100_000)] = 100,
    rate: Share = 0.01,
) -> None:
    """Learn latent weights on what the unrounded unit gives for the inputs that the quantized model has (layer-by-layer distillation).

    Args:
        iterations: batches.
        rate: of Adam, in steps of the grid.
    """
    soft = _rounding(work, sites, float("inf"), False)
    with _unrounded(work, sites) as wanted:
        _learn(work, sites, soft, (), lambda j: wanted[j], "adam", rate, iterations)


def _rounding(work: Work, sites: Sequence[Site], reach: float, shrink: bool) -> dict[str, Soft]:
    return {
        site.name: SoftRounding.of(work.results[site.name].q, work.before[site.name], reach, shrink)
        for site in _learned(work, sites)
    }


def _learned(work: Work, sites: Sequence[Site]) -> list[Site]:
    """Those whose rounding can be learned."""
    return [s for s in sites if s.name in work.results and learns_rounding(work.results[s.name].q)]


def _nearest(work: Work, sites: Sequence[Site]) -> bool:
    """Whether all codes are nearest ones."""
    return all(is_nearest(work.results[s.name].q, work.before[s.name]) for s in _learned(work, sites))


def _unrounded(work: Work, sites: Sequence[Site]) -> TreeStore:
    """What the unit gives for every batch with the weights as they were before they were rounded."""
    rounded = {site.name: work.weight(site).clone() for site in sites}
    for site in sites:
        work.weight(site).copy_(work.before[site.name])
    try:
        return work.outputs(work.forwards)
    finally:
        for site in sites:
            work.weight(site).copy_(rounded[site.name])


def _learn(
    work: Work,
    sites: Sequence[Site],
    soft: dict[str, Soft],
    tensors: Sequence[str],
    targets: Targets,
    rule: Rule,
    rate: float,
    iterations: int,
) -> None:
    learner = Learner(work, sites, soft, tensors)
    if not learner.stand.parameters:
        return
    as_found = Learner(work, (), {}).total(targets)
    learner.learn(targets, rule, rate, iterations)
    learned = learner.total(targets)
    if learned < as_found:
        learner.keep(unit_error=[as_found, learned])


def _norms_change(source: Source, sites: Sequence[Site], *, norms: bool = True, **options: Any) -> Declared:
    return Declared(changed=norms_and_biases(source, sites) if norms else ())


def _in_a_block(site: Site, scheme: LayerScheme | None) -> str | None:
    return None if site.block is not None else "it lies outside the blocks"


def _integers(site: Site, scheme: LayerScheme | None) -> str | None:
    plain = scheme is not None and scheme.weights.format.kind == "integer" and learns_scales(scheme.weights)
    if not plain or scheme is None or scheme.weights.zero_point == "float":
        return f"its rounding is not learned: {scheme} has no integer codes with plain scales"
    return _in_a_block(site, scheme)


_FLOATS: frozenset[Need] = frozenset({"float outputs"})

_BATCHES: frozenset[Need] = frozenset({"batches"})

TUNE = Step(
    "tune", "repair", "unit-wise distillation of scales, norms and biases", apply=tune, needs=_FLOATS, scope="unit",
    refuse=_in_a_block, declare=_norms_change, cost=3000.0,
)  # fmt: skip
SIGNROUND = Step(
    "signround", "repair", "Cheng et al. 2023, arXiv:2309.05516", apply=signround, needs=_FLOATS, scope="unit",
    refuse=_integers, cost=10_000.0,
)  # fmt: skip
LKD = Step(
    "lkd", "repair", "Yao et al. 2022, arXiv:2206.01861", apply=lkd, needs=_BATCHES, scope="unit",
    refuse=_integers, cost=5000.0,
)  # fmt: skip
