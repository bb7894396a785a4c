"""What rounding a weight cost: sums of squares, of which every ratio is taken last.

Owns: `ErrorSums`, `weight_sums` and `output_sums`. Sums of several matrices add up; ratios and decibels would not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from arrondi.calibration import SecondMoment
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.quantizers import lost

_ROWS = 1024
"""Rows whose output error is computed at a time."""


@dataclass(frozen=True)
class ErrorSums:
    """Σ of squared errors and Σ of squared values."""

    noise: float = 0.0
    power: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(self.noise + other.noise, self.power + other.power)

    @property
    def ratio(self) -> float:
        """Error over power; 0 where there is neither."""
        return self.noise / self.power if self.power > 0 else 0.0

    @property
    def decibels(self) -> float:
        """Signal to quantization noise ratio; infinite for an exact copy."""
        return math.inf if self.noise == 0 else 10 * math.log10(max(self.power, 1e-300) / self.noise)


def weight_sums(weight: torch.Tensor, q: QTensor) -> ErrorSums:
    """Σ (w - ŵ)² and Σ w² of a rounded weight."""
    found = lost(weight, q.codes, q.scheme, q.grid)
    if found is not None:
        return ErrorSums(*found)
    weight = weight.float()
    noise = float(torch.linalg.vector_norm(q.dequantize().sub_(weight))) ** 2
    return ErrorSums(noise, float(torch.linalg.vector_norm(weight)) ** 2)


def output_sums(weight: torch.Tensor, restored: torch.Tensor, moment: SecondMoment) -> ErrorSums:
    """‖X(W - Ŵ)ᵀ‖² and ‖XWᵀ‖² on the inputs whose second moment is given.

    Args:
        weight, restored: (out, in).
        moment: Σ x xᵀ of inputs of size `in`.
    """
    hessian = moment.matrix()
    total = ErrorSums()
    for rows, back in zip(weight.split(_ROWS), restored.split(_ROWS), strict=True):
        difference = rows - back
        error = float((difference @ hessian).mul_(difference).sum(dtype=torch.float64))
        power = float((rows @ hessian).mul_(rows).sum(dtype=torch.float64))
        total += ErrorSums(error, power)
    return total
