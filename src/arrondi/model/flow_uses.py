"""From a product of two tensors to uses of parameters.

Owns: `Use`, and `uses_of`, which names the matrices of parameters that a product multiplies by, and the rows that each meets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from arrondi.model.flow_ops import Axes, Call, Convolution
from arrondi.model.flow_regions import Reads, Region, Regions


@dataclass(frozen=True)
class Use:
    """One product of a parameter, of one matrix of a stack or of a slice of it, with an input.

    Attributes:
        param: name of the parameter.
        matrix: which matrix of a stack (a parameter whose first axis counts matrices), None for a whole parameter.
        kind: "linear", "einsum", "convolution", "embedding" or "recurrent".
        reduces_last: the sum runs over the last axis of the parameter (of a convolution: over all but the first);
            False for Conv1D and all weights stored as (in, out).
        reads: number of the activation: equal for uses that multiply the same values, different after a change in place.
        order: running number.
        rows: which indices on the last but one axis of the parameter (of a vector: its only one) take part, None for all.
        columns: which indices on its last axis.
        groups: of a convolution.
        source: the activation as the function got it; None where it was not kept.
    """

    param: str
    matrix: int | None
    kind: str
    reduces_last: bool
    reads: int
    order: int
    rows: slice | None = None
    columns: slice | None = None
    groups: int = 1
    source: torch.Tensor | None = field(default=None, repr=False, compare=False)
    see: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda x: x, repr=False, compare=False)
    see_some: Callable[[torch.Tensor, int], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def x(self) -> torch.Tensor:
        """The activation as rows (…, n), their last axis the one summed over, in the order of the parameter's indices.

        Of a convolution, the patches (positions, n) that meet the filters, with several groups (groups, positions, n); of a
        transposed one, its inputs (positions, n), before the overlapping results are added. Of an embedding, the indices.
        """
        if self.source is None:
            raise ValueError(
                f"The activation that {self.param!r} multiplies was not kept: read it while it is reported."
            )
        return self.see(self.source)

    def some(self, most: int) -> torch.Tensor:
        """The same of a convolution at no more positions than that (or four for every input), chosen at random: the same for inputs of one shape."""
        if self.source is None or self.see_some is None:
            return self.x
        return self.see_some(self.source, most)


def uses_of(call: Call, regions: Regions, reads: Reads, order: Callable[[], int]) -> Iterator[Use]:
    """The uses of parameters in one product. If both operands are parameters, the right one is the weight."""
    if call.right in regions:
        yield from _uses(call, call.right, call.right_axes, call.left, call.left_axes, regions, reads, order)
    elif call.weight == "either" and call.left in regions:
        yield from _uses(call, call.left, call.left_axes, call.right, call.right_axes, regions, reads, order)


def _uses(
    call: Call,
    weight: torch.Tensor,
    weight_axes: Axes,
    x: torch.Tensor,
    x_axes: Axes,
    regions: Regions,
    reads: Reads,
    order: Callable[[], int],
) -> Iterator[Use]:
    if call.kind == "embedding":
        if (region := regions.find(weight)) is not None:
            number = reads.number(x, ())
            yield Use(region.param, None, call.kind, False, number, order(), region.part(0), region.part(-1), 1, x)
        return
    if call.convolution is not None:
        yield from _convolution_uses(call.convolution, weight, x, regions, reads, order)
        return
    if len(set(weight_axes)) < len(weight_axes) or len(set(x_axes)) < len(x_axes):
        return  # a diagonal
    summed = [a for a in weight_axes if a in x_axes and a not in call.result]
    if not summed or any(a not in call.result and a not in x_axes for a in weight_axes):
        return
    batch = _apart(weight, weight_axes, x_axes, call.result, regions)
    sizes = [weight.shape[weight_axes.index(a)] for a in batch]
    for index in itertools.product(*map(range, sizes)):
        chosen = dict(zip(batch, index, strict=True))
        matrix = weight
        for a in sorted(chosen, key=weight_axes.index, reverse=True):
            matrix = matrix.select(weight_axes.index(a), chosen[a])
        region = regions.find(matrix)
        if region is None:
            continue
        axes = tuple(a for a in weight_axes if a not in chosen)
        inner = _inner_axes(region, axes, matrix, summed)
        if inner is None:
            continue
        rest, at = x_axes, x
        for a in sorted((a for a in chosen if a in x_axes), key=x_axes.index, reverse=True):
            place = rest.index(a)
            at = at.select(place, chosen[a] if at.shape[place] > 1 else 0)
            rest = rest[:place] + rest[place + 1 :]
        places = tuple(rest.index(a) for a in inner)
        # Letters of x alone that the result does not have are summed over first.
        before = tuple(i for i, a in enumerate(rest) if a not in call.result and a not in inner)
        number = reads.number(at, places, before)
        summed_last = region.axes[axes.index(inner[-1])]
        kept = {region.axes[i] for i, a in enumerate(axes) if a not in inner}
        last = len(region.shape) - 1
        yield Use(
            region.param,
            _matrix(region),
            call.kind,
            summed_last == last or (summed_last is None and last not in kept),
            number,
            order(),
            region.part(-2) if len(region.shape) > 1 else None,
            region.part(-1),
            1,
            at,
            _rows(places, before),
        )


def _apart(
    weight: torch.Tensor, weight_axes: Axes, x_axes: Axes, result: frozenset[Hashable], regions: Regions
) -> list[Hashable]:
    """Letters along which the weight is several matrices: those of the batch, and the first axis of a stack."""
    region = regions.find(weight)
    stacked = region is not None and len(region.shape) == 3
    apart = []
    for i, letter in enumerate(weight_axes):
        several = weight.shape[i] > 1 and weight.stride(i) != 0
        first = stacked and region is not None and region.axes[i] == 0
        if letter in result and several and (letter in x_axes or first):
            apart.append(letter)
    return apart


def _inner_axes(region: Region, axes: Axes, matrix: torch.Tensor, summed: list[Hashable]) -> list[Hashable] | None:
    """The letters summed over, from the outermost in memory of the parameter; None if they share an axis with others."""
    runs = {a: region.axes[i] for i, a in enumerate(axes)}
    outer = {runs[a] for a in axes if a not in summed} - {None}
    if any(runs[a] in outer for a in summed):
        return None

    def place(letter: Hashable) -> tuple[int, int]:
        axis = runs[letter]
        return -1 if axis is None else axis, -matrix.stride(axes.index(letter))

    return sorted(summed, key=place)


def _matrix(region: Region) -> int | None:
    """The index on the first axis, if the parameter is a stack and only one of its matrices takes part."""
    if len(region.shape) != 3 or region.counts[0] != 1:
        return None
    return region.starts[0]


def _rows(places: tuple[int, ...], before: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def see(x: torch.Tensor) -> torch.Tensor:
        outer = [i for i in range(x.ndim) if i not in places and i not in before]
        rows = x.permute(*outer, *before, *places)
        if before:
            rows = rows.sum(tuple(range(len(outer), len(outer) + len(before))))
        return rows if len(places) == 1 else rows.flatten(len(outer))

    return see


def _convolution_uses(
    geometry: Convolution,
    weight: torch.Tensor,
    x: torch.Tensor,
    regions: Regions,
    reads: Reads,
    order: Callable[[], int],
) -> Iterator[Use]:
    region = regions.find(weight)
    if region is None:
        return
    kernel = tuple(weight.shape[2:])
    groups = geometry.groups

    def see(x: torch.Tensor, most: int = 0) -> torch.Tensor:
        rows = x.movedim(1, -1)[..., None] if geometry.transposed else _patches(x, geometry, kernel)
        places = rows.shape[: x.ndim - 1]
        count = math.prod(places)
        most = most and max(most, 4 * math.prod(rows.shape[len(places) :]) // groups)
        if 0 < most < count:
            chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].to(x.device)
            rows, count = rows[torch.unravel_index(chosen, places)], most
        rows = rows.reshape(count, groups, -1)
        return rows[:, 0] if groups == 1 else rows.transpose(0, 1)

    # Transposed convolutions sum over the channels alone, whatever their geometry.
    number = reads.number(x, (1,), (groups, True) if geometry.transposed else (geometry, kernel))
    rows = region.part(0)
    yield Use(
        region.param, None, "convolution", not geometry.transposed, number, order(), rows, None, groups, x, see, see
    )


def _patches(x: torch.Tensor, geometry: Convolution, kernel: tuple[int, ...]) -> torch.Tensor:
    """(N, C, *space) → (N, *positions, C, *kernel)."""
    x = functional.pad(x, [n for pair in reversed(geometry.padding) for n in pair])
    spatial = len(kernel)
    for i, (size, stride, dilation) in enumerate(zip(kernel, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + spatial)
