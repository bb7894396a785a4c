"""The triangular factor of a second moment, through which GPTQ sees how columns depend on each other.

Owns: `root_factor`.  Uses: LAPACK through SciPy on the CPU, whose factorization needs no second matrix.
"""

from __future__ import annotations

import torch

from arrondi.errors import DataError

PANEL = 256
"""Rows permuted at a time."""
_REVERSED = 1 << 20
"""Numbers swapped at a time."""


def root_factor(
    hessian: torch.Tensor, damping: float, permutation: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """V, upper triangular with a positive diagonal, such that H + λI = V Vᵀ, λ = damping · mean(diag H).

    Args:
        hessian: (n, n) symmetric, float32 or float64; used up. Rows of all zeros (inputs that never occur) count as unit rows.
        damping: multiplied by ten, up to one, until the matrix is definite.
        permutation: (n,) order of the columns; V belongs to the permuted matrix.

    Returns:
        (V, the damping that was needed).

    With J the reversal of indices, J H J = R Rᵀ gives V = J R J. On the CPU R is found by LAPACK in the matrix's own memory,
    which for wide layers decides what fits.

    Raises:
        DataError: no damping up to the mean diagonal makes the matrix definite.
    """
    hessian = hessian.contiguous()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = 1.0
    if permutation is None:
        _reverse(hessian)
    else:
        backwards = permutation.flip(0)
        hessian = hessian.index_select(0, backwards)
        for rows in hessian.split(PANEL):
            rows.copy_(rows.index_select(1, backwards))
    saved = hessian.diagonal().clone()
    solve = _root if hessian.device.type == "cpu" else _root_reference
    while True:
        hessian.diagonal().copy_(saved + damping * mean)
        root = solve(hessian)
        if root is not None:
            return _reverse(root.tril_()), damping
        if damping >= 1.0:
            raise DataError(
                "The second moment of the inputs cannot be factored even when heavily damped: it holds NaN or infinity."
            )
        damping = min(max(damping * 10, 1e-6), 1.0)
        upper = hessian.triu(1)
        hessian.copy_(upper + upper.T)


def _root(matrix: torch.Tensor) -> torch.Tensor | None:
    """R in the lower triangle of `matrix` itself, where matrix = R Rᵀ; None if it is not definite.

    The strict upper triangle keeps the matrix. LAPACK counts by columns, so our lower triangle is its upper one.
    """
    from scipy.linalg import lapack

    factorize = lapack.dpotrf if matrix.dtype == torch.float64 else lapack.spotrf
    _, failed = factorize(matrix.numpy().T, lower=0, clean=0, overwrite_a=1)
    return None if failed or not bool(torch.isfinite(matrix.diagonal()).all()) else matrix


def _root_reference(matrix: torch.Tensor) -> torch.Tensor | None:
    """The reference of `_root` on any device, with memory for two more matrices."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else root.contiguous()  # it comes by columns, and `_reverse` needs rows


def _reverse(matrix: torch.Tensor) -> torch.Tensor:
    """Both axes reversed, in place: the same as reading the memory backwards."""
    flat = matrix.reshape(-1)
    half = len(flat) // 2
    for start in range(0, half, _REVERSED):
        stop = min(start + _REVERSED, half)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix
