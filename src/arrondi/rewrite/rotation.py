"""Orthogonal matrices that spread what a few channels hold over all of them: `Rotation`.

x R with R = diag(±1) H, H a Hadamard matrix of the order of x and the signs random: every output is a sum of all inputs, of which
each weighs the same, so that no channel stands out (QuaRot, arXiv:2404.00456). Orders are made of those that
`arrondi.kernels.hadamard` has, by Kronecker products; an odd factor for which there is none gets a random orthogonal matrix.

Where the mean over channels is taken (LayerNorm) R must keep the vector of ones: R 1 = 1. With a Hadamard matrix U whose first column
is constant, R = U diag(1, ±1, …) Uᵀ does, because Uᵀ 1 is a multiple of the first unit vector; its entries are sums of random signs,
of size 1/√n as before. Then LayerNorm(x R) = LayerNorm(x) R exactly, and the model keeps its modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from arrondi.errors import ShapeError
from arrondi.kernels.hadamard import hadamard, is_order

_NUMBERS = 1 << 19
"""Numbers that are turned at a time."""


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R of order n.

    Attributes:
        n: its order.
        seed: of its random signs; the same seed gives the same matrix.
        ones: whether R 1 = 1.
    """

    n: int
    seed: int = 0
    ones: bool = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ShapeError(f"A rotation has an order of at least 1, got {self.n}.")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x R along the last axis.

        Args:
            x: (…, n), any float dtype.

        Returns:
            (…, n) float64.
        """
        signs, factors = self._signs().to(x.device), factors_of(self.n)
        rows = x.double()
        if not self.ones:
            return _spread(rows * signs, factors, self.seed, transposed=False)
        first = _spread(_unit(self.n).to(x.device), factors, self.seed, transposed=False).sign()
        turned = _spread(rows * first, factors, self.seed, transposed=True) * signs
        return _spread(turned, factors, self.seed, transposed=False) * first

    def matrix(self) -> torch.Tensor:
        """R, float64 (n, n)."""
        return self.apply(torch.eye(self.n, dtype=torch.float64))

    def _signs(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.n,), generator=generator).double() * 2 - 1
        if self.ones:
            signs[0] = 1.0
        return signs


@functools.lru_cache(maxsize=256)
def factors_of(n: int) -> tuple[int, ...]:
    """Orders of Hadamard matrices whose Kronecker product has order n, and last the factor for which there is none, as small as it can be.

    >>> factors_of(4096), factors_of(784), factors_of(90)
    ((4096, 1), (784, 1), (2, 45))
    """
    if is_order(n):
        return (n, 1)
    divisors = [d for d in range(n, 1, -1) if n % d == 0]
    pair = next(((d, n // d, 1) for d in divisors if is_order(d) and is_order(n // d)), None)
    return pair or next(((d, n // d) for d in divisors if is_order(d)), (n,))


def block_of(n: int) -> int:
    """The largest order of a Hadamard matrix that divides n: of the blocks of a block-diagonal one.

    >>> block_of(4096), block_of(90)
    (4096, 2)
    """
    return next(d for d in range(n, 0, -1) if n % d == 0 and is_order(d))


def _spread(x: torch.Tensor, factors: tuple[int, ...], seed: int, *, transposed: bool) -> torch.Tensor:
    """x T or x Tᵀ, T the Kronecker product of the factors' matrices; the entries of its first row are of one size."""
    *orders, rest = factors
    shaped = x.reshape(-1, *orders, rest)
    for axis in range(1, len(orders) + 1):
        shaped = hadamard(shaped.movedim(axis, -1), transposed=transposed).movedim(-1, axis)
    if rest > 1:
        matrix = _random_orthogonal(rest, seed).to(x.device)
        shaped = shaped @ (matrix.T if transposed else matrix)
    return shaped.reshape(x.shape)


@functools.lru_cache(maxsize=8)
def _random_orthogonal(n: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix, float64 (n, n), whose first row is constant."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(n, n, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q.T.contiguous()


def _unit(n: int) -> torch.Tensor:
    unit = torch.zeros(n, dtype=torch.float64)
    unit[0] = 1
    return unit


def turn(weight: torch.Tensor, axis: int, channels: torch.Tensor, rotation: Rotation) -> None:
    """Write a weight in a turned basis, in place: along `axis`, every row of `channels` (times, n) is turned by itself.

    Computed in float64 and rounded once, a part of the weight at a time.
    """
    rows = weight.movedim(axis, -1)
    _turn_rows(rows.unsqueeze(0) if rows.ndim == 1 else rows, channels, rotation)


def _turn_rows(rows: torch.Tensor, channels: torch.Tensor, rotation: Rotation) -> None:
    if rows.ndim > 2:
        for part in rows:
            _turn_rows(part, channels, rotation)
        return
    index = channels.to(rows.device)
    step = max(_NUMBERS // rows.shape[-1], 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        part[:, index] = rotation.apply(part[:, index]).to(part.dtype)
