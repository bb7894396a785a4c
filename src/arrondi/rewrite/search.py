"""The best of several scales by what the rounded layers then give.

Owns: `Reader` (a weight that multiplies the activation, with its deployed rounding), `output_error` and `best_scale`.

With the rounding error D = W - Ŵ·diag(1/s) of a weight W that was multiplied by s before it was rounded to Ŵ, the error of the
layer's output on inputs X is ‖X Dᵀ‖² = tr(D H Dᵀ) with H = XᵀX: no input has to be kept. Where inputs are rounded too, s changes
their error as well, and a sample of them is sent through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Rounded = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(a tensor, what its columns were multiplied or divided by) → the tensor as it reads back after rounding."""


@dataclass(frozen=True)
class Reader:
    """One weight of those that multiply an activation; or some rows of it, where each is rounded by itself.

    Attributes:
        weight: (m, n) float32.
        rounds: how it will be rounded; None if it stays as it is.
        hessian: (n, n), Σ x xᵀ of its inputs; needed unless inputs are rounded.
        rounds_inputs: how what enters the layer will be rounded; None if it is not.
        sample: (t, n) some of its inputs, not rounded; needed where inputs are rounded.
        tokens: inputs of which the sample is one.
        share: rows of the whole weight for each row that is here.
    """

    weight: torch.Tensor
    rounds: Rounded | None
    hessian: torch.Tensor | None = None
    rounds_inputs: Rounded | None = None
    sample: torch.Tensor | None = None
    tokens: int = 0
    share: float = 1.0

    def error(self, columns: torch.Tensor) -> float:
        """‖XWᵀ - X̂Ŵᵀ‖² over all tokens if column j is multiplied by columns[j] and inputs are divided by it."""
        if self.rounds is None and self.rounds_inputs is None:
            return 0.0
        scaled = self.weight * columns
        restored = scaled if self.rounds is None else self.rounds(scaled, columns)
        if self.rounds_inputs is None:
            assert self.hessian is not None
            lost = self.weight - restored / columns
            found = float((lost @ self.hessian).mul_(lost).sum(dtype=torch.float64))
        else:
            assert self.sample is not None
            given = self.rounds_inputs(self.sample / columns, columns) @ restored.T
            off = given.sub_(self.sample @ self.weight.T).square_().sum(dtype=torch.float64)
            found = float(off) * self.tokens / max(len(self.sample), 1)
        return max(found, 0.0) * self.share


class Found(NamedTuple):
    """What a search gives.

    Attributes:
        scale: (channels,) the best one.
        chosen: its name: a ratio, an exponent, or None for leaving everything as it is.
        history: the error of every candidate, in their order; the first one leaves everything as it is.
    """

    scale: torch.Tensor
    chosen: float | None
    history: tuple[float, ...]


def best_scale(
    candidates: Iterable[tuple[float, torch.Tensor]], readers: Sequence[Reader], channels: torch.Tensor, count: int
) -> Found:
    """Of several scales, and of leaving everything as it is, the one with the least error, summed over all readers.

    Args:
        candidates: (name, (count,) scale).
        readers: all that multiply the activation.
        channels: (n,) the channel of every column.
        count: channels.
    """
    found = Found(torch.ones(count, device=channels.device), None, ())
    least, history = math.inf, []
    named: list[tuple[float | None, torch.Tensor]] = [(None, found.scale), *candidates]
    for name, scale in named:
        columns = scale[channels]
        error = sum(reader.error(columns) for reader in readers)
        history.append(error)
        if error < least:
            least, found = error, Found(scale, name, ())
    return found._replace(history=tuple(history))
