"""The rewrite `smoothquant`: what is hard to round in inputs moves into weights, see `arrondi.rewrite.smoothquant`."""

from __future__ import annotations

from collections.abc import Sequence

from arrondi.pipeline.folding import Joint, changed_by, fold
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps.options import Share
from arrondi.pipeline.steps.scales import largest_weights, needs_of_search, readers_of, say, seen_by, shared
from arrondi.pipeline.work import Work
from arrondi.rewrite.channels import reduce_columns
from arrondi.rewrite.search import best_scale
from arrondi.rewrite.smoothquant import smoothing, smoothings


def smooth(work: Work, joints: Sequence[Joint], *, alpha: Share = 0.5, search: bool = False) -> None:
    """Smooth every activation that a scale can be moved out of.

    Args:
        alpha: how much is moved, 0 … 1.
        search: try several for each activation, and none, and take the one with which the rounded layers give what they
            should; `alpha` is then not used.
    """
    needs: set[Need] = {"absmax", *(needs_of_search(work, joints) if search else ())}
    seen = seen_by(work, joints, needs)
    for joint in joints:
        one = shared(joint, seen)
        if one is None or one.absmax is None:
            continue
        weights = largest_weights(work, joint)
        channels = joint.columns(weights.device)
        inputs = reduce_columns(one.absmax.to(weights.device), channels, joint.count, "amax")
        scale = smoothing(inputs, weights, alpha)
        if search:
            readers = readers_of(work, joint, seen)
            found = best_scale(smoothings(inputs, weights), readers, channels, joint.count)
            scale = found.scale
            say(work, joint, alpha=found.chosen)
        fold(work, joint, scale)


STEP = Step(
    "smoothquant",
    "rewrite",
    "Xiao et al. 2022, arXiv:2211.10438",
    apply=smooth,
    needs=frozenset({"absmax"}),
    scope="fold",
    declare=changed_by,
    cost=5.0,
)
