"""Second moments of a layer's inputs, and a bounded sample of the inputs themselves.

Owns: `vech` and `unvech` (a symmetric matrix as the n(n+1)/2 numbers it has), `SecondMoment` (H = Σ x xᵀ, streamed) and
`Reservoir` (a uniform sample of rows).  Uses: `errors` only.

A half-vector lists the lower triangle row by row: entry (i, j), j ≤ i, is at i(i+1)/2 + j, so that row i is a
contiguous run of i + 1 numbers. It is no sparse matrix: nothing in it is zero, and it takes half the memory of the full
one.

Sources: Magnus and Neudecker 1980 (half-vectorization); Frantar et al. 2022, arXiv:2210.17323 (what H is for);
Vitter 1985, algorithm R (reservoir sampling).
"""

from __future__ import annotations

import math
from typing import Final

import torch

from arrondi.errors import DataError, ShapeError

_PANEL: Final = 256
"""Rows of H computed at a time: n·256 numbers of scratch. Narrower panels waste less of the product above the diagonal
but multiply more slowly."""

_FLOAT32_MAX: Final = float(torch.finfo(torch.float32).max)


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
        packed[..., _row(i) : _row(i + 1)] = matrix[..., i, : i + 1]
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
        matrix[..., i, : i + 1] = packed[..., _row(i) : _row(i + 1)]
    for start in range(0, n, _PANEL):  # mirror block by block, which keeps both sides in cache
        stop = min(start + _PANEL, n)
        matrix[..., :start, start:stop] = matrix[..., start:stop, :start].mT
        block = matrix[..., start:stop, start:stop]
        lower = torch.ones(stop - start, stop - start, dtype=torch.bool, device=packed.device).tril()
        block.copy_(torch.where(lower, block, block.mT))
    return matrix


def _row(i: int) -> int:
    """Where row i of the triangle begins."""
    return i * (i + 1) // 2


