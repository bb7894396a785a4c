"""From a range that was observed to a grid that is stored: static scales of inputs, outputs and caches.

Owns: `grid_from_range` (the bridge from an observer's range to a scheme's grid) and `static_grid` (the same for an
`ActivationScheme`). The conventions are those of compressed-tensors, so that its runtimes read the numbers as
they are meant: a range is widened to hold zero; symmetric integers lay the larger end on half the code range (int8: a/127.5),
floats on the format's largest number (fp8: a/448), asymmetric integers span min … max; NVFP4's outer scale is a/(448·6).
"""

from __future__ import annotations

import torch

from arrondi.errors import DataError, SchemeError
from arrondi.formats import ActivationScheme, Scheme
from arrondi.tensor.ranges.fits import default_rule, fit
from arrondi.tensor.ranges.grid import Grid


def grid_from_range(low: torch.Tensor | float, high: torch.Tensor | float, scheme: Scheme) -> Grid:
    """The grid that spans a range.

    Args:
        low, high: ends of the range, one for every scale: numbers, or tensors of any one shape. low ≤ high.
        scheme: what the tensor becomes, with plain or power-of-two scales. Its granularity is not looked at.

    Returns:
        the grid, parts in the shape of `low`, rounded to their storage. A range of nothing but zero has scale one.

    Raises:
        DataError: an end is NaN or infinite, or low > high.
        SchemeError: the scheme quantizes its scales or offsets, which takes all of them at once.
    """
    if isinstance(scheme.scale, Scheme) or isinstance(scheme.offset, Scheme):
        raise SchemeError(
            f"A range gives one scale, and the scales of {scheme} are quantized together. Use static_grid for NVFP4's outer scale."
        )
    low, high = (torch.as_tensor(end).float() for end in (low, high))
    if low.shape != high.shape or not bool((low <= high).all()):
        raise DataError(f"A range has low ≤ high, got {low.tolist()} and {high.tolist()}.")
    rule = "auto"
    if scheme.symmetric and default_rule(scheme) == "least-squares":
        rule = "narrow"  # least squares looks at every element, of which the ends are only two
    ends = torch.stack((low.reshape(-1), high.reshape(-1)), dim=1)
    return fit(ends, scheme, rule).reshape(*low.shape)


def static_grid(low: torch.Tensor | float, high: torch.Tensor | float, scheme: ActivationScheme) -> Grid:
    """What is stored of an activation's grid: all of it where the scheme is static, the outer scale where it is local.

    Args:
        low, high: the range that calibration saw, as in `grid_from_range`.

    Raises:
        SchemeError: the scales follow each tensor, so there is nothing to store.
    """
    if scheme.dynamic is True:
        raise SchemeError(f"The scales of {scheme} follow each tensor. Say 'static' or 'local' to store them.")
    inner = scheme.scheme
    if scheme.dynamic is False:
        return grid_from_range(low, high, inner)
    assert isinstance(inner.scale, Scheme)
    widest = torch.maximum(-torch.as_tensor(low).float(), torch.as_tensor(high).float()).clamp(min=0)
    found = grid_from_range(torch.zeros_like(widest), widest / inner.format.largest, inner.scale)
    # Files store the reciprocal: make the outer scale a number that survives 1/(1/s).
    return Grid(1 / (1 / found.scale.clamp(min=torch.finfo(torch.float32).tiny)))
