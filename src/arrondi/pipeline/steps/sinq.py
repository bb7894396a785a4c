"""The rewrite `sinq`: no column of what reads an activation is wider than others, see `arrondi.rewrite.sinq`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from arrondi.arguments import Between
from arrondi.pipeline.folding import Joint, changed_by, fold
from arrondi.pipeline.step import Step
from arrondi.pipeline.work import Work
from arrondi.rewrite.sinq import sinkhorn


def even_out(work: Work, joints: Sequence[Joint], *, sweeps: Annotated[int, Between(1, 1000)] = 16) -> None:
    """Divide the columns of all readers by what makes them equally wide. Rows need nothing: scales follow them.

    Args:
        sweeps: over rows and columns, at most.
    """
    for joint in joints:
        weights = [work.weight(s) for s in joint.readers if work.planned[s.name].scheme is not None]
        channels = joint.columns(weights[0].device)
        fold(work, joint, 1 / sinkhorn(weights, channels, joint.count, sweeps).columns)


STEP = Step(
    "sinq",
    "rewrite",
    "Müller et al. 2025, arXiv:2509.22944",
    apply=even_out,
    scope="fold",
    declare=changed_by,
    cost=60.0,
)
