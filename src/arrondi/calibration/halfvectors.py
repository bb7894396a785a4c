"""Half-vectors: a symmetric matrix as the n(n+1)/2 numbers it has.

Owns: `vech`, `unvech` and `row_start`.  Uses: `errors` only.

A half-vector lists the lower triangle row by row: entry (i, j), j ≤ i, is at i(i+1)/2 + j, so that row i is a
contiguous run of i + 1 numbers. It is no sparse matrix: nothing in it is zero, and it takes half the memory of the full
one.

Source: Magnus and Neudecker 1980 (half-vectorization).
"""

from __future__ import annotations

import math
from typing import Final

import torch

from arrondi.errors import ShapeError

PANEL: Final = 256
"""Rows of a symmetric matrix handled at a time."""


def vech(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle, row after row.

    Args:
        matrix: (..., n, n), any dtype. What lies above the diagonal is not read.

    Returns:
        (..., n(n+1)/2), same dtype.

    Raises:
        ShapeError: the last two dimensions differ.

    >>> vech(torch.tensor([[1, 2, 4], [2, 3, 5], [4, 5, 6]]))
    tensor([1, 2, 3, 4, 5, 6])
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ShapeError(f"vech needs a square matrix, got shape {tuple(matrix.shape)}. Pass (..., n, n).")
    n = matrix.shape[-1]
    packed = matrix.new_empty((*matrix.shape[:-2], n * (n + 1) // 2))
    for i in range(n):
        packed[..., row_start(i) : row_start(i + 1)] = matrix[..., i, : i + 1]
    return packed


def unvech(packed: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of a half-vector, symmetric to the last bit.

    Args:
        packed: (..., n(n+1)/2), any dtype, in the order of `vech`.

    Returns:
        (..., n, n), same dtype.

    Raises:
        ShapeError: the length is no triangular number.

    >>> unvech(torch.tensor([1, 2, 3]))
    tensor([[1, 2],
            [2, 3]])
    """
    length = packed.shape[-1] if packed.ndim else 0
    n = (math.isqrt(8 * length + 1) - 1) // 2
    if packed.ndim == 0 or length != n * (n + 1) // 2:
        raise ShapeError(
            f"A half-vector has n(n+1)/2 entries, got shape {tuple(packed.shape)}. Pass what vech returned."
        )
    matrix = packed.new_empty((*packed.shape[:-1], n, n))
    for i in range(n):
        matrix[..., i, : i + 1] = packed[..., row_start(i) : row_start(i + 1)]
    for start in range(0, n, PANEL):  # mirror block by block, which keeps both sides in cache
        stop = min(start + PANEL, n)
        matrix[..., :start, start:stop] = matrix[..., start:stop, :start].mT
        block = matrix[..., start:stop, start:stop]
        lower = torch.ones(stop - start, stop - start, dtype=torch.bool, device=packed.device).tril()
        block.copy_(torch.where(lower, block, block.mT))
    return matrix


def row_start(i: int) -> int:
    """Where row i of the triangle begins."""
    return i * (i + 1) // 2
