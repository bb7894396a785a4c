"""Values that eight bits drown: `clearness`, how far every value's quiet samples stand above the noise of their grid.

One scale for all samples is laid over the loudest. A recording, or what a filter bank makes of it, has samples a thousand times quieter, and those fall
between the steps. How loud samples are differs little in pictures and in what layers make of them, so a share of quiet samples tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch

from arrondi.graph.program import Program
from arrondi.tensor.ranges.grid import Grid

FAINT: Final = 15.0
"""dB over its own rounding noise below which a value is drowned."""
SHARE: Final = 0.1
"""The share of samples, the quietest, of which the best one is looked at."""


@torch.no_grad()
def clearness(
    program: Program,
    batches: Iterable[Sequence[torch.Tensor]],
    values: Mapping[str, int],
    grids: Mapping[int, tuple[Grid, int, int]],
) -> dict[int, float]:
    """Signal over rounding noise of the quiet samples.

    Args:
        program: in floating point.
        batches: its inputs; samples lie along the first axis of every value.
        values: value → its group.
        grids: group → its grid of one scale, the lowest and the highest code.

    Returns:
        group → dB which a tenth of the samples of its worst value stay below; samples of nothing but zeros do not count.
    """
    found: dict[str, list[torch.Tensor]] = {}

    def see(name: str, x: torch.Tensor) -> None:
        group = values.get(name)
        if group is None or not x.ndim or not x.numel():
            return
        grid, low, high = grids[group]
        zero = 0.0 if grid.zero_point is None else float(grid.zero_point)
        codes = (torch.round(x / grid.scale) + zero).clamp(low, high)
        rows, wrong = x.flatten(1) if x.ndim > 1 else x[:, None], (codes - zero) * grid.scale - x
        signal, noise = (part.double().square().sum(1) for part in (rows, wrong.reshape(rows.shape)))
        found.setdefault(name, []).append(10 * torch.log10(signal / noise.clamp(min=1e-300))[signal > 0])

    for inputs in batches:
        program.watch(inputs, see)
    worst: dict[int, float] = {}
    for name, parts in found.items():
        every = torch.cat(parts)
        if len(every):
            group, clear = values[name], float(every.sort().values[int(SHARE * (len(every) - 1))])
            worst[group] = min(worst.get(group, clear), clear)
    return worst
