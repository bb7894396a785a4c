"""The rewrite `awq-scale`: columns that meet large activations are enlarged, see `arrondi.rewrite.awq`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from arrondi.arguments import Between
from arrondi.formats import PerBlock, PerGroup
from arrondi.pipeline.folding import Joint, changed_by, fold
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps.scales import needs_of_search, readers_of, say, seen_by, shared
from arrondi.pipeline.work import Work
from arrondi.rewrite.awq import awq_scales, mean_share
from arrondi.rewrite.channels import reduce_columns
from arrondi.rewrite.search import best_scale


def scale_by_activations(
    work: Work, joints: Sequence[Joint], *, grid: Annotated[int, Between(2, 1000)] = 20, duo: bool = False
) -> None:
    """Search a scale for every activation, and fold it.

    Args:
        grid: ratios that are tried.
        duo: look at the weights too.
    """
    needs: set[Need] = {"absmean", *needs_of_search(work, joints)}
    seen = seen_by(work, joints, needs)
    for joint in joints:
        one, readers = shared(joint, seen), readers_of(work, joint, seen)
        if one is None or not readers:
            continue
        weights = [work.weight(s) for s in joint.readers]
        channels = joint.columns(weights[0].device)
        inputs = reduce_columns(one.absmean.to(channels.device), channels, joint.count, "mean")
        shares = None
        if duo:
            by_column = mean_share(weights, _group(work, joint))
            shares = reduce_columns(by_column, channels, joint.count, "mean")
        found = best_scale(awq_scales(inputs, shares, grid), readers, channels, joint.count)
        say(work, joint, awq_ratio=found.chosen, awq_error=min(found.history) / max(found.history[0], 1e-30))
        if found.chosen is not None:
            fold(work, joint, found.scale)


def _group(work: Work, joint: Joint) -> int:
    """Columns that share a scale in the first reader that is rounded."""
    site = next(s for s in joint.readers if work.planned[s.name].scheme is not None)
    match work.scheme(site).weights.granularity:
        case PerGroup(size) | PerBlock(_, size):
            return size
    return site.shape[1]


STEP = Step(
    "awq-scale",
    "rewrite",
    "Lin et al. 2023, arXiv:2306.00978",
    apply=scale_by_activations,
    needs=frozenset({"absmean", "moment"}),
    scope="fold",
    declare=changed_by,
    cost=600.0,
)
