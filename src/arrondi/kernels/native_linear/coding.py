"""How the compiled kernels keep the codes of a format.

Owns: `Coding`, `coding_of`, `packing_of`, `Counting`, `counting_of`, the tables of rows (`pack_tables`, `unpack_tables`), and the numbers of
native/kernels.h that go with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch

from arrondi.formats import PerGroup, Scheme, Table, tile_shape
from arrondi.kernels.kernel import Tensors
from arrondi.tensor import tables
from arrondi.tensor.ranges.grid import STORED

BLOCK: Final = 16
"""Rows of the weight in one tile."""

SLAB: Final = 128
"""Rows of the weight whose states of a trellis lie together."""

STEP: Final = 32
"""Columns of one packed step; of the 1.6-bit ternary layout 20."""

_KINDS: Final = (
    "u8", "u6", "u5", "u4", "u3", "u2", "u1", "trit5", "table4", "wide_table4", "rows4", "rows3", "rows2",
    "float4", "float_rows4", "float_rows3", "float_rows2", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "ring",
)  # fmt: skip
"""How codes are packed, numbered as in native/kernels.h."""

KIND: Final = {name: number for number, name in enumerate(_KINDS)}

INTEGERS: Final = frozenset(KIND[name] for name in (*_KINDS[:13], "ring"))
"""Kinds that meet activations as integers."""

RING: Final = KIND["ring"]
"""States of a trellis; see `native_linear.rings`."""

TABLES: Final = {KIND["table4"]: torch.uint8, KIND["wide_table4"]: torch.uint8, KIND["float4"]: torch.float32}
"""Kinds that are decoded by a table of sixteen numbers, and its type."""

ROWS: Final = {KIND[f"{name}{bits}"]: size for name, size in (("rows", 1), ("float_rows", 4)) for bits in (4, 3, 2)}
"""Kinds of which every row has a table, and the bytes of an entry."""


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


def coding_of(scheme: Scheme) -> Coding | None:
    """None if the kernels cannot read the format."""
    format = scheme.format
    if scheme.table is not None and format.bits <= 4:
        integers = scheme.table.stored == "int8"
        return Coding(KIND[f"rows{format.bits}"], 128, tables.STEP) if integers else as_floats(scheme)
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
        most = int(steps.max()) - low
        if bool((steps == steps.round()).all()) and most < 256 and low <= 0:
            return Coding(KIND["table4" if most < 128 else "wide_table4"], -low, unit, (steps - low).to(torch.uint8))
    return as_floats(scheme)


def slab_shape(rows: int, columns: int, bits: tuple[int, int], squares: bool) -> tuple[int, int]:
    """The shape of packed states, uint8 (slabs, bytes): `bits` of the codes of even and of odd rows; `squares` or columns."""
    most = SLAB // BLOCK
    one = columns // BLOCK * most * (BLOCK * sum(bits) + 2) if squares else columns * (most * sum(bits) + 2)
    return -(-rows // SLAB), one + 16


def as_floats(scheme: Scheme) -> Coding:
    """A codebook or look-up table of up to sixteen levels, decoded to float32."""
    format = scheme.format
    if format.values is None:
        return Coding(KIND[f"float_rows{format.bits}"], 0)
    return Coding(KIND["float4"], 0, 1.0, _sixteen(format.values).float())


@dataclass(frozen=True)
class Counting:
    """Scales, and offsets if there are any, that are codes of integers times what some groups share.

    Attributes:
        way: of keeping the codes, a number of native/kernels.h: int8, uint8, or both codes of a group in one byte.
        run: groups that share a unit.
    """

    way: int
    run: int


NO, INT8, UINT8, HALVES = range(4)
"""Ways of keeping scales; `NO`: as numbers."""


def counting_of(scheme: Scheme) -> Counting | None:
    """How the kernels keep scales that are quantized in turn; None where they take them as numbers.

    Units are found by a shift, so a run is a power of two; a scale stays code times unit, so the codes of the weight have no unit of
    their own.
    """
    inner, coding = scheme.scale, coding_of(scheme)
    if coding is None or coding.kind not in INTEGERS or coding.kind in ROWS or coding.unit != 1.0:
        return None
    if not isinstance(inner, Scheme) or not isinstance(scheme.granularity, PerGroup) or scheme.zero_point == "integer":
        return None
    if not isinstance(inner.granularity, PerGroup) or not inner.symmetric or inner.scale not in STORED:
        return None
    format, run = inner.format, inner.granularity.size
    if format.kind != "integer" or run & (run - 1):
        return None
    if scheme.zero_point != "float":
        return Counting(INT8 if format.qmin < 0 else UINT8, run)
    if format.qmin < 0 or scheme.offset != inner:
        return None
    return Counting(HALVES if format.bits <= 4 else UINT8, run)


def packing_of(scheme: Scheme, shape: tuple[int, ...], tensors: Tensors | None = None) -> Coding:
    """How a weight that is not refused is kept. Ternary codes with one scale a row take 1.6 bits, which also reads faster.

    Args:
        scheme, shape: of the weight.
        tensors: what `prepack` made of it; None before.
    """
    if scheme.format.trellis is not None:
        return Coding(RING, 0)
    coding = coding_of(scheme)
    assert coding is not None
    if scheme.format.levels == 3 and tile_shape(scheme.granularity, shape)[1] >= shape[1]:
        return replace(coding, kind=KIND["trit5"])
    integers = coding.kind in ROWS or coding.kind in TABLES
    if tensors is not None and integers and bytes_of_entry(tensors["table"]) > 1:
        return as_floats(scheme)
    return coding


def bytes_of_entry(table: torch.Tensor) -> int:
    """Of a packed table, or of those of all rows."""
    return table.element_size() if table.dim() == 1 else table.shape[1] // (16 * BLOCK)


def pack_tables(values: torch.Tensor, kind: int, table: Table, rows: int) -> torch.Tensor:
    """The tables of every row as native/kernels.h lays them out.

    Args:
        values: (tables, levels) float32; of kinds with entries of a byte multiples of 1/128.
        kind: how codes are packed.
        table: who shares the tables.
        rows: of the weight.

    Returns:
        uint8 (blocks, 256 · bytes of an entry).
    """
    one = ROWS[kind] == 1
    entries = (tables.store_table(values, Table()).view(torch.uint8) ^ 128) if one else values.view(torch.uint8)
    entries = entries.reshape(*values.shape, -1)[tables.table_of_row(table, rows)]
    entries = torch.nn.functional.pad(entries, (0, 0, 0, 16 - values.shape[1], 0, -rows % BLOCK))
    return entries.reshape(-1, 4, 4, 16, entries.shape[2]).permute(0, 2, 4, 1, 3).flatten(1)


def unpack_tables(packed: torch.Tensor, table: Table, rows: int, levels: int) -> torch.Tensor:
    """The inverse of `pack_tables`: (tables, levels) float32."""
    of_rows = packed.reshape(len(packed), 4, -1, 4, 16).permute(0, 3, 1, 4, 2).reshape(len(packed) * BLOCK, 16, -1)
    first = of_rows[: rows : table.rows or rows, :levels].contiguous()
    if first.shape[2] == 1:
        return tables.load_table((first.squeeze(2) ^ 128).view(torch.int8))
    return first.view(torch.float32).squeeze(2)


def _sixteen(values: tuple[float, ...]) -> torch.Tensor:
    """The levels, float64; those that are missing repeat the first."""
    levels = torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.nn.functional.pad(levels, (0, 16 - len(values)), value=float(levels[0]))
