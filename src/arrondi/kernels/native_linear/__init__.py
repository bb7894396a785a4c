"""Products by the compiled kernels (`native/` in the source tree).

Owns: `NATIVE`. How codes are kept: `coding`; the packed weight: `prepack`; states of a trellis, and `TRELLIS`: `rings`; how activations meet it: `rounding`; the product:
`operator`.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.formats import Scheme, tile_shape
from arrondi.kernels.kernel import Kernel
from arrondi.kernels.native_linear.coding import BLOCK, STEP, coding_of
from arrondi.kernels.native_linear.operator import bind, integer_linear, linear, product_of
from arrondi.kernels.native_linear.prepack import Facts, Parts, facts_of, join, parts_of, pieces, prepack, unpack
from arrondi.kernels.native_linear.rings import TRELLIS, ring_rows
from arrondi.kernels.native_linear.rounding import Rounding, rounding_of, rounds
from arrondi.native import TYPES, available

_MOST_COLUMNS: Final = 65536
"""More would let int32 sums of int8 products overflow."""

_LARGEST: Final = 2**31 - 1


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"It runs on the CPU, got {device}."
    if not available():
        return "This installation has no compiled kernels, or ARRONDI_CPU=none leaves them alone."
    if dtype not in TYPES:
        return f"It takes float32, bfloat16 and float16 activations, got {dtype}."
    if len(shape) != 2 or not all(shape):
        return f"It multiplies by matrices (out, in) that are not empty, got shape {shape}."
    if shape[1] > _MOST_COLUMNS or shape[0] * shape[1] > _LARGEST:
        return f"It takes up to {_MOST_COLUMNS} columns and 2³¹ weights, got shape {shape}."
    if coding_of(scheme) is None:
        return f"It knows integers, small floats, and codebooks and look-up tables of up to 16 levels, got {scheme.format}."
    width = tile_shape(scheme.granularity, shape)[1]
    if width < shape[1] and width != BLOCK and width % STEP:
        return f"It takes groups of 16 or a multiple of {STEP} columns, got {width}."
    return None


NATIVE: Final = Kernel("native", _refuse, prepack, unpack, linear, rounds, bind)
"""Compiled for this CPU. Error: see `rounding` and `operator`; exact int32 sums with activations rounded by token."""

__all__ = [
    "BLOCK",
    "NATIVE",
    "TRELLIS",
    "Facts",
    "Parts",
    "Rounding",
    "bind",
    "facts_of",
    "integer_linear",
    "join",
    "linear",
    "parts_of",
    "pieces",
    "prepack",
    "product_of",
    "ring_rows",
    "rounding_of",
    "rounds",
    "unpack",
]
