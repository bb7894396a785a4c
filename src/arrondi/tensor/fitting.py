"""Scales from data: how wide the grid of a group is laid.

Owns: the table `FITS` and `fit`, which gives the scale and zero point of every row of a tile matrix, *rounded to the type
that will be stored*, so that codes chosen afterwards belong to the stored grid.

    full           absmax over half the code range: int4 → a/7.5, codes -8 … 7, both ends at most half a step off;
                   unsigned formats as narrow
    narrow         absmax over the largest positive code: int4 → a/7, codes -7 … 7, the extremes exact
    extreme        signed extreme over qmin: int4 → m/-8, the extreme exact, the scale may be negative (GGUF Q4_0)
    absmean        mean |x| (BitNet b1.58)
    least-squares  the ternary or binary scale with the least squared error (TWN, XNOR-Net)
    floor, ceil, even, best   the exponent rules of power-of-two scales (OCP Microscaling)

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (affine quantizer); Li, Zhang, Liu 2016, arXiv:1605.04711 (ternary);
Rastegari et al. 2016, arXiv:1603.05279 (binary); Ma et al. 2024, arXiv:2402.17764 (absmean); OCP MX 1.0, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import torch

from arrondi.errors import DataError, SchemeError, unknown
from arrondi.formats import Format, Scheme
from arrondi.tensor.encoding import decode, encode

STORED: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
"""Storage types of plain scales."""


class Grid(NamedTuple):
    """Where the codes of each tile lie: x ≈ scale · (code - zero_point), or scale · code + offset.

    All float32 except zero_point (int32), all (tiles, 1). At most one of zero_point and offset is set.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def fit(tiles: torch.Tensor, scheme: Scheme, rule: str = "auto", shrink: torch.Tensor | float = 1.0) -> Grid:
    """The grid of every tile.

    Args:
        tiles: (tiles, elements) float32.
        scheme: format, zero point and scale storage; its granularity is already in the shape of `tiles`.
        rule: a name of `FITS`, or "auto": floor for power-of-two scales, least-squares for ternary and binary, narrow
            for floats and codebooks, full for symmetric integers. Asymmetric schemes always span min … max.
        shrink: factor on the range, scalar or (tiles, 1); below one it clips. Power-of-two scales stay powers of two.

    Raises:
        DataError: a value is NaN or infinite, or its scale overflows the storage type.
        SchemeError: the rule does not exist or does not fit the format.
    """
    if scheme.zero_point != "none":
        if rule not in ("auto", "full"):
            raise SchemeError(
                f"Fit {rule!r} is for symmetric schemes, got {scheme}. An asymmetric grid spans min … max."
            )
        return _affine(tiles, scheme, shrink)
    name = _default_rule(scheme) if rule == "auto" else rule
    if name not in FITS:
        raise unknown("fit", name, FITS)
    powers = name in _EXPONENT_RULES
    if powers != (scheme.scale == "e8m0"):
        raise SchemeError(f"Fit {name!r} does not go with {scheme.scale} scales of {scheme}. Use 'auto'.")
    if name == "extreme" and isinstance(scheme.scale, Scheme):
        raise SchemeError(f"Fit 'extreme' gives negative scales, which {scheme} cannot store. Use 'full'.")
    if powers and not (isinstance(shrink, float) and shrink == 1.0):
        scale = FITS[name](tiles * shrink, scheme.format)
    else:
        scale = FITS[name](tiles, scheme.format) * shrink
    if scheme.format.values is not None and 0.0 not in scheme.format.values:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # no code means zero: the least scale comes nearest
    finite = torch.isfinite(_absmax(tiles) if powers else scale)
    if not bool(finite.all()):
        raise DataError("The values hold NaN or infinity. Repair or exclude the tensor.")
    return Grid(scale if powers else round_scale(scale, scheme.scale))


def _default_rule(scheme: Scheme) -> str:
    if scheme.scale == "e8m0":
        return "floor"
    if scheme.format.values == (-1.0, 1.0) or (scheme.format.kind == "integer" and scheme.format.levels == 3):
        return "least-squares"
    return "full" if scheme.format.kind == "integer" else "narrow"


