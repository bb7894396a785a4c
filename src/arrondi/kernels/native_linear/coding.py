"""How the compiled kernels keep the codes of a format.

Owns: `Coding`, `coding_of`, `packing_of`, and the numbers of native/kernels.h that go with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch

from arrondi.formats import Format, Scheme, tile_shape
from arrondi.kernels.kernel import Tensors

BLOCK: Final = 16
"""Rows of the weight in one tile."""

STEP: Final = 32
"""Columns of one packed step; of the 1.6-bit ternary layout 20."""

_KINDS: Final = (
    "u8", "u6", "u5", "u4", "u3", "u2", "u1", "trit5", "table4", "float4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3",
)  # fmt: skip
"""How codes are packed, numbered as in native/kernels.h."""

KIND: Final = {name: number for number, name in enumerate(_KINDS)}

INTEGERS: Final = frozenset(KIND[name] for name in _KINDS[:9])
"""Kinds that meet activations as integers."""

TABLES: Final = {KIND["table4"]: torch.uint8, KIND["float4"]: torch.float32}
"""Kinds that are decoded by a table of sixteen numbers, and its type."""


@dataclass(frozen=True)
class Coding:
    """value(code) = (table[code] or code - base - zero) · unit.

    Attributes:
        kind: number of the way in which codes are packed.
        zero: zero point of all codes, counted from the lowest code.
        unit: factor on the scale, a power of two.
        table: (16,) uint8 or float32, None for kinds that need none.
    """

    kind: int
    zero: int
    unit: float = 1.0
    table: torch.Tensor | None = None


def coding_of(format: Format) -> Coding | None:
    """None if the kernels cannot read the format."""
    if format.kind == "integer":
        width = 8 if format.bits == 7 else format.bits
        return Coding(KIND[f"u{width}"], -format.qmin)
    if format.name in KIND:
        return Coding(KIND[format.name], 0)
    if format.values == (-1.0, 1.0):
        return Coding(KIND["u1"], 1)
    if format.bits > 4 or format.values is None or not all(math.isfinite(v) for v in format.values):
        return None
    values = _sixteen(format.values)
    for unit in (1.0, 0.5, 0.25):
        steps = values / unit
        low = int(steps.min().floor())
        if bool((steps == steps.round()).all()) and int(steps.max()) - low < 128 and low <= 0:
            return Coding(KIND["table4"], -low, unit, (steps - low).to(torch.uint8))
    return as_floats(format)


def as_floats(format: Format) -> Coding:
    """A codebook of up to sixteen levels, decoded to float32."""
    assert format.values is not None
    return Coding(KIND["float4"], 0, 1.0, _sixteen(format.values).float())


def packing_of(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors | None = None) -> Coding:
    """How a weight that is not refused is kept. Ternary codes with one scale a row take 1.6 bits, which also reads faster.

    Args:
        scheme, shape: of the weight.
        tensors: what `prepack` made of it; None before.
    """
    coding = coding_of(scheme.format)
    assert coding is not None
    if scheme.format.levels == 3 and tile_shape(scheme.granularity, shape)[1] >= shape[1]:
        return replace(coding, kind=KIND["trit5"])
    if tensors is not None and coding.table is not None and tensors["table"].dtype != coding.table.dtype:
        return as_floats(scheme.format)
    return coding


def _sixteen(values: tuple[float, ...]) -> torch.Tensor:
    """The levels, float64; those that are missing repeat the first."""
    levels = torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.nn.functional.pad(levels, (0, 16 - len(values)), value=float(levels[0]))
