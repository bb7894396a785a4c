"""Scales from data: how wide the grid of a tile is laid.

Owns: the table `FITS` and `fit`, which gives the grid of every row of a tile matrix, *rounded to the type that will be
stored*, so that codes chosen afterwards belong to the stored grid.

    full           absmax over half the code range: int4 → a/7.5, codes -8 … 7, both ends at most half a step off;
                   unsigned formats as narrow
    narrow         absmax over the largest positive code: int4 → a/7, codes -7 … 7, the extremes exact
    extreme        signed extreme over the code that reaches furthest: int4 → m/-8, uint4 → m/15; the extreme is exact, the
                   scale may be negative (GGUF Q4_0)
    absmean        mean |x| (BitNet b1.58)
    least-squares  the ternary or binary scale with the least squared error (TWN, XNOR-Net)
    floor, ceil, even, best   the exponent rules of power-of-two scales, see `exponents`

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (affine quantizer); Li, Zhang, Liu 2016, arXiv:1605.04711 (ternary);
Rastegari et al. 2016, arXiv:1603.05279 (binary); Ma et al. 2024, arXiv:2402.17764 (absmean).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch

from arrondi.errors import DataError, SchemeError, unknown
from arrondi.formats import Format, Scheme
from arrondi.tensor.ranges.exponents import EXPONENT_RULES
from arrondi.tensor.ranges.extremes import absmax, ends, reach
from arrondi.tensor.ranges.grid import Grid, round_offset, round_scale


def fit(
    tiles: torch.Tensor,
    scheme: Scheme,
    rule: str = "auto",
    shrink: torch.Tensor | float = 1.0,
    count: int | None = None,
) -> Grid:
    """The grid of every tile.

    Args:
        tiles: (tiles, elements) float32.
        scheme: format, zero point and storage; its granularity is already in the shape of `tiles`.
        rule: a name of `FITS`, or "auto": floor for power-of-two scales, least-squares for ternary and binary, narrow
            for floats and codebooks, full for symmetric integers. Asymmetric schemes always span min … max.
        count: how many of the elements, from the first on, are the tensor's own, where the last tile is padded; None: all.
        shrink: factor on the range, scalar or (tiles, 1); below one it clips. Power-of-two scales stay powers of two.

    Returns:
        the grid, parts as (tiles, 1). Scales and offsets that are quantized in turn are still float32.

    Raises:
        DataError: a value is NaN or infinite, or its scale or offset overflows the storage type.
        SchemeError: the rule does not exist or does not fit the scheme.
    """
    if scheme.zero_point != "none":
        if rule not in ("auto", "full"):
            raise SchemeError(
                f"Fit {rule!r} is for symmetric schemes, got {scheme}. An asymmetric grid spans min … max."
            )
        return _affine(tiles, scheme, shrink, count)
    check_rule(rule)
    name = default_rule(scheme) if rule == "auto" else rule
    powers = name in EXPONENT_RULES
    if powers != (scheme.scale == "e8m0"):
        raise SchemeError(f"Fit {name!r} does not go with {scheme.scale} scales of {scheme}. Use 'auto'.")
    if name == "extreme" and not scheme.signed_scales:
        raise SchemeError(
            f"Fit 'extreme' gives negative scales, which {scheme} does not allow. Use 'full' or 'signed'."
        )
    if powers and not (isinstance(shrink, float) and shrink == 1.0):
        scale = FITS[name](tiles * shrink, scheme.format)
    else:
        scale = FITS[name](tiles, scheme.format) * shrink
    if scheme.format.values is not None and 0.0 not in scheme.format.values:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # no code means zero: the least scale comes nearest
    if not bool(torch.isfinite(absmax(tiles) if powers else scale).all()):
        raise DataError("The values hold NaN or infinity. Repair or exclude the tensor.")
    return Grid(scale if powers else round_scale(scale, scheme.scale))


def check_rule(rule: str) -> None:
    """Refuse a rule that does not exist.

    Raises:
        SchemeError: names those that do.
    """
    if not isinstance(rule, str) or (rule != "auto" and rule not in FITS):
        raise unknown("fit", rule, ["auto", *FITS])


def default_rule(scheme: Scheme) -> str:
    """The rule that "auto" stands for, for a symmetric scheme."""
    if scheme.scale == "e8m0":
        return "floor"
    if scheme.format.values == (-1.0, 1.0) or (scheme.format.kind == "integer" and scheme.format.levels == 3):
        return "least-squares"
    return "full" if scheme.format.kind == "integer" else "narrow"


def _affine(tiles: torch.Tensor, scheme: Scheme, shrink: torch.Tensor | float, count: int | None) -> Grid:
    low, high = ends(tiles)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError("The values hold NaN or infinity. Repair or exclude the tensor.")
    bottom, top = _span(scheme.format)
    if scheme.zero_point == "integer":  # the range must hold zero, or zero would have no code
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = round_scale(high / (top - bottom) - low / (top - bottom), scheme.scale)
        zero = torch.round(bottom - low / scale).clamp_(bottom, top)
        return Grid(scale, zero_point=zero.int())
    if scheme.shared_offset:
        return _around_mean(tiles, scheme, shrink, count)
    if isinstance(scheme.offset, Scheme) and scheme.offset.format.qmin == 0:
        low = low.clamp(max=0)  # offsets that share a sign are the negative ones, as in GGUF's K types
        high = torch.maximum(low, high)
    half = high / 2 - low / 2
    middle = low + half
    half = half * shrink
    if scheme.format.values is not None and 0.0 not in scheme.format.values:
        half = half.clamp(min=torch.finfo(torch.float32).tiny)  # no code means zero: the least step comes nearest
    scale = round_scale(half * (2 / (top - bottom)), scheme.scale)
    # A tile of equal elements has no width: its offset is the element, its codes mean zero.
    offset = torch.where(half == 0, middle, middle - scale * ((top + bottom) / 2))
    return Grid(scale, offset=round_offset(offset, scheme.offset))


def _around_mean(tiles: torch.Tensor, scheme: Scheme, shrink: torch.Tensor | float, count: int | None) -> Grid:
    """One offset for all tiles, their mean; the scale of a tile reaches its element farthest from it."""
    mean = tiles.reshape(-1)[:count].double().mean().float()
    scale = absmax(tiles - mean) * shrink / scheme.format.largest
    return Grid(round_scale(scale, scheme.scale), offset=mean.expand_as(scale).clone())


def _span(format: Format) -> tuple[float, float]:
    """The least and the greatest number that a code means."""
    if format.values is None:
        return float(format.qmin), float(format.qmax)
    known = [v for v in format.values if math.isfinite(v)]
    return min(known), max(known)


def _full(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    if format.kind != "integer" or format.qmin == 0:
        return _narrow(tiles, format)
    return absmax(tiles) / ((format.qmax - format.qmin) / 2)


def _narrow(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    return absmax(tiles) / reach(format)


def _extreme(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    if format.kind != "integer":
        raise SchemeError(f"Fit 'extreme' needs an integer format, got {format}. Use 'narrow'.")
    low, high = ends(tiles)
    return torch.where(high > -low, high, low) / (format.qmin or format.qmax)


def _absmean(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    return tiles.abs().mean(dim=-1, keepdim=True)


def _least_squares(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    """Binary: mean |x|. Ternary: keep the k largest magnitudes that maximise (their sum)²/k; the scale is their mean."""
    if format.levels > 3:
        raise SchemeError(
            f"Fit 'least-squares' is for ternary and binary formats, got {format}. Use a grid search instead."
        )
    if format.levels == 2:
        return _absmean(tiles, format)
    ranked = tiles.abs().sort(dim=-1, descending=True).values
    sums = ranked.double().cumsum(dim=-1)
    counts = torch.arange(1, tiles.shape[-1] + 1, dtype=torch.float64, device=tiles.device)
    best = (sums.square() / counts).argmax(dim=-1, keepdim=True)
    return (sums.gather(-1, best) / (best + 1)).float()


FITS: Final[Mapping[str, Callable[[torch.Tensor, Format], torch.Tensor]]] = MappingProxyType(
    {
        "full": _full,
        "narrow": _narrow,
        "extreme": _extreme,
        "absmean": _absmean,
        "least-squares": _least_squares,
        **EXPONENT_RULES,
    }
)
"""Every rule for symmetric scales: (tiles, format) → scale (tiles, 1), before rounding to storage."""
