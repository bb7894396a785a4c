"""Keys and values along their principal directions: (batch, heads, tokens, width) ↔ bytes.

Owns: `Turn`, the rotary embedding that keys are freed of; `energies`, what they meet; `Basis`, the directions of one layer's keys or values with their bits and
steps; `basis_of`, which finds them from moments; `encode` and `decode`. Pure functions of tensors.

A token of a head is `Basis.bytes` bytes: its channels of 8 bits, then pairs of 4 bits, then fours of 2 bits, the first one lowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from arrondi.errors import DataError

_STEPS: Final = {2: 0.9957, 4: 0.3352, 8: 0.0308}
"""The best step of a uniform quantizer of so many bits for a normal variable of variance 1 (Max 1960, doi:10.1109/TIT.1960.1057548)."""
_WIDER: Final = 1.3
"""Real channels have longer tails than a normal variable: steps are wider by this."""
_LEFT: Final = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 0.000116}
"""Variance that is left of 1 with so many bits."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotary embedding: position p turns pairs of channels by p · frequency.

    Attributes:
        frequencies: (n,) float32; 2n channels are turned.
        neighbours: a pair is two channels side by side, not one of each half.
        last: the turned channels are the last of a head, not the first.

    Whether the model turns its keys so only decides how few bits they take: what is turned back is turned forth alike.
    """

    frequencies: torch.Tensor
    neighbours: bool = False
    last: bool = False

    def apply(self, x: torch.Tensor, start: int, *, back: bool = False) -> torch.Tensor:
        """Turn (…, tokens, width) whose first token has the position `start`, or turn it back."""
        size = 2 * len(self.frequencies)
        skipped = x.shape[-1] - size if self.last else 0
        positions = torch.arange(start, start + x.shape[-2], dtype=torch.float64, device=x.device)
        angles = positions[:, None] * self.frequencies.double().to(x.device) * (-1 if back else 1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        part = x[..., skipped : skipped + size]
        one, two = (part[..., ::2], part[..., 1::2]) if self.neighbours else part.chunk(2, dim=-1)
        turned = one * cos - two * sin, two * cos + one * sin
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.neighbours else torch.cat(turned, dim=-1)
        return torch.cat([x[..., :skipped], joined, x[..., skipped + size :]], dim=-1)


def energies(squares: torch.Tensor, turn: Turn | None) -> torch.Tensor:
    """What the channels of keys meet on average: Σ q² of queries (heads, width), shared by the two of a pair that a rotary embedding turns.

    How far a query is turned against a key depends on the distance of their tokens, so of a pair only the sum is known.
    """
    if turn is None:
        return squares
    size, shared = 2 * len(turn.frequencies), squares.clone()
    skipped = squares.shape[-1] - size if turn.last else 0
    part = squares[..., skipped : skipped + size]
    pairs = part.unflatten(-1, (-1, 2)) if turn.neighbours else part.unflatten(-1, (2, -1)).mT
    means = pairs.mean(-1, keepdim=True).expand_as(pairs)
    shared[..., skipped : skipped + size] = (means if turn.neighbours else means.mT).flatten(-2)
    return shared


class Moments(NamedTuple):
    """Sums over states (…, heads, tokens, width): how many, Σ x (heads, width) and Σ x xᵀ (heads, width, width), float64."""

    tokens: int
    total: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> Moments:
        """Of (batch, heads, tokens, width)."""
        flat = x.double().transpose(0, 1).flatten(1, 2)
        return cls(flat.shape[1], flat.sum(1), flat.mT @ flat)

    def plus(self, other: Moments) -> Moments:
        return Moments(self.tokens + other.tokens, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.tokens

    @property
    def covariance(self) -> torch.Tensor:
        return self.square / self.tokens - self.mean[:, :, None] * self.mean[:, None]


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions of one layer's keys or values.

    Attributes:
        mean: (heads, width) float32.
        rows: (heads, n, width) float32, orthonormal: the directions that have bits, those of 8 bits first, then 4, then 2.
            They are directions of what is left when the mean is taken away and every channel multiplied by its weight.
        scale: (heads, n) float32, the step of each.
        counts: how many have 8, 4 and 2 bits.
        turn: what is undone before and done after; None for values, and for keys that are not turned.
        weight: (heads, width) float32, positive: how much an error of each channel counts; None: all alike.
    """

    mean: torch.Tensor
    rows: torch.Tensor
    scale: torch.Tensor
    counts: tuple[int, int, int]
    turn: Turn | None = None
    weight: torch.Tensor | None = None

    @property
    def into(self) -> torch.Tensor:
        """(heads, n, width): what of a state without its mean gives the place along each direction."""
        return self.rows if self.weight is None else self.rows * self.weight[:, None]

    @property
    def back(self) -> torch.Tensor:
        """(heads, n, width): what each direction is of a state."""
        return self.rows if self.weight is None else self.rows / self.weight[:, None]

    @property
    def bytes(self) -> int:
        """Of one token of one head."""
        eight, four, two = self.counts
        return eight + four // 2 + two // 4

    def levels(self) -> torch.Tensor:
        """(n,) how far the codes of every direction go."""
        return torch.tensor([255.0] * self.counts[0] + [15.0] * self.counts[1] + [3.0] * self.counts[2])


