"""SmoothQuant: what is hard to round in activations is moved into the weights that read them.

Owns: `smoothing` and `smoothings`. With the largest |x| of a channel a and the largest |w| of its columns b, s = a^α / b^(1-α): at
α = 1 every channel of the inputs becomes equally large, at α = 0 every column of the weights, at 0.5 both reach equally far.

Source: Xiao et al. 2022, arXiv:2211.10438, equation 4; the search over α is the tuning that its section 4.1 describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from arrondi.rewrite.channels import usable

ALPHAS: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Exponents that a search tries."""
_LEAST: Final = 1e-5


def smoothing(inputs: torch.Tensor, weights: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """The scale of every channel.

    Args:
        inputs: (channels,) the largest |x| of each.
        weights: (channels,) the largest |w| of the columns that read it, over all consumers.
        alpha: how much is moved: 0 … 1.

    Returns:
        (channels,) float32; 1 for channels that are always 0, or that nobody reads.
    """
    inputs, weights = inputs.float(), weights.float()
    scale = inputs.clamp(min=_LEAST) ** alpha / weights.clamp(min=_LEAST) ** (1 - alpha)
    return usable(scale.clamp(min=_LEAST), (inputs > 0) & (weights > 0))


def smoothings(inputs: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    """Every α of `ALPHAS` with its scale, for `best_scale`."""
    for alpha in ALPHAS:
        yield alpha, smoothing(inputs, weights, alpha)
