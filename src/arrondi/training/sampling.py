"""Gradients in 4 bits: as two numbers of 4 bits, of which rows are drawn by their size, or as powers of two.

Owns: `Halves`, `split`, `chances`, `drawn`, `logarithmic`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from arrondi.kernels.sides import round_codes
from arrondi.training.scales import inverse

MOST: Final = 7
"""The largest code of 4 bits, symmetric."""

_OCTAVES: Final = 6
"""Powers of two above the smallest one that 4 bits with a sign and a zero leave."""


class Halves(NamedTuple):
    """A gradient as coarse · scale + fine · (scale / 14): two int8 matrices of codes in [-7, 7], (rows, out), and a () scale."""

    coarse: torch.Tensor
    fine: torch.Tensor
    scale: torch.Tensor


def split(slope: torch.Tensor, seed: int) -> Halves:
    """A gradient in two numbers of 4 bits (bit splitting; Xi et al., 2023, arXiv:2306.11987).

    The coarse one is rounded to nearest, what it leaves stochastically, so that the sum has no bias.

    Args:
        slope: (rows, out) floating.
        seed: of the noise.
    """
    scale = slope.detach().float().abs().amax() / MOST if slope.numel() else slope.new_zeros((), dtype=torch.float32)
    there = inverse(scale).expand(slope.shape[0])
    coarse = round_codes(slope, row=there, lowest=-MOST, highest=MOST)
    left = torch.addcmul(slope.detach().float(), coarse.float(), scale, value=-1)
    fine = round_codes(left, row=there * (2 * MOST), lowest=-MOST, highest=MOST, seed=seed)
    return Halves(coarse, fine, scale)


def chances(sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """Chances proportional to sizes, at most 1, that sum to the budget: those above 1 become 1, and the others share the rest.

    Args:
        sizes: (rows,), not negative.
        budget: rows to expect.

    Returns:
        (rows,) float32 in [0, 1]; 0 where the size is 0. Their sum is the budget, or the number of rows with a size.
    """
    sizes = sizes.double()
    sure = torch.zeros_like(sizes, dtype=torch.bool)
    for _ in range(len(sizes)):
        rest = torch.where(sure, 0, sizes)
        total, left = rest.sum(), budget - sure.sum()
        p = torch.where(sure, 1.0, rest * (left / total if total > 0 else 0.0))
        over = (p > 1) & ~sure
        if not bool(over.any()):
            break
        sure |= over
    return p.clamp(0, 1).float()


def drawn(p: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows drawn each with its own chance.

    Args:
        p: (rows,) chances.
        generator: on the CPU.

    Returns:
        Indices of the rows drawn (kept,), and their weights 1 / p (kept,), by which sums over rows keep their mean.
    """
    hit = torch.rand(len(p), generator=generator).to(p.device) < p
    rows = hit.nonzero().squeeze(1)
    return rows, 1 / p[rows]


def logarithmic(slope: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient as signed powers of two, 0, ±1, ±2, … ±64, times a scale, without bias (LUQ; Chmiel et al., 2021,
    arXiv:2112.10769).

    What is below the smallest power becomes it or 0, what lies between two powers one of them, each with the chance that
    keeps its mean.

    Args:
        slope: (rows, out) floating.
        seed: of the noise.

    Returns:
        Codes (rows, out) int8, and the scale () float32.
    """
    g = slope.detach().float()
    most = g.abs().amax() if g.numel() else g.new_zeros(())
    scale = most * 2.0**-_OCTAVES
    there = g * inverse(scale)
    size = there.abs()
    power = torch.exp2(size.clamp_min(1).log2().floor()).clamp_max(2.0**_OCTAVES)
    unit = torch.where(size < 1, torch.ones_like(power), power)
    steps = round_codes(there / unit, seed=seed, lowest=-2, highest=2)  # 0 or ±1 below the first power, else ±1 or ±2
    return (steps * unit).clamp(-(2**_OCTAVES), 2**_OCTAVES).to(torch.int8), scale
