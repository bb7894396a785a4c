"""Second moments of a layer's inputs, streamed, with the same bytes however the stream is cut or shared out.

Owns: `SecondMoment` (H = Σ x xᵀ as a half-vector), `SPANS`, `span_of` and `moment_bytes`.  Uses: `halfvectors`, `errors`.

Floating-point sums depend on their order, so the order is fixed by the stream alone. The stream is `SPANS` contiguous spans, and
a span is chunks of a fixed number of rows, counted from its beginning:

    chunk    one matrix product, of `CHUNK` rows but for the last one of a span
    span     its chunks, added one after another
    H        its spans, added one after another: (((s0 + s1) + s2) + …) + s7

Batches of any size give the same chunks, for rows wait until a chunk is full. Workers that take whole spans (1, 2, 4 or 8 workers,
or any other division) give the same spans, and merging adds those in their order. Memory: one half-vector while there is one
span; a worker that begins at the first span adds up what it has finished and holds two, one that begins later holds one for each
of its spans. Waiting rows take up to CHUNK · n numbers.

Source: Frantar et al. 2022, arXiv:2210.17323 (what H is for).
"""

from __future__ import annotations

import math
from typing import Final

import torch

from arrondi.arguments import check_arguments, said
from arrondi.calibration.halfvectors import PANEL, row_start, unvech
from arrondi.errors import DataError, ShapeError

CHUNK: Final = 1024
"""Rows of a chunk. With half as many the sums of a layer of 2048 features take a quarter longer."""

SPANS: Final = 8
"""Into how many spans a stream is divided: the largest number of workers that can share it."""

_WIDEST: Final = 1 << 24
"""Features; a wider statistic would be of petabytes."""

_FLOAT32_MAX: Final = float(torch.finfo(torch.float32).max)


def span_of(index: int, count: int) -> int:
    """The span that sample `index` of `count` belongs to.

    >>> [span_of(i, 12) for i in range(12)]
    [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    """
    if not 0 <= index < count:
        raise ShapeError(f"There is no sample {index} of {count}.")
    return index * SPANS // count


