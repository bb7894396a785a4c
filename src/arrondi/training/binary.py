"""Weights of one bit, with straight-through gradients: pure functions on tensors.

Owns: `binary_weight`, `centred_weight`, `Halves`, `split_halves`, `halves_weight`.

Sources: Rastegari et al. 2016, arXiv:1603.05279; Bai et al. 2020, arXiv:2012.15701 (BinaryBERT); Qin et al. 2022, arXiv:2203.06390
(BiBERT).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arrondi.errors import DataError, ShapeError
from arrondi.nn.straight import straight
from arrondi.tensor.checks import check_tensor
from arrondi.training.ternary import Ternary


def binary_weight(weight: torch.Tensor, *, rows: bool = True, window: float | None = None) -> torch.Tensor:
    """α·sign(w) with α = mean |w|, of each row of a weight (m, …) or of all of it; sign(0) is +1.

    Gradients go to w as they are, or only where |w| ≤ window; none goes through α.
    """
    return straight(weight, _signed(weight.detach(), _mean_size(weight, rows)), window)


def centred_weight(weight: torch.Tensor, window: float | None = 1.0) -> torch.Tensor:
    """BiBERT's α·sign(w - mean of its row), α = mean |w| of the row: as many +1 as -1 carry most information.

    Args:
        weight: (m, …), float.
        window: the gradient is 0 where the centred weight is larger; it passes through the mean.
    """
    flat = weight.flatten(1)
    centred = (flat - flat.mean(1, keepdim=True)).view_as(weight)
    return straight(centred, _signed(centred.detach(), _mean_size(weight, True)), window)


def _mean_size(weight: torch.Tensor, rows: bool) -> torch.Tensor:
    """mean |w| of each row, (m, 1), or of all, (1, 1)."""
    size = weight.detach().abs()
    return size.flatten(1).mean(1, keepdim=True) if rows else size.mean().reshape(1, 1)


def _signed(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale · sign(w), with sign(0) = +1."""
    flat = weight.flatten(1)
    return torch.where(flat >= 0, scale, -scale).view_as(weight)


class Halves(NamedTuple):
    """Two latent weights in place of one. α·sign of each, summed, is what the ternary weight was."""

    first: torch.Tensor
    second: torch.Tensor


@torch.no_grad()
def split_halves(weight: torch.Tensor, ternary: Ternary) -> Halves:
    """BinaryBERT's ternary weight splitting: w = w₁ + w₂ and s·T = α₁·sign(w₁) + α₂·sign(w₂) with α = mean |w|, of each row or of all.

    Where T ≠ 0, w₁ = a·w and w₂ = (1-a)·w; where T = 0, w₁ = b + w and w₂ = -b for w > 0, and w₁ = b and w₂ = -b + w for others.
    a makes the two α equal, b makes their sum the ternary scale. Solved and split in float64, then rounded to the weight's dtype.

    Args:
        weight: latent, (m, …), float.
        ternary: what it is rounded to; its scale is (m, 1) or (1, 1).

    Raises:
        ShapeError: the codes are of another shape.
        DataError: the scale is not above the mean magnitude of its row, as that of TWN is and that of BitNet is not, or the zeros
            outweigh the others, so that no a from 0 to 1 exists.
    """
    check_tensor(weight, "weight")
    if weight.shape != ternary.codes.shape:
        raise ShapeError(
            f"A weight {tuple(weight.shape)} is split by its own codes, got codes of shape {tuple(ternary.codes.shape)}."
        )
    w = weight.double().reshape(ternary.scale.shape[0], -1)
    kept, scale = ternary.codes.reshape(w.shape) != 0, ternary.scale.double()
    size, zero, positive = w.abs(), ~kept, w > 0
    zeros = zero.sum(1, keepdim=True)
    inside = (size * kept).sum(1, keepdim=True)
    above, below = ((size * (zero & side)).sum(1, keepdim=True) for side in (positive, ~positive))
    a = torch.where(inside > 0, (inside + below - above) / (2 * inside), 0.5)
    b = (scale * w.shape[1] - size.sum(1, keepdim=True)) / (2 * zeros.clamp(min=1))
    live = inside > 0
    if bool((live & (zeros > 0) & (b <= 1e-6 * scale)).any()):
        raise DataError(
            "A ternary scale is not above the mean magnitude of its weight, so it has no halves. Split weights of method 'twn'."
        )
    if bool((live & ((a <= 0) | (a >= 1))).any()):
        raise DataError("The zeros of a ternary weight outweigh the rest of it, so it has no halves. Train it longer.")
    first = torch.where(kept, a * w, torch.where(positive, b + w, b))
    first = torch.where(live, first, w / 2)
    first, second = first.to(weight.dtype), (w - first).to(weight.dtype)
    return Halves(first.view_as(weight), second.view_as(weight))


def halves_weight(first: torch.Tensor, second: torch.Tensor, *, rows: bool = True) -> torch.Tensor:
    """α₁·sign(w₁) + α₂·sign(w₂), four values a row; gradients go to both."""
    return binary_weight(first, rows=rows) + binary_weight(second, rows=rows)
