"""GPTAQ: GPTQ against the output of the original on *its* inputs, not on those that earlier rounding has already changed.

Owns: `gptaq`, and `corrected`, the weight that makes up for it. With the inputs f of the original and x of the quantized model,
Σ ‖W f - Ŵ x‖² = Σ ‖(W* - Ŵ) x‖² + what no Ŵ can change, for W* = W (Σ f xᵀ) (Σ x xᵀ)⁻¹. So GPTQ rounds W* instead of W, whatever the
grid, the order and the blocks. The paper folds the same correction into the loop over the columns; the result is the same but for
the damping, and for groups whose scales are fitted to W*.

Source: Li, Yin, Lee, Xiao, Panda 2025, arXiv:2504.02692.
"""

from __future__ import annotations

from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, ShapeError
from arrondi.rounding.gptq import Order, Range, gptq
from arrondi.rounding.gptq_factor import root_factor
from arrondi.rounding.options import BlockSize, Damping, Power, Refine, Strength, Sweeps
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor

_EXACT = 4096
"""Inputs up to which the correction is computed in float64."""


def corrected(
    weight: torch.Tensor, moment: SecondMoment, cross_moment: torch.Tensor, damping: float, strength: float = 1.0
) -> torch.Tensor:
    """W + strength · W (C - H) (H + λI)⁻¹ with H = Σ x xᵀ and C = Σ f xᵀ, float32 (m, n).

    Args:
        weight: (m, n).
        moment: H.
        cross_moment: Σ x fᵀ (n, n), the transpose of C.
        damping: λ as a fraction of the mean diagonal of H; raised where H cannot be factored.
        strength: 0 leaves the weight alone.
    """
    kind = torch.float64 if moment.n <= _EXACT else torch.float32
    hessian = moment.matrix(kind).to(weight.device)
    moved = weight.to(kind) @ (cross_moment.to(hessian).T - hessian)
    factor, _ = root_factor(hessian, damping)
    half = torch.linalg.solve_triangular(factor.T, moved, upper=False, left=False)
    moved = torch.linalg.solve_triangular(factor, half, upper=True, left=False)
    return (weight.to(kind) + strength * moved).float()


def check_moments(
    method: str, weight: torch.Tensor, moment: SecondMoment | None, cross_moment: torch.Tensor | None, name: str
) -> tuple[SecondMoment, torch.Tensor]:
    """Both moments, if they are there and fit the weight.

    Raises:
        DataError: one is missing.
        ShapeError: one has another size than the weight's inputs.
    """
    if moment is None or cross_moment is None:
        raise DataError(
            f"{name}: {method} needs the second moment of the layer's inputs, and their products with those of the original. Give calibration text, or use rtn or hqq."
        )
    if weight.ndim != 2 or cross_moment.shape != (moment.n, moment.n) or moment.n != weight.shape[1]:
        raise ShapeError(
            f"{name}: the moments are for {moment.n} and {tuple(cross_moment.shape)} inputs, the weight has the shape {tuple(weight.shape)}."
        )
    return moment, cross_moment


def gptaq(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    strength: Strength = 1.0,
    damping: Damping = 0.01,
    block_size: BlockSize = 128,
    order: Order = "static",
    range: Range = "search",
    power: Power = 4.0,
    refine: Refine = 0,
    sweeps: Sweeps = 1,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round a weight so that the layer's output, on inputs that earlier rounding has changed, is that of the original on its own.

    Args:
        weight, scheme, moment, damping, block_size, order, range, power, refine, sweeps, name, facts: as of `gptq`.
        cross_moment: Σ x fᵀ (n, n): inputs of the quantized model times those that the original has for the same tokens.
        strength: share of the correction; 0 is GPTQ.

    Raises:
        ShapeError: weight is not a matrix, or a moment has another size.
        SchemeError: `order` does not fit the granularity, or an option is out of range.
        DataError: a moment is missing, or NaN.
    """
    with named(name):
        check_arguments(gptaq, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    moment, cross_moment = check_moments("gptaq", weight, moment, cross_moment, name)
    wanted = corrected(weight, moment, cross_moment, damping, strength)
    if facts is not None:
        facts["correction"] = float((wanted - weight).norm() / weight.float().norm().clamp(min=1e-30))
    return gptq(
        wanted, scheme, moment, damping=damping, block_size=block_size, order=order, range=range, power=power, refine=refine,
        sweeps=sweeps, name=name, facts=facts,
    )  # fmt: skip
