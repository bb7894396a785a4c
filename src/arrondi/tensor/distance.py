"""How far numbers are apart, by pieces, so that it takes no memory beside them: `distance` of two tensors, `distance_of` of two quantized ones;
and `requantized`, a quantized tensor rounded anew, by pieces as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from arrondi.formats import Scheme
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rows_of, separable, stack_rows

_PIECE: Final = 1 << 20
"""Numbers that are looked at together."""


@dataclass(frozen=True)
class Distance:
    """Sums over two tensors.

    Attributes:
        largest: the largest difference of two numbers; NaN where one of them is none.
        noise: the sum of squared differences, float64.
        signal: that of the first tensor's squares.
    """

    largest: float
    noise: float
    signal: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise in decibels; infinite where nothing differs."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def distance(one: torch.Tensor, two: torch.Tensor) -> Distance:
    """How far `two` is from `one`: two contiguous tensors of as many numbers."""
    return _summed(zip(one.reshape(-1).split(_PIECE), two.reshape(-1).split(_PIECE), strict=True))


def distance_of(one: QTensor, two: QTensor) -> Distance:
    """How far the numbers of `two` are from those of `one`, of the same shape."""
    whole = not (_in_rows(one) and _in_rows(two))
    return _summed((a.dequantize(), b.dequantize()) for a, b in zip(_rows(one, whole), _rows(two, whole), strict=True))


def requantized(q: QTensor, scheme: Scheme) -> QTensor:
    """The numbers of a tensor, each rounded to the nearest of another scheme."""
    whole = not (_in_rows(q) and separable(scheme))
    return stack_rows([quantize_tensor(part.dequantize(), scheme) for part in _rows(q, whole)])


def _in_rows(q: QTensor) -> bool:
    """Whether rows of a matrix can be looked at alone."""
    return len(q.shape) == 2 and q.scheme.format.trellis is None and q.apart is None and separable(q.scheme)


def _rows(q: QTensor, whole: bool) -> Iterator[QTensor]:
    if whole or q.codes.numel() <= _PIECE:
        yield q
        return
    step = max(_PIECE // q.shape[1], 1)
    for start in range(0, q.shape[0], step):
        yield rows_of(q, start, min(step, q.shape[0] - start))


def _summed(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Distance:
    largest, noise, signal = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for a, b in pairs:
        apart = a.double().sub_(b)
        signal += float(a.double().square_().sum())
        noise += float(apart.square().sum())
        largest = torch.maximum(largest, apart.abs_().max())
    return Distance(float(largest), noise, signal)
