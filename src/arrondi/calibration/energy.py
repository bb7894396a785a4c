"""Σ x² and max |x| of every column of an input, for two halves of a stream apart.

Owns: `Energy`. The sum over both halves is the diagonal of the second moment (an importance matrix); how far the halves are from
each other says how much what was calibrated depends on which text was taken. Batches go to the halves in turns, so that a text of two
kinds, one after the other, is no cause for alarm: calibrating on both is better than on either.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from arrondi.errors import ShapeError

HALVES: Final = 2


class Moved(NamedTuple):
    """How far statistics move from one half of the text to the other, 0 if not at all.

    Attributes:
        second_moments: Σ |a - b| / Σ (a + b) / 2 over columns, with a and b the mean x² of a column in each half; at most 2.
        absmax: the mean over columns of 1 - min(a, b) / max(a, b), with a and b the largest |x|; at most 1.
    """

    second_moments: float
    absmax: float


class Energy:
    """Sums of squares and largest magnitudes of n columns.

    Attributes:
        squares: (2, n) float64, Σ x² of every half.
        absmax: (2, n) float32.
        tokens: rows of every half.
    """

    def __init__(self, n: int) -> None:
        self.squares = torch.zeros(HALVES, n, dtype=torch.float64)
        self.absmax = torch.zeros(HALVES, n)
        self.tokens = [0] * HALVES

    @torch.no_grad()
    def add(self, rows: torch.Tensor, half: int) -> None:
        """Count rows (tokens, n), any floating dtype, squared in float32.

        Raises:
            ShapeError: there is no such half, or the rows are of another width.
        """
        if half not in range(HALVES) or rows.ndim != 2 or rows.shape[1] != self.squares.shape[1]:
            raise ShapeError(
                f"Expected rows (tokens, {self.squares.shape[1]}) and the half 0 or 1, got {tuple(rows.shape)} and {half}. Reshape the input first."
            )
        if not len(rows):
            return
        x = rows.float()
        self.squares[half] += x.square().sum(0, dtype=torch.float64).cpu()
        self.absmax[half] = torch.maximum(self.absmax[half], x.abs().amax(0).cpu())
        self.tokens[half] += len(rows)

    @property
    def importance(self) -> torch.Tensor:
        """Mean x² of every column over all tokens, float32 (n,)."""
        return (self.squares.sum(0) / max(sum(self.tokens), 1)).float()

    @property
    def moved(self) -> Moved | None:
        """How far the halves are apart; None where one of them is empty."""
        if not all(self.tokens):
            return None
        means = self.squares / torch.tensor(self.tokens, dtype=torch.float64).unsqueeze(1)
        total = float(means.sum())
        apart = float((means[0] - means[1]).abs().sum()) * 2 / total if total else 0.0
        low, high = self.absmax.aminmax(dim=0)
        seen = high > 0
        scales = float((1 - low[seen] / high[seen]).mean()) if bool(seen.any()) else 0.0
        return Moved(apart, scales)


def half_of(index: int) -> int:
    """The half that batch `index` belongs to: they take turns."""
    return index % HALVES