class SecondMoment:
    """H = Σ x xᵀ over every token seen, as a packed half-vector.

    A plain sum: **not** divided by the number of tokens and without the factor 2 of the squared loss's Hessian. GPTQ
    does not depend on the scale; divide by `tokens` where a mean is wanted. Sums of two workers add up to the sum of
    both.

    Attributes:
        n: features.
        name: what the inputs are called in messages.
        packed: (n(n+1)/2,) float32, in the order of `vech`.
        tokens: rows summed so far.

    The same batches in the same order on the same machine with the same number of threads give the same bits.
    """

    def __init__(self, n: int, *, name: str = "input", device: torch.device | str = "cpu") -> None:
        if n < 1:
            raise ShapeError(
                f"{name}: a second moment needs at least one feature, got n={n}. Pass the size of the last axis."
            )
        self.n = n
        self.name = name
        self.packed = torch.zeros(n * (n + 1) // 2, dtype=torch.float32, device=device)
        self.tokens = 0

    @classmethod
    def from_packed(cls, packed: torch.Tensor, tokens: int, *, name: str = "input") -> SecondMoment:
        """The statistic that had this half-vector and count; `packed` is copied.

        Raises:
            ShapeError: `packed` is not a vector of n(n+1)/2 numbers.
        """
        n = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
        if packed.ndim != 1 or packed.numel() != n * (n + 1) // 2:
            raise ShapeError(
                f"{name}: expected n(n+1)/2 numbers, got shape {tuple(packed.shape)}. Pass `packed` of another one."
            )
        moment = cls(n, name=name, device=packed.device)
        moment.packed.copy_(packed)
        moment.tokens = tokens
        return moment

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Add every row of `x`.

        Args:
            x: (..., n), any floating dtype; multiplied and accumulated in float32. No rows are fine.

        Raises:
            ShapeError: the last axis is not n.
            DataError: not floating, or the sum of squares is not finite in float32: a NaN, an infinity, or an overflow.
                The statistic is then as it was before the call.
        """
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise ShapeError(f"{self.name}: the last axis must have {self.n} features, got shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DataError(f"{self.name}: second moments are of floating inputs, got {x.dtype}. Convert them first.")
        rows = x.reshape(-1, self.n).to(self.packed.device, torch.float32)
        flat = rows.reshape(-1)
        # One dot product gives the batch's trace, which no NaN or infinity anywhere in it leaves finite.
        if not float(torch.dot(flat, flat)) + self.trace <= _FLOAT32_MAX:
            raise DataError(self._complaint(rows))
        for start in range(0, self.n, _PANEL):  # rows start … stop of H, up to the end of the diagonal block
            stop = min(start + _PANEL, self.n)
            panel = rows[:, start:stop].T @ rows[:, :stop]
            lengths = range(start + 1, stop + 1)
            left = panel.reshape(-1).split([part for i in lengths for part in (i, stop - i)])[::2]  # up to the diagonal
            for row, more in zip(self.packed[_row(start) : _row(stop)].split(list(lengths)), left, strict=True):
                row += more
        self.tokens += rows.shape[0]

    def _complaint(self, rows: torch.Tensor) -> str:
        bad = int((~torch.isfinite(rows)).sum())
        if bad:
            return f"{self.name}: {bad} of {rows.numel()} values are NaN or infinite. Repair or exclude their source."
        return f"{self.name}: squares of values up to {float(rows.abs().max()):.3g} overflow float32. Scale them down."

    def merge(self, other: SecondMoment) -> None:
        """Add what another worker saw.

        Raises:
            ShapeError: another number of features.
        """
        if other.n != self.n:
            raise ShapeError(f"{self.name}: cannot add a moment of {other.n} features to one of {self.n}.")
        self.packed += other.packed.to(self.packed.device)
        self.tokens += other.tokens

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """A new statistic of what both saw, with the name of the first."""
        both = SecondMoment.from_packed(self.packed, self.tokens, name=self.name)
        both.merge(other)
        return both

    def diagonal(self) -> torch.Tensor:
        """(n,) float32: Σ x² of every feature."""
        i = torch.arange(self.n, device=self.packed.device)
        return self.packed[i * (i + 3) // 2]

    @property
    def trace(self) -> float:
        """Σ |x|² over all tokens, summed in float64."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def matrix(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(n, n) symmetric H = Σ x xᵀ, freshly allocated."""
        return unvech(self.packed.to(dtype))

    def __repr__(self) -> str:
        return f"SecondMoment(n={self.n}, tokens={self.tokens}, name={self.name!r})"


class Reservoir:
    """A uniform sample of at most `capacity` rows of a stream of any length.

    Every subset of that size is equally likely, whatever the batches were; how the stream is cut into batches does not
    change the sample. Draws come from an own generator, never from the global one.

    Attributes:
        capacity: most rows kept.
        seen: rows observed so far.
        name: what the inputs are called in messages.

    Source: Vitter 1985, algorithm R.
    """

    def __init__(self, capacity: int, *, seed: int = 0, name: str = "input") -> None:
        if capacity < 1:
            raise ShapeError(f"{name}: a reservoir holds at least one row, got capacity={capacity}.")
        self.capacity = capacity
        self.seen = 0
        self.name = name
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: torch.Tensor | None = None  # (capacity, n); allocated at the first batch

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Let every row of `x` compete for a place.

        Args:
            x: (..., n), any dtype; kept in the dtype of the first batch, on the CPU.

        Raises:
            ShapeError: n differs from earlier batches.
            DataError: a NaN or an infinity anywhere in `x`.
        """
        if x.ndim == 0:
            raise ShapeError(f"{self.name}: a sample is of rows, got a scalar. Pass (..., n).")
        rows = x.detach().reshape(-1, x.shape[-1])
        if not math.isfinite(float(rows.sum(dtype=torch.float32))) and (bad := int((~torch.isfinite(rows)).sum())):
            raise DataError(
                f"{self.name}: {bad} of {rows.numel()} values are NaN or infinite. Repair or exclude their source."
            )
        kept = self._storage(rows)
        free = min(max(self.capacity - self.seen, 0), rows.shape[0])
        kept[self.seen : self.seen + free] = rows[:free]
        order = torch.arange(self.seen + free, self.seen + rows.shape[0])  # position in the stream of the rows left
        place = (torch.rand(len(order), generator=self._generator, dtype=torch.float64) * (order + 1)).long()
        accepted = torch.nonzero(place < self.capacity).flatten()
        winner = torch.full((self.capacity,), -1)  # of several rows for one place the last one stays
        winner.scatter_reduce_(0, place[accepted], accepted, "amax")
        places = torch.nonzero(winner >= 0).flatten()
        kept[places] = rows[(winner[places] + free).to(rows.device)].to(kept)
        self.seen += rows.shape[0]

    def rows(self) -> torch.Tensor:
        """(min(seen, capacity), n): the sample. It is the reservoir's own storage, not a copy; the order means nothing.

        Raises:
            DataError: nothing was observed.
        """
        if self._kept is None or self.seen == 0:
            raise DataError(
                f"{self.name}: the reservoir is empty, no row was observed. Run calibration data through it first."
            )
        return self._kept[: self.seen]

    def merge(self, other: Reservoir) -> None:
        """Become a uniform sample of both streams: each side keeps places in proportion to the rows it saw.

        Raises:
            ShapeError: another capacity or another number of features.
        """
        if other.capacity != self.capacity:
            raise ShapeError(
                f"{self.name}: cannot merge reservoirs of {self.capacity} and {other.capacity} rows. Use one size."
            )
        if other.seen == 0:
            return
        theirs = other.rows()
        kept = self._storage(theirs)
        size = min(self.capacity, self.seen + other.seen)
        here = self._share(self.seen, other.seen, size)
        mine = kept[: self.seen][self._choose(min(self.seen, self.capacity), here)]
        kept[:size] = torch.cat((mine, theirs[self._choose(len(theirs), size - here)].to(kept)))
        self.seen += other.seen

    def _storage(self, rows: torch.Tensor) -> torch.Tensor:
        if self._kept is None:
            self._kept = torch.empty(self.capacity, rows.shape[-1], dtype=rows.dtype)
        if self._kept.shape[-1] != rows.shape[-1]:
            raise ShapeError(
                f"{self.name}: rows have {rows.shape[-1]} features, earlier ones had {self._kept.shape[-1]}."
            )
        return self._kept

    def _share(self, here: int, there: int, draws: int) -> int:
        """How many of `draws` rows, drawn without replacement from both streams, are this one's (hypergeometric)."""
        left = here
        for i, u in enumerate(torch.rand(draws, generator=self._generator, dtype=torch.float64).tolist()):
            left -= u * (here + there - i) < left
        return here - left

    def _choose(self, count: int, size: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator)[:size]