def basis_of(
    moments: Moments, bits: float, turn: Turn | None = None, weight: torch.Tensor | None = None
) -> tuple[Basis, float]:
    """Principal directions with bits where they are worth most, the same numbers of bits for all heads; and the variance that is left.

    Args:
        weight: (heads, width) float64: as of `Basis`; the variance that is left is that of weighted states.
    """
    covariance = moments.covariance
    if weight is not None:
        covariance = covariance * weight[:, :, None] * weight[:, None]
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    counts = _counts(values.mean(0), bits)
    n = sum(counts)
    widths = torch.tensor([8] * counts[0] + [4] * counts[1] + [2] * counts[2])
    steps = torch.tensor([_STEPS[int(w)] for w in widths], dtype=torch.float64) * _WIDER
    scale = values[:, :n].sqrt() * steps
    scale = torch.where(scale > 1e-30, scale, 1.0)
    left = torch.tensor([_LEFT[int(w)] for w in widths], dtype=torch.float64)
    loss = float((values[:, :n] * left).sum() + values[:, n:].sum())
    rows = vectors[:, :, :n].mT.contiguous()
    floats = None if weight is None else weight.float()
    return Basis(moments.mean.float(), rows.float(), scale.float(), counts, turn, floats), loss


def _counts(variance: torch.Tensor, bits: float) -> tuple[int, int, int]:
    """How many of the directions, largest first, get 8, 4 and 2 bits, so that least variance is left."""
    width = len(variance)
    budget = int(bits * width)
    sums = torch.cat([variance.new_zeros(1), variance.cumsum(0)]).tolist()
    best, found = float("inf"), (0, 0, 0)
    for eight in range(min(budget // 8, width) + 1):
        for four in range(0, min((budget - 8 * eight) // 4, width - eight) + 1, 2):
            two = min((budget - 8 * eight - 4 * four) // 2, width - eight - four) // 4 * 4
            a, b, c = eight, eight + four, eight + four + two
            left = _LEFT[8] * sums[a] + _LEFT[4] * (sums[b] - sums[a]) + _LEFT[2] * (sums[c] - sums[b])
            left += sums[-1] - sums[c]
            if left < best:
                best, found = left, (eight, four, two)
    return found


def encode(x: torch.Tensor, basis: Basis, start: int) -> torch.Tensor:
    """The bytes (batch, heads, tokens, bytes) of states (batch, heads, tokens, width) from the position `start` on.

    Raises:
        DataError: NaN or infinity.
    """
    real = x.float()
    if not torch.isfinite(real).all():
        raise DataError("A key or value is NaN or infinite, so it has no code. Look for the layer that computes it.")
    if basis.turn is not None:
        real = basis.turn.apply(real, start, back=True)
    z = (real - basis.mean[:, None]) @ basis.into.mT / basis.scale[:, None]
    top = basis.levels().to(z.device)
    codes = (z + top / 2).round_().clamp_(torch.zeros_like(top), top).to(torch.uint8)
    eight, four, two = codes.split(basis.counts, dim=-1)
    twos = two.unflatten(-1, (-1, 4))
    pairs = four.unflatten(-1, (-1, 2))
    small = [
        pairs[..., 0] | pairs[..., 1] << 4,
        twos[..., 0] | twos[..., 1] << 2 | twos[..., 2] << 4 | twos[..., 3] << 6,
    ]
    return torch.cat([eight, *small], dim=-1)


def decode(packed: torch.Tensor, basis: Basis, start: int) -> torch.Tensor:
    """States (batch, heads, tokens, width) in float32."""
    eight, four, two = packed.split([basis.counts[0], basis.counts[1] // 2, basis.counts[2] // 4], dim=-1)
    parts = [
        eight,
        torch.stack([four & 15, four >> 4], dim=-1).flatten(-2),
        torch.stack([two >> s & 3 for s in (0, 2, 4, 6)], dim=-1).flatten(-2),
    ]
    z = (torch.cat(parts, dim=-1).float() - basis.levels().to(packed.device) / 2) * basis.scale[:, None]
    real = z @ basis.back + basis.mean[:, None]
    return real if basis.turn is None else basis.turn.apply(real, start)
