"""What rounding a weight cost: of the weight itself, and of the layer's output on the calibration inputs.

Owns: `Loss` (two sums, from which every figure is made), `weight_loss` and `output_loss`.

Figures of several tensors come from added sums, never from averaged ratios or decibels: an expert stack of which one matrix is
exact has a finite ratio, and a small noisy tensor beside a large clean one counts as what it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from arrondi.errors import ShapeError
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.quantizers import lost

_ROWS = 1024
"""Rows whose output error is computed at a time."""


class Loss(NamedTuple):
    """Noise and signal, both sums of squares; those of two tensors add up to the loss of both together."""

    noise: float = 0.0
    signal: float = 0.0

    def __add__(self, other: object) -> Loss:
        if not isinstance(other, Loss):
            return NotImplemented
        return Loss(self.noise + other.noise, self.signal + other.signal)

    @property
    def ratio(self) -> float:
        """Noise over signal: 0 for an exact copy; infinite where there is noise but no signal."""
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def decibels(self) -> float:
        """Signal to noise ratio in dB; infinite for an exact copy."""
        return math.inf if self.noise == 0 else 10 * math.log10(max(self.signal, 1e-300) / self.noise)


def sqnr(weight: torch.Tensor, restored: torch.Tensor) -> float:
    """Signal to quantization noise ratio of one tensor in dB; infinite for an exact copy."""
    return _sums(weight, restored).decibels


def weight_loss(weight: torch.Tensor, q: QTensor) -> Loss:
    """Σ (w - ŵ)² and Σ w² of a rounded weight of any shape.

    Raises:
        ShapeError: the shapes differ.
    """
    if tuple(weight.shape) != q.shape:
        raise ShapeError(f"A loss is of two tensors of one shape, got {tuple(weight.shape)} and {q.shape}.")
    found = None if q.group_index is not None or q.apart is not None else lost(weight, q.codes, q.scheme, q.grid)
    return _sums(weight, q.dequantize()) if found is None else Loss(*found)


def output_loss(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor) -> Loss:
    """‖X(W - Ŵ)ᵀ‖² and ‖XWᵀ‖² on the inputs X, of which XᵀX is all that is needed.

    Args:
        weight, restored: (out, n), any float dtype. For one matrix of several that were rounded together, pass its rows.
        hessian: (n, n) float32, XᵀX: the `matrix` of the second moment of this matrix's inputs.

    Raises:
        ShapeError: the shapes differ, or the inputs have another size.
    """
    if weight.shape != restored.shape or weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ShapeError(
            f"An output error is of two matrices (out, {len(hessian)}), got {tuple(weight.shape)} and {tuple(restored.shape)}."
        )
    hessian = hessian.to(weight.device)
    total = Loss()
    for rows, back in zip(weight.split(_ROWS), restored.split(_ROWS), strict=True):
        rows = rows.float()
        total += Loss(_quadratic(rows - back.float(), hessian), _quadratic(rows, hessian))
    return total


def _quadratic(rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """Σ r H rᵀ over rows; never negative, though rounding of the sums may make it so."""
    return max(float((rows @ hessian).mul_(rows).sum(dtype=torch.float64)), 0.0)


def _sums(weight: torch.Tensor, restored: torch.Tensor) -> Loss:
    # A norm is accumulated in float32 by blocks, which for the sizes of weights is exact to some 1e-6.
    weight = weight.float()
    noise, signal = (torch.linalg.vector_norm(part) for part in (restored.float() - weight, weight))
    return Loss(float(noise) ** 2, float(signal) ** 2)
