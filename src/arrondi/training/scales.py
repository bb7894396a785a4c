"""Scales of what is rounded at every step.

Owns: `inverse`, `rounded`, and `padded`, zeros that fill the last block of a transform.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from arrondi.kernels.sides import Factor, extremes, round_codes

_TINY = 2.0**-120
"""Steps below it count as nothing: their inverse would not be a number."""


class Rounded(NamedTuple):
    """Codes and what one step of them is: values ≈ codes · scale / factor, by rows or by columns."""

    codes: torch.Tensor
    scale: torch.Tensor


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 where there is no step, or none that is a number: NaN and infinity go on in the scale itself."""
    return torch.where(scale > _TINY, 1 / scale, torch.zeros_like(scale))


def rounded(
    x: torch.Tensor,
    most: int = 127,
    *,
    row: Factor = None,
    column: Factor = None,
    by_column: bool = False,
    whole: bool = False,
    seed: int | None = None,
) -> Rounded:
    """x · row · column as codes in [-most, most] with one absmax scale for each row, each column, or for all of it.

    Args:
        x: (rows, columns), floating.
        most: the largest code.
        row, column: (rows,) or (columns,) float32; at most the one along which there are scales of their own is left out.
        by_column: a scale for each column.
        whole: one scale for the matrix, given for each row.
        seed: of stochastic rounding; None rounds to nearest.

    Returns:
        Codes (rows, columns) int8, and scales (rows,) or (columns,) float32.
    """
    largest = extremes(x, row=row, column=column, by_column=by_column)
    if whole and largest.numel():
        largest = largest.amax().expand_as(largest)
    scale = largest / most
    there = inverse(scale)
    of_row, of_column = (row, _times(column, there)) if by_column else (_times(row, there), column)
    codes = round_codes(x, row=of_row, column=of_column, lowest=-most, highest=most, seed=seed)
    return Rounded(codes, scale)


def padded(x: torch.Tensor, block: int, dim: int = 1) -> torch.Tensor:
    """A matrix whose last block of columns (rows with dim=0) is filled with zeros; itself where there is nothing to fill, since
    `F.pad` would copy it."""
    missing = -x.shape[dim] % max(block, 1)
    if not missing:
        return x
    return F.pad(x, (0, missing) if dim == 1 else (0, 0, 0, missing))


def _times(factor: Factor, other: torch.Tensor) -> torch.Tensor:
    return other if factor is None else factor * other
