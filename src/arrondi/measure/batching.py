"""How many samples go through a network at once: `in_batches`."""

from __future__ import annotations

from dataclasses import replace

import torch

from arrondi.errors import ArrondiError, DataError
from arrondi.graph import Graph, Program, tidy
from arrondi.graph.sizes import batch_of, sample_axes
from arrondi.measure.arrays import Arrays


@torch.no_grad()
def in_batches(graph: Graph, samples: Arrays) -> Arrays:
    """The samples, cut into batches of the network's own size if it computes others unlike, or not at all.

    Args:
        graph: one with a fixed number of samples is run on twice as many.

    Raises:
        DataError: there are fewer than it takes.
    """
    count = batch_of(graph)
    if count is None or _takes_more(graph, count, samples):
        return samples
    kept = len(samples) - len(samples) % count
    if not kept:
        raise DataError(f"{samples.source} holds {len(samples)} samples, and the network takes {count} at a time. Give more, or export it with a number of samples that may vary.")  # fmt: skip
    return replace(samples.part(0, kept), size=count)


def _takes_more(graph: Graph, count: int, samples: Arrays) -> bool:
    program = Program(tidy(graph)).eval()
    places = torch.arange(2 * count) % len(samples)  # the same ones again where there are fewer
    some = tuple(x[places] if x.ndim else x for x in samples.inputs)
    try:
        first, rest, both = (_outputs(program, samples.turned(tuple(x[a:b] if x.ndim else x for x in some))) for a, b in ((0, count), (count, 2 * count), (0, 2 * count)))  # fmt: skip
    except (ArrondiError, RuntimeError):
        return False
    for one, other, together, axis in zip(first, rest, both, sample_axes(graph, graph.outputs), strict=True):
        apart = torch.cat([one, other], axis or 0) if one.ndim else one
        if apart.shape != together.shape or not torch.allclose(
            apart.float(), together.float(), 1e-3, 1e-4 * float(apart.abs().max())
        ):
            return False
    return True


def _outputs(program: Program, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = program(*inputs)
    return found if isinstance(found, tuple) else (found,)
