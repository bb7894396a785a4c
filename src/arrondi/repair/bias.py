"""The part of a layer's output error that is the same for every token, and is therefore a bias.

Owns: `mean_shift`.

Source: Nagel, van Baalen, Blankevoort, Welling 2019, arXiv:1906.04721, section 4.2 (from calibration data).
"""

from __future__ import annotations

import torch

from arrondi.errors import ShapeError


def mean_shift(
    before: torch.Tensor, rounded: torch.Tensor, mean: torch.Tensor, float_mean: torch.Tensor | None = None
) -> torch.Tensor:
    """E[Ŵ x̂] - E[W x], float32 (m,): what a bias should be less, so that the layer's output is right on average.

    Args:
        before: (m, n), W, any float dtype.
        rounded: (m, n), Ŵ.
        mean: (n,), E[x̂], of the inputs that the quantized model has.
        float_mean: (n,), E[x], of those that the original has; None: the same, so that only the rounding of this weight counts.

    Raises:
        ShapeError: the sizes do not fit.
    """
    other = mean if float_mean is None else float_mean
    if before.ndim != 2 or rounded.shape != before.shape or not mean.shape == other.shape == before.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (before, rounded, mean, other))
        raise ShapeError(f"A shift is of two weights (m, n) and two means (n,), got {shapes}.")
    kinds = (before.device, torch.float64)
    return (rounded.to(*kinds) @ mean.to(*kinds) - before.to(*kinds) @ other.to(*kinds)).float()
