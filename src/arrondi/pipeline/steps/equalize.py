"""The rewrite `equalize`: what makes a channel and what reads it reach equally far, see `arrondi.rewrite.equalize`."""

from __future__ import annotations

from collections.abc import Sequence

from arrondi.pipeline.folding import Joint, changed_by, fold, gain_of
from arrondi.pipeline.step import Step
from arrondi.pipeline.work import Work
from arrondi.rewrite.equalize import Link, equalize


def equalize_ranges(work: Work, joints: Sequence[Joint]) -> None:
    """Find the scales of all activations of a unit together, and fold them."""
    weights = {s.name: work.weight(s) for joint in joints for s in joint.sites}
    links = [_link(work, joint) for joint in joints]
    for joint, scale in zip(joints, equalize(weights, links), strict=True):
        fold(work, joint, scale)


def _link(work: Work, joint: Joint) -> Link:
    columns, names = joint.columns(work.instance.device), tuple(s.name for s in joint.readers)
    if joint.norm:
        reach = 3 * gain_of(work, joint).abs()
        if joint.bias:
            reach = reach + work.tensor(joint.bias).float().abs()
        return Link(reach, names, columns, joint.count)
    return Link(tuple((site.name, part) for site, part in joint.rows), names, columns, joint.count)


STEP = Step(
    "equalize",
    "rewrite",
    "Nagel et al. 2019, arXiv:1906.04721",
    apply=equalize_ranges,
    scope="fold",
    declare=changed_by,
    cost=30.0,
)
