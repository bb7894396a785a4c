"""Scales that are powers of two: which exponent a tile gets.

Owns: the table `EXPONENT_RULES`, the rules for e8m0 scales. All are exact, also for subnormal numbers.

    floor    the exponent of the largest magnitude less that of the format's largest number (OCP Microscaling)
    ceil     the least exponent with which nothing is clipped
    even     floor after rounding the largest magnitude to the format's mantissa, so that it clips less
    best     of floor and its two neighbours, the one with the least squared error

Source: OCP Microscaling Formats 1.0, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch

from arrondi.formats import Format
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.ranges.extremes import absmax, reach


def _exponent_floor(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    return _power(_floor_log2(absmax(tiles)) - _top_exponent(format))


def _exponent_ceil(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    ratio = absmax(tiles) / reach(format)
    low = _floor_log2(ratio)
    return _power(torch.where(_power(low) < ratio, low + 1, low))


def _exponent_even(tiles: torch.Tensor, format: Format) -> torch.Tensor:
    """Round amax up by half a quantum of the element's mantissa first, so that the floor rule clips less."""
    amax = absmax(tiles)
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
    return math.frexp(reach(format))[1] - 1


def _floor_log2(x: torch.Tensor) -> torch.Tensor:
    """Exact, also for denormals; a zero gives the smallest exponent of an e8m0 scale. NaN and infinity stay as they are."""
    exponent = torch.frexp(x).exponent.float() - 1
    return torch.where(x == 0, -127.0, torch.where(torch.isfinite(x), exponent, x))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, limited to what e8m0 can store; exact (2^-127 is a float32 denormal, hence the double)."""
    return torch.exp2(exponent.double().clamp(-127, 127)).float()


EXPONENT_RULES: Final[Mapping[str, Callable[[torch.Tensor, Format], torch.Tensor]]] = MappingProxyType(
    {
        "floor": _exponent_floor,
        "ceil": _exponent_ceil,
        "even": _exponent_even,
        "best": _exponent_best,
    }
)
"""Every rule: (tiles, format) → scale (tiles, 1)."""