def moment_bytes(n: int, *, spans: bool = True) -> int:
    """The most memory that the second moment of n features takes while one worker streams it, for estimates.

    Args:
        spans: whether the stream comes in several spans.
    """
    return 4 * ((2 if spans else 1) * (n * (n + 1) // 2) + (CHUNK + PANEL) * n)


class SecondMoment:
    """H = Σ x xᵀ over every token seen, as a packed half-vector.

    A plain sum: **not** divided by the number of tokens and without the factor 2 of the squared loss's Hessian. GPTQ
    does not depend on the scale; divide by `tokens` where a mean is wanted.

    Attributes:
        n: features.
        first_span: where the part of the stream begins that this one sees; 0 unless workers share the stream.
        name: what the inputs are called in messages.
        tokens: rows summed so far.

    The same stream on the same machine with the same number of threads gives the same bits, see above. Reading (`packed`,
    `diagonal`, `matrix`, …) ends a chunk, so read when the stream is over.
    """

    def __init__(self, n: int, *, first_span: int = 0, name: str = "input", device: torch.device | str = "cpu") -> None:
        check_arguments(SecondMoment.__init__, {"n": n, "first_span": first_span, "device": device}, ShapeError)
        if not 0 < n <= _WIDEST:
            raise ShapeError(
                f"{name}: a second moment needs at least one feature and at most {_WIDEST}, got n={n}. Pass the size of the last axis."
            )
        self.n = n
        self.name = name
        self.tokens = 0
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise DataError(f"{name}: there is no device {device!r}. Say cpu or cuda:0.") from None
        self._spans: dict[int, torch.Tensor] = {}
        """(n(n+1)/2,) float32 each, ascending; under 0 … k finished together, the sum is kept under k."""
        self._span = self._first = first_span
        self._waiting = torch.empty(0, n, dtype=torch.float32, device=self.device)
        """(room, n): the first `_held` rows are those of the chunk that is not full yet; it grows with need."""
        self._held = 0
        self._power = 0.0

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
        moment._spans[0] = packed.to(torch.float32, copy=True)
        moment._power = moment.trace
        moment.tokens = tokens
        return moment

    @torch.no_grad()
    def update(self, x: torch.Tensor, span: int | None = None) -> None:
        """Add every row of `x`.

        Args:
            x: (..., n), any floating dtype; multiplied and accumulated in float32. No rows are fine.
            span: which span of the stream they belong to (see `span_of`), never one before that of an earlier call.
                None: the same as before.

        Raises:
            ShapeError: the last axis is not n, or the span has gone by.
            DataError: not floating, or the sum of squares is not finite in float32: a NaN, an infinity, or an overflow.
                The statistic is then as it was before the call.
        """
        if not isinstance(x, torch.Tensor):
            raise DataError(f"{self.name}: second moments are of tensors, got {said(x)}. Convert it first.")
        if x.ndim == 0 or x.shape[-1] != self.n:
            raise ShapeError(f"{self.name}: the last axis must have {self.n} features, got shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DataError(f"{self.name}: second moments are of floating inputs, got {x.dtype}. Convert them first.")
        span = self._span if span is None else span
        if not self._span <= span < SPANS:
            raise ShapeError(f"{self.name}: spans come in order, {self._span} … {SPANS - 1} may follow, got {span}.")
        rows = x.reshape(-1, self.n).to(self.device, torch.float32)
        flat = rows.reshape(-1)
        # One dot product gives the batch's trace, which no NaN or infinity anywhere in it leaves finite.
        power = float(torch.dot(flat, flat))
        if not power + self._power <= _FLOAT32_MAX:
            raise DataError(self._complaint(rows))
        if span != self._span:
            self._begin(span)
        self._power += power
        self.tokens += rows.shape[0]
        while rows.shape[0]:
            taken = rows[: CHUNK - self._held]
            self._make_room(self._held + len(taken))
            self._waiting[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            rows = rows[len(taken) :]
            if self._held == CHUNK:
                self._add_chunk()

    def _make_room(self, rows: int) -> None:
        if rows > len(self._waiting):
            larger = self._waiting.new_empty(min(max(rows, 2 * len(self._waiting)), CHUNK), self.n)
            larger[: self._held] = self._waiting[: self._held]
            self._waiting = larger

    def _begin(self, span: int) -> None:
        """End the present span; where all before it are here too, they become one sum."""
        self._add_chunk()
        if self._spans and self._first == 0:
            self._spans = {self._span: self._folded()}
        self._span = span

    def _folded(self) -> torch.Tensor:
        """The sum of all spans in their order, in the memory of the first."""
        first, *others = (self._spans[span] for span in sorted(self._spans))
        for other in others:
            first += other
        return first

    def _add_chunk(self) -> None:
        """Add the waiting rows to the present span."""
        if not self._held:
            return
        rows, self._held = self._waiting[: self._held], 0
        if self._span not in self._spans:
            length = self.n * (self.n + 1) // 2
            self._spans[self._span] = torch.zeros(length, dtype=torch.float32, device=self.device)
        packed = self._spans[self._span]
        for start in range(0, self.n, PANEL):  # rows start … stop of H, up to the end of the diagonal block
            stop = min(start + PANEL, self.n)
            panel = rows[:, start:stop].T @ rows[:, :stop]
            lengths = range(start + 1, stop + 1)
            left = panel.reshape(-1).split([part for i in lengths for part in (i, stop - i)])[::2]  # up to the diagonal
            for row, more in zip(packed[row_start(start) : row_start(stop)].split(list(lengths)), left, strict=True):
                row += more

    def _complaint(self, rows: torch.Tensor) -> str:
        bad = int((~torch.isfinite(rows)).sum())
        if bad:
            return f"{self.name}: {bad} of {rows.numel()} values are NaN or infinite. Repair or exclude their source."
        return f"{self.name}: squares of values up to {float(rows.abs().max()):.3g} overflow float32. Scale them down."

    def merge(self, other: SecondMoment) -> None:
        """Add what another worker saw. Spans that only one of both has keep their place in the order of the sum.

        Raises:
            ShapeError: another number of features.
        """
        if other.n != self.n:
            raise ShapeError(f"{self.name}: cannot add a moment of {other.n} features to one of {self.n}.")
        for moment in (self, other):
            moment._end()
        for span, packed in other._spans.items():
            if span in self._spans:
                self._spans[span] += packed.to(self.device)
            else:
                self._spans[span] = packed.to(self.device, copy=True)
        self._first, self._span = min(self._first, other._first), max(self._span, other._span)
        self._power += other._power
        self.tokens += other.tokens

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """A new statistic of what both saw, with the name of the first."""
        both = SecondMoment(self.n, first_span=self._first, name=self.name, device=self.device)
        both.merge(self)
        both.merge(other)
        return both

    def _end(self) -> None:
        """No row waits, and no memory for them is held."""
        self._add_chunk()
        self._waiting = self._waiting[:0].clone()

    @property
    def packed(self) -> torch.Tensor:
        """(n(n+1)/2,) float32, in the order of `vech`. Not a copy, unless spans before those seen here are missing."""
        self._end()
        if not self._spans:
            return torch.zeros(self.n * (self.n + 1) // 2, dtype=torch.float32, device=self.device)
        if len(self._spans) > 1 and self._first == 0:
            self._spans = {max(self._spans): self._folded()}
        if len(self._spans) == 1:
            return next(iter(self._spans.values()))
        first, *others = (self._spans[span] for span in sorted(self._spans))
        total = first.clone()
        for other in others:
            total += other
        return total

    def diagonal(self) -> torch.Tensor:
        """(n,) float32: Σ x² of every feature."""
        i = torch.arange(self.n, device=self.device)
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
