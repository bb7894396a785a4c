"""Qronos: the first column is rounded for what the layer should give, the others make up for it and for changed inputs.

Owns: `qronos`. With the inputs f of the original and x of the quantized model, G = Σ x fᵀ and H = Σ x xᵀ, column 1 is rounded for

    (G₁ w - Σ_{j>1} H₁ⱼ wⱼ) / H₁₁,   the best there while all other columns are still those of the original,

and the rest becomes H₂₂⁻¹ (G₂ w - H₂₁ q₁), the best beside it. From then on nothing is left of the difference between f and x, and each
column is rounded as it is and its error diffused as in GPTQ. Both steps minimise Σ (w f - ŵ x)² + λ |w - ŵ|². So it is `gptaq` but for the
first column, which that method rounds for the solution in which the others have moved already.

Source: Zhang, Zhang, Colbert, Saab 2025, arXiv:2505.11695.
"""

from __future__ import annotations

from typing import Any

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import SecondMoment
from arrondi.formats import Scheme
from arrondi.rounding.gptaq import check_moments, corrected
from arrondi.rounding.gptq import Range, checked, swept
from arrondi.rounding.options import BlockSize, Damping, Power, Refine
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.qtensor import QTensor


def qronos(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    cross_moment: torch.Tensor | None = None,
    damping: Damping = 0.01,
    block_size: BlockSize = 128,
    range: Range = "search",
    power: Power = 4.0,
    refine: Refine = 0,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round a weight so that the layer's output, on inputs that earlier rounding has changed, is that of the original on its own.

    Columns are visited by falling Σ x², with grids that are known beforehand.

    Args:
        weight, scheme, moment, damping, block_size, range, power, refine, name, facts: as of `gptq`.
        cross_moment: Σ x fᵀ (n, n): inputs of the quantized model times those that the original has for the same tokens.

    Raises:
        ShapeError: weight is not a matrix, or a moment has another size.
        SchemeError: an option is out of range.
        DataError: a moment is missing, or NaN.
    """
    with named(name):
        check_arguments(qronos, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    moment, cross = check_moments("qronos", weight, moment, cross_moment, name)
    wanted: Scheme = scheme_of(scheme)
    original, moment = checked("qronos", weight, wanted, moment, name)
    goal = corrected(weight, moment, cross, damping).to(original)
    if facts is not None:
        facts["correction"] = float((goal - original).norm() / original.norm().clamp(min=1e-30))

    sums = moment.matrix(original.dtype).to(original.device)

    def first(column: int, damped: float) -> torch.Tensor:
        gap = cross[column].to(original) - sums[column]
        return original[:, column] + original @ gap / (sums[column, column].clamp(min=1e-30) + damped)

    return swept(
        goal, wanted, moment, damping=damping, block_size=block_size, order="static", range=range, power=power, refine=refine,
        name=name, facts=facts, first=first,
    )  # fmt: skip
