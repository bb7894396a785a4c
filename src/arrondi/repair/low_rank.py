"""Two thin matrices beside a rounded weight: where adapters start, W ≈ Q + B A.

Owns: `Factors`, `principal` (PiSSA), `alternate` (QPiSSA with several steps, and LoftQ), `compensate` (EoRA), `singular` and `nuclear_norm`. All is
computed in float32; `B A` includes the adapter's scaling, which `Factors.scaled` takes out again.

Sources: Meng, Wang, Zhang 2024, arXiv:2404.02948 (PiSSA, QPiSSA); Li et al. 2023, arXiv:2310.08659 (LoftQ); Liu et al. 2024, arXiv:2410.21271 (EoRA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from arrondi.errors import DataError, ShapeError

OVERSAMPLING: Final = 8
"""Columns more than asked for that a fast decomposition looks at."""

_DAMPING: Final = 1e-6
"""Of the mean second moment of an input, below which a direction counts as never used."""


@dataclass(frozen=True)
class Factors:
    """B A.

    Attributes:
        b: (m, r) float32.
        a: (r, n) float32.
    """

    b: torch.Tensor
    a: torch.Tensor

    @property
    def product(self) -> torch.Tensor:
        """B A, (m, n)."""
        return self.b @ self.a

    def scaled(self, scaling: float) -> Factors:
        """Factors whose product times `scaling` is B A; both take the same share."""
        share = scaling**-0.5
        return Factors(self.b * share, self.a * share)


@dataclass(frozen=True)
class Start:
    """Where an adapter starts.

    Attributes:
        rest: (m, n), what is to be rounded; rounding it gives Q.
        factors: B A with W ≈ Q + B A.
        error: ‖W - Q - B A‖ (Frobenius).
    """

    rest: torch.Tensor
    factors: Factors
    error: float


def zero(weight: torch.Tensor, rank: int, generator: torch.Generator) -> Factors:
    """LoRA's own start: A uniform in ±1/√n (Kaiming with a = √5), B zero.

    Args:
        weight: (m, n); only its shape is read.
    """
    rows, columns = _shape(weight, rank)
    a = (2 * torch.rand(rank, columns, generator=generator) - 1) * columns**-0.5
    return Factors(weight.new_zeros(rows, rank, dtype=torch.float32), a.to(weight.device))


def principal(
    weight: torch.Tensor, rank: int, *, iterations: int | None = None, generator: torch.Generator | None = None
) -> Factors:
    """The best approximation of W of that rank, its singular values shared equally: U √S, √S Vᵀ.

    Args:
        weight: (m, n), any float type.
        rank: 1 … min(m, n).
        iterations: of the subspace of a fast decomposition; None: exact. W - B A is what PiSSA leaves, whichever it is.
        generator: of the fast one's random start; None: seeded with 0.

    Raises:
        ShapeError: no matrix, or a rank that it has not.
        DataError: NaN or infinity in it.
    """
    u, s, vt = singular(weight, rank, iterations=iterations, generator=generator)
    root = s.sqrt()
    return Factors(u * root, root[:, None] * vt)


def singular(
    weight: torch.Tensor, rank: int, *, iterations: int | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and their vectors: U (m, r), S (r,), Vᵀ (r, n); arguments as `principal`.

    The fast way is that of Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.4.
    """
    rows, columns = _shape(weight, rank)
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise DataError(f"A weight with NaN or infinity has no singular values, got shape {tuple(w.shape)}.")
    width = min(rank + OVERSAMPLING, rows, columns)
    if iterations is None or 2 * width >= min(rows, columns):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    draw = generator or torch.Generator().manual_seed(0)
    y = w @ torch.randn(columns, width, generator=draw).to(w.device)
    for _ in range(iterations):
        y = w @ torch.linalg.qr(w.T @ torch.linalg.qr(y)[0])[0]
    q = torch.linalg.qr(y)[0]
    u, s, vt = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]


def alternate(
    weight: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    rank: int,
    *,
    steps: int,
    start: Factors | None = None,
    iterations: int | None = None,
) -> Start:
    """Round what the factors leave, then fit the factors to what rounding lost, and so on; the best pair is kept.

    With `start=None` this is LoftQ (the first Q is that of W itself); with PiSSA's factors it is QPiSSA, whose one-step form is
    `steps=0`: the factors stay as they are.

    Args:
        weight: (m, n).
        rounded: (m, n) → the same rounded.
        rank: of the factors.
        steps: how often factors are fitted.
        start: factors of the first turn.
        iterations: of fast decompositions, see `principal`.

    Raises:
        ShapeError, DataError: as `principal`.
    """
    rows, columns = _shape(weight, rank)
    w = weight.detach().float()
    factors = start or Factors(w.new_zeros(rows, rank), w.new_zeros(rank, columns))
    rest = w - factors.product
    q = rounded(rest)
    best = None if start is None else Start(rest, factors, float((rest - q).norm()))
    for step in range(steps):
        factors = principal(w - q, rank, iterations=iterations)
        best = _better(best, Start(rest, factors, float((w - q - factors.product).norm())))
        if step + 1 < steps:
            rest = w - factors.product
            q = rounded(rest)
            best = _better(best, Start(rest, factors, float((rest - q).norm())))
    return best or Start(rest, factors, float((rest - q).norm()))


def _better(one: Start | None, two: Start) -> Start:
    return two if one is None or two.error < one.error else one


def compensate(error: torch.Tensor, moment: torch.Tensor, rank: int) -> Factors:
    """B A of that rank with the least ‖(E - B A) X‖, where E is what rounding lost and X Xᵀ the second moment of the inputs.

    Args:
        error: (m, n), W - Q.
        moment: (n, n), symmetric, of the inputs of the rounded model; any scale.
        rank: 1 … min(m, n).

    Raises:
        ShapeError: sizes that do not go together, or as `principal`.
        DataError: NaN or infinity.
    """
    _, columns = _shape(error, rank)
    if moment.shape != (columns, columns):
        raise ShapeError(f"The second moment of {columns} inputs is ({columns}, {columns}), got {tuple(moment.shape)}.")
    if not bool(torch.isfinite(moment).all()):
        raise DataError("A second moment with NaN or infinity weighs nothing. Look at the calibration text.")
    values, vectors = torch.linalg.eigh(moment.double())
    root = values.clamp(min=max(_DAMPING * float(values.mean()), 1e-30)).sqrt()
    u, s, vt = torch.linalg.svd(error.double() @ vectors * root, full_matrices=False)
    share = s[:rank].sqrt()
    a = (share[:, None] * vt[:rank]) / root @ vectors.T
    return Factors((u[:, :rank] * share).float(), a.float())


def nuclear_norm(matrix: torch.Tensor) -> float:
    """The sum of the singular values."""
    return float(torch.linalg.svdvals(matrix.float()).sum())


def _shape(weight: torch.Tensor, rank: int) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ShapeError(f"Two thin matrices stand beside a matrix (m, n), got shape {tuple(weight.shape)}.")
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise ShapeError(
            f"A rank of {rank} is none of a matrix of {rows} × {columns}. Choose 1 … {min(rows, columns)}."
        )
    return rows, columns