def round_scale(scale: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """Scales as they will read back from storage; zero becomes one, underflow the smallest normal number.

    Scales that are quantized in turn (`storage` is a scheme) are left in float32: `quantize_tensor` rounds them with their peers.
    There zero becomes the smallest normal number, which cannot widen the range that the peers share.
    """
    if isinstance(storage, Scheme):
        return torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    info = torch.finfo(STORED[storage])
    if bool((scale.abs() > info.max).any()):
        raise DataError(
            f"A scale of {float(scale.abs().max()):.3g} overflows {storage}. Store scales as bfloat16 or float32."
        )
    tiny = torch.copysign(scale.abs().clamp(min=info.tiny), scale)
    return torch.where(scale == 0, 1.0, tiny).to(STORED[storage]).float()


def _affine(tiles: torch.Tensor, scheme: Scheme, shrink: torch.Tensor | float) -> Grid:
    low, high = _ends(tiles)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise DataError("The values hold NaN or infinity. Repair or exclude the tensor.")
    qmin, qmax = scheme.format.qmin, scheme.format.qmax
    if scheme.zero_point == "integer":  # the range must hold zero, or zero would have no code
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = round_scale(high / (qmax - qmin) - low / (qmax - qmin), scheme.scale)
        zero = torch.round(qmin - low / scale).clamp_(qmin, qmax)
        return Grid(scale, zero_point=zero.int())
    half = high / 2 - low / 2
    middle = low + half
    half = half * shrink
    scale = round_scale(half * (2 / (qmax - qmin)), scheme.scale)
    # A tile of equal elements has no width: its offset is the element, its codes are zero.
    return Grid(scale, offset=torch.where(half == 0, middle, middle - scale * ((qmax + qmin) / 2)))


def _ends(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of each tile, (tiles, 1). Two reductions are ten times as fast as `torch.aminmax` along an axis."""
    return tiles.amin(dim=-1, keepdim=True), tiles.amax(dim=-1, keepdim=True)


def _absmax(tiles: torch.Tensor) -> torch.Tensor:
    low, high = _ends(tiles)
    return torch.maximum(-low, high)


def _full(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    if format.kind != "integer" or format.qmin == 0:
        return _narrow(tiles, format)
    return _absmax(tiles) / ((format.qmax - format.qmin) / 2)


def _narrow(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    return _absmax(tiles) / _reach(format)


def _reach(format: Format) -> float:
    """The largest magnitude that a positive number can have: 7 for int4, although -8 has a code."""
    return float(format.qmax) if format.kind == "integer" else format.largest


def _extreme(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    if format.kind != "integer" or format.qmin == 0:
        raise SchemeError(f"Fit 'extreme' needs a signed integer format, got {format}. Use 'narrow'.")
    low, high = _ends(tiles)
    return torch.where(high > -low, high, low) / format.qmin


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


def _exponent_floor(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    return _power(_floor_log2(_absmax(tiles)) - _top_exponent(format))


def _exponent_ceil(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    ratio = _absmax(tiles) / _reach(format)
    low = _floor_log2(ratio)
    return _power(torch.where(_power(low) < ratio, low + 1, low))


def _exponent_even(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    """Round amax up by half a quantum of the element's mantissa first, so that the floor rule clips less."""
    amax = _absmax(tiles)
    top = 2.0 ** _top_exponent(format)
    mantissa_bits = (sum(1 for v in format.values or range(format.qmax + 1) if top <= v < 2 * top) - 1).bit_length()
    quantum = _power(_floor_log2(amax)) * 2.0 ** (-mantissa_bits)
    return _power(_floor_log2(amax + quantum / 2) - _top_exponent(format))


def _exponent_best(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    """Of the floor exponent and its two neighbours, the one with the least squared error in each tile."""
    middle = torch.log2(_exponent_floor(tiles, format))
    errors, scales = [], []
    for step in (-1, 0, 1):
        scale = _power(middle + step)
        error = decode(encode(tiles / scale, format), format) * scale - tiles
        scales.append(scale)
        errors.append(error.square().sum(dim=-1, keepdim=True))
    best = torch.cat(errors, dim=-1).argmin(dim=-1, keepdim=True)
    return torch.cat(scales, dim=-1).gather(-1, best)


def _top_exponent(format: Format) -> int:
    """floor(log2(largest)): 2 for fp4_e2m1 and int4, 8 for fp8_e4m3."""
    return math.frexp(_reach(format))[1] - 1


def _floor_log2(x: torch.Tensor) -> torch.Tensor:
    """Exact, also for denormals; a zero gives the smallest exponent of an e8m0 scale. NaN and infinity stay as they are."""
    exponent = torch.frexp(x).exponent.float() - 1
    return torch.where(x == 0, -127.0, torch.where(torch.isfinite(x), exponent, x))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, limited to what e8m0 can store; exact (2^-127 is a float32 denormal, hence the double)."""
    return torch.exp2(exponent.double().clamp(-127, 127)).float()


_EXPONENT_RULES: Final = {
    "floor": _exponent_floor,
    "ceil": _exponent_ceil,
    "even": _exponent_even,
    "best": _exponent_best,
}

FITS: Final[Mapping[str, Callable[[torch.Tensor, Format], torch.Tensor]]] = MappingProxyType(
    {
        "full": _full,
        "narrow": _narrow,
        "extreme": _extreme,
        "absmean": _absmean,
        "least-squares": _least_squares,
        **_EXPONENT_RULES,
    }
)
"""Every rule for symmetric scales: (tiles, format) → scale (tiles, 1), before rounding to storage."""
