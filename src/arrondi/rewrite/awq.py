"""AWQ: columns that meet large activations are enlarged before they are rounded, so that they lose less.

Owns: `awq_scales`, the candidates among which `best_scale` chooses, and `mean_share`, which the "duo" variant looks at.

    plain  s = a^r, with a the mean |x| of a channel and r = 0, 1/grid, … below 1
    duo    s = a^r / (b^(1-r) + 1e-4), with b the mean share of a weight in the largest of its group

each divided by √(max s · min s). s = 1 is always among the candidates (`best_scale` adds it), so nothing gets worse by the measure
that is taken. The paper compares what a whole attention or MLP part gives where several linears read the same activation; here it
is the sum of their own output errors, for which second moments are enough.

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2; "duo" is the variant of its authors' and of later implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from arrondi.rewrite.channels import centred, usable

_LEAST = 1e-4


def awq_scales(
    inputs: torch.Tensor, shares: torch.Tensor | None = None, grid: int = 20
) -> Iterator[tuple[float, torch.Tensor]]:
    """The candidates: (r, scale of every channel).

    Args:
        inputs: (channels,) mean |x|.
        shares: (channels,) of `mean_share`, for "duo"; None is "plain", whose r = 0 is no scale at all and is left out.
        grid: number of ratios.
    """
    inputs = inputs.float()
    alive = inputs > 0
    for k in range(0 if shares is not None else 1, grid):
        ratio = k / grid
        scale = inputs**ratio
        if shares is not None:
            scale = scale / (shares ** (1 - ratio) + _LEAST)
        yield ratio, usable(centred(scale.clamp(min=_LEAST), alive))


def mean_share(weights: Sequence[torch.Tensor], group: int) -> torch.Tensor:
    """(n,) mean over all rows of |w| / the largest |w| of its group of columns.

    Args:
        weights: matrices (m, n) that read the same activation.
        group: columns that share a scale; the last group may be shorter.
    """
    total, rows = weights[0].new_zeros(weights[0].shape[1]), 0
    for weight in weights:
        size = weight.abs().float()
        parts = [part / part.amax(1, keepdim=True).clamp(min=_LEAST) for part in size.split(group, dim=1)]
        total += torch.cat(parts, dim=1).sum(0)
        rows += len(weight)
    return total / max(rows, 1)
