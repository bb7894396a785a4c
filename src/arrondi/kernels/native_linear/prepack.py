"""A quantized weight in the layout of the compiled kernels, and back.

Owns: `prepack`, `unpack`, how scales lie (`as_blocks`, `per_tile`), weights side by side as one (`join`, `pieces`), and what the kernels are told of one (`Facts`,
`Parts`). Codes lie in tiles of sixteen rows that the kernels decode in registers; see native/kernels.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch

from arrondi.errors import ShapeError
from arrondi.formats import Scheme, Table, tile_shape
from arrondi.kernels.kernel import Meta, Tensors
from arrondi.kernels.native_linear.coding import (
    BLOCK,
    HALVES,
    INT8,
    KIND,
    NO,
    RING,
    ROWS,
    SLAB,
    TABLES,
    as_floats,
    counting_of,
    pack_tables,
    packing_of,
    slab_shape,
    unpack_tables,
)
from arrondi.kernels.packed import on_grid, pack_part, unpack_part
from arrondi.native import TYPES, native, operand, threads
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.nearest import quantize_with
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED, Grid
from arrondi.tensor.storage import signed
from arrondi.tensor.tables import round_table
from arrondi.tensor.turned import block_of

KEPT: Final = "kept_"
"""Begins the names of tensors that no product reads, only `unpack`."""

_STATIC: Final = ("input_scale", "input_zero_point")
"""The static grid of activations."""


class Facts(NamedTuple):
    """The numbers of a packed weight, as native/bind_products.cpp reads them.

    Attributes:
        kind: how codes are packed.
        rows, columns: of the weight.
        group: columns under one scale.
        groups: scales in a row.
        scale_type: number of the type of the scales, or of their units.
        zero: zero point of all codes, counted from the lowest code.
        code_bytes: of the packed codes.
        offset_type: number of the type of the offsets, or of their units.
        counted: how scales and offsets are kept: as numbers or as codes.
        run: groups that share a unit.
        even, odd, state: of a trellis: bits of the codes of even and of odd rows, and of a state.
        row_run, column_run: blocks in which both sides are turned; 1 where they are not.
        squares: of a trellis: 1 where its rings are squares, 0 where they are columns.
    """

    kind: int
    rows: int
    columns: int
    group: int
    groups: int
    scale_type: int
    zero: int
    code_bytes: int
    offset_type: int = 0
    counted: int = NO
    run: int = 1
    even: int = 0
    odd: int = 0
    state: int = 0
    row_run: int = 1
    column_run: int = 1
    squares: int = 0


class Parts(NamedTuple):
    """The tensors of a packed weight, and the static grid of the activations that it meets."""

    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    table: torch.Tensor | None = None
    unit: torch.Tensor | None = None
    offset_unit: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None
    row_side: torch.Tensor | None = None
    column_side: torch.Tensor | None = None


def facts_of(tensors: Tensors, meta: Meta) -> Facts:
    coding = packing_of(meta.scheme, meta.shape, tensors)
    rows, columns = meta.shape
    unit, offset = tensors.get("unit"), tensors.get("offset_unit", tensors.get("offset"))
    counting = counting_of(meta.scheme) if unit is not None else None
    width = tile_shape(meta.scheme.granularity, meta.shape)[1]
    scale_type, code_bytes = TYPES[(tensors["scale"] if unit is None else unit).dtype], tensors["codes"].numel()
    offset_type = 0 if offset is None else TYPES[offset.dtype]
    way, run = (NO, 1) if counting is None else (counting.way, counting.run)
    groups = -(-columns // width)
    facts = Facts(coding.kind, rows, columns, width, groups, scale_type, coding.zero, code_bytes, offset_type, way, run)
    trellis, turned = meta.scheme.format.trellis, meta.scheme.turned
    if trellis is not None:
        facts = facts._replace(
            even=trellis.bits[0], odd=trellis.bits[1], state=trellis.state, squares=int(trellis.ring == "square")
        )
    if turned is not None:
        facts = facts._replace(row_run=block_of(rows, turned), column_run=block_of(columns, turned))
    return facts


def parts_of(tensors: Tensors) -> Parts:
    return Parts(**{name: tensors.get(name) for name in Parts._fields})


def check_parts(parts: Sequence[torch.Tensor | None], facts: Sequence[int]) -> tuple[Parts, Facts, list[int]]:
    """Both as they are, and the addresses of the parts. The operator can be called with anything.

    Raises:
        ShapeError: they do not fit each other.
    """
    if len(parts) != len(Parts._fields) or len(facts) != len(Facts._fields):
        raise ShapeError(
            f"A packed weight has {len(Parts._fields)} tensors and {len(Facts._fields)} facts, got {len(parts)} and {len(facts)}."
        )
    p, f = Parts(*parts), Facts(*facts)
    if (
        not (0 <= f.kind < len(KIND) and NO <= f.counted <= HALVES)
        or min(*f[1:5], f.run) < 1
        or max(f[1:5]) > 2**31 - 1
    ):
        raise ShapeError(f"The facts of a packed weight must be a kind and positive sizes, got {f}.")
    if f.groups != -(-f.columns // f.group):
        raise ShapeError(
            f"A weight of {f.columns} columns in groups of {f.group} has {-(-f.columns // f.group)} groups, got {f.groups}."
        )
    own = ROWS.get(f.kind)
    table = torch.uint8 if own else TABLES.get(f.kind)
    counted = f.counted != NO
    missed = {"codes": p.codes is None, "scale": p.scale is None, "table": table and p.table is None}
    for name, missing in (missed | {"unit": counted and p.unit is None}).items():
        if missing:
            raise ShapeError(f"{name} of a packed weight of shape {(f.rows, f.columns)} is missing. Use prepack.")
    assert native is not None
    code_bytes: tuple[int, ...] = (native.packed_bytes(f.kind, f.rows, f.columns),)
    if f.kind == RING:
        code_bytes = slab_shape(f.rows, f.columns, (f.even, f.odd), f.squares != 0)
    each = (-(-f.rows // BLOCK), f.groups, BLOCK)
    runs = (each[0], -(-f.groups // f.run), BLOCK)
    of_scale, of_offset = (_dtype(number) for number in (f.scale_type, f.offset_type))
    codes = torch.int8 if f.counted == INT8 else torch.uint8
    what = f"of a packed weight of shape {(f.rows, f.columns)}"
    places = [
        operand(f"codes {what}", p.codes, code_bytes, torch.uint8),
        operand(f"scale {what}", p.scale, each, codes if counted else of_scale),
        operand(f"zero {what}", p.zero, each, torch.uint8),
        operand(f"offset {what}", p.offset, each, codes if counted else of_offset),
        operand(f"table {what}", p.table, (each[0], 256 * own) if own else (16,), table or torch.uint8),
        operand(f"unit {what}", p.unit, runs, of_scale),
        operand(f"offset_unit {what}", p.offset_unit, runs, of_offset),
        operand(f"row_side {what}", p.row_side, (f.rows,), torch.float32),
        operand(f"column_side {what}", p.column_side, (f.columns,), torch.float32),
        operand("input_scale", p.input_scale, (1,), torch.float32),
        operand("input_zero_point", p.input_zero_point, (1,), torch.int32),
    ]
    return p, f, places


def _dtype(number: int) -> torch.dtype:
    """Of a number of native/kernels.h; one that is none fits no tensor."""
    return next((dtype for dtype, known in TYPES.items() if known == number), torch.bool)


def prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    """`codes` in tiles, `scale` (blocks, groups, 16) in the smallest type that holds it exactly, and `zero`, `offset`, `table`
    where the scheme has them. Scales and offsets that are integers with a unit for some groups stay so: `unit` and `offset_unit`
    (blocks, units, 16). What no product reads and `unpack` needs is under `kept_…`."""
    assert native is not None
    rows, columns = q.shape
    coding = packing_of(q.scheme, q.shape)
    counted = _counted(q)
    scale = q.real_scale
    if coding.unit != 1.0 and not torch.equal(scale * coding.unit / coding.unit, scale):
        coding = as_floats(q.scheme)  # scales so small that they would lose digits
    if q.table is not None and ROWS[coding.kind] == 1 and not torch.equal(round_table(q.table, Table()), q.table):
        coding = as_floats(q.scheme)  # made by hand: entries that are no steps
    codes = q.codes.contiguous()
    packed = torch.empty(native.packed_bytes(coding.kind, rows, columns), dtype=torch.uint8, device="cpu")
    codes_at = operand("codes", codes, (rows, columns), code_dtype(q.scheme.format))
    packed_at = operand("packed codes", packed, tuple(packed.shape), torch.uint8)
    native.prepack(coding.kind, codes_at, columns, 8, -q.scheme.format.qmin, rows, columns, packed_at, threads())
    if counted is not None:
        return {"codes": packed} | counted | ({} if coding.table is None else {"table": coding.table})
    kept = _outer("scale", q.scale) | _outer("offset", q.offset)
    scale, spoiled = per_row(scale * coding.unit, q), _groups_with_nan(q)
    if spoiled is not None:
        scale = torch.where(spoiled, torch.nan, scale)
        kept |= pack_part("scale", q.scale, q.scheme.scale)
    tensors = {"codes": packed, "scale": as_blocks(narrowest(scale, q.scheme.scale), 1.0)}
    offset = q.offset.dequantize() if isinstance(q.offset, QTensor) else q.offset
    if q.zero_point is not None:
        zero = q.zero_point - q.scheme.format.qmin
        if bool(((zero >= 0) & (zero <= 255)).all()):
            tensors["zero"] = as_blocks(per_row(zero.to(torch.uint8), q), 0)
        else:  # made by hand: a zero point that is no code
            offset = -(q.zero_point * q.real_scale)
            kept["zero_point"] = q.zero_point.clone()
    if offset is not None:
        tensors["offset"] = as_blocks(narrowest(per_row(offset, q), q.scheme.offset), 0.0)
    if coding.table is not None:
        tensors["table"] = coding.table
    if q.table is not None and q.scheme.table is not None:
        tensors["table"] = pack_tables(q.table, coding.kind, q.scheme.table, rows)
    return tensors | {KEPT + name: t for name, t in kept.items()}


def unpack(tensors: Tensors, meta: Meta) -> QTensor:
    """The inverse of `prepack`: the same codes, scales, zero points and offsets."""
    assert native is not None
    scheme, (rows, columns) = meta.scheme, meta.shape
    coding = packing_of(scheme, meta.shape, tensors)
    *_, facts, places = check_parts(parts_of(tensors), facts_of(tensors, meta))
    codes = torch.empty((rows, columns), dtype=torch.uint8, device="cpu")
    native.unpack_rows(facts.kind, places[0], columns, 0, rows, operand("codes", codes, (rows, columns), torch.uint8))
    kept = {name.removeprefix(KEPT): t for name, t in tensors.items() if name.startswith(KEPT)}
    if "unit" in tensors:
        inner = _uncounted(tensors, meta)
        return QTensor(signed(codes, scheme.format), inner[0], None, inner[1], scheme)
    scale = _stored("scale", kept, scheme.scale, per_tile(tensors["scale"], meta).float() / coding.unit)
    zero_point, offset = kept.get("zero_point"), None
    if scheme.zero_point == "integer" and zero_point is None:
        zero_point = per_tile(tensors["zero"], meta).int() + scheme.format.qmin
    if scheme.zero_point == "float":
        offset = _stored("offset", kept, scheme.offset, per_tile(tensors["offset"], meta).float())
    table = None if scheme.table is None else unpack_tables(tensors["table"], scheme.table, rows, scheme.format.levels)
    return QTensor(signed(codes, scheme.format), scale, zero_point, offset, scheme, table=table)


def _counted(q: QTensor) -> Tensors | None:
    """Scales and offsets as the codes that they are, and their units; None where they are kept as numbers."""
    counting = counting_of(q.scheme)
    if counting is None or not isinstance(q.scale, QTensor) or not isinstance(q.scale.scale, torch.Tensor):
        return None
    scale, offset = q.scale, q.offset
    tensors = {
        "scale": as_blocks(scale.codes, 0),
        "unit": as_blocks(narrowest(scale.real_scale, scale.scheme.scale), 0),
    }
    if offset is None:
        return tensors
    if not isinstance(offset, QTensor) or not isinstance(offset.scale, torch.Tensor):
        return None
    depth = as_blocks(offset.codes, 0)
    if counting.way == HALVES:
        tensors["scale"] |= depth << 4
    else:
        tensors["offset"] = depth
    return tensors | {"offset_unit": as_blocks(narrowest(offset.real_scale, offset.scheme.scale), 0)}


def _uncounted(tensors: Tensors, meta: Meta) -> tuple[QTensor, QTensor | None]:
    """The inverse of `_counted`."""
    inner, counting = meta.scheme.scale, counting_of(meta.scheme)
    assert isinstance(inner, Scheme) and counting is not None

    def part(codes: torch.Tensor, unit: torch.Tensor) -> QTensor:
        return QTensor(per_tile(codes, meta), per_tile(unit, meta).float(), None, None, inner)

    scale = tensors["scale"]
    halves = counting.way == HALVES
    of_scale = part(scale & 15 if halves and "offset_unit" in tensors else scale, tensors["unit"])
    if "offset_unit" not in tensors:
        return of_scale, None
    return of_scale, part(scale >> 4 if halves else tensors["offset"], tensors["offset_unit"])


def join(weights: Sequence[tuple[Tensors, Meta]]) -> tuple[Tensors, Meta] | str:
    """Weights that read the same x as one, outputs side by side; a sentence why not where they differ in more than their rows.

    Each must have a multiple of `BLOCK` rows, or of `SLAB` where they are states of a trellis, so that the tensors of every one are a piece of those of all. What only `unpack`
    reads stays with every weight.
    """
    tensors, metas = [t for t, _ in weights], [m for _, m in weights]
    facts: dict[str, set[Any]] = {
        "schemes": {m.scheme for m in metas},
        "numbers of columns": {m.shape[1] for m in metas},
        "types": {m.dtype for m in metas},
        "ways to round them": {m.inputs for m in metas},
        "ways to keep zero points": {frozenset(_read(t)) for t in tensors},
        "ways to keep codes": {packing_of(m.scheme, m.shape, t).kind for t, m in weights},
        "static scales": {tuple(float(t[name]) for name in _STATIC if name in t) for t in tensors},
    }
    for what, found in facts.items():
        if len(found) > 1:
            return f"Layers that read the same activations have different {what}."
    tall = SLAB if packing_of(metas[0].scheme, metas[0].shape, tensors[0]).kind == RING else BLOCK
    for m in metas:
        if m.shape[0] % tall:
            return f"Layers that read the same activations are joined in tiles of {tall} rows, and one has {m.shape[0]} rows."
    whole = replace(metas[0], shape=(sum(m.shape[0] for m in metas), metas[0].shape[1]))
    if (turned := whole.scheme.turned) is not None:
        if len({block_of(m.shape[0], turned) for m in (*metas, whole)}) > 1:
            return "Layers that read the same activations are turned in blocks of different rows."
        if not all(torch.equal(t["column_side"], tensors[0]["column_side"]) for t in tensors):
            return "Layers that read the same activations turn them in different ways."
    joined = {}
    for name in _read(tensors[0]):
        differ = len({t[name].dtype for t in tensors}) > 1  # scales, offsets or units in the types that hold them
        parts = [t[name].float() if differ else t[name] for t in tensors]
        joined[name] = parts[0] if _shared(name, parts[0]) else torch.cat(parts)
    return joined, whole


def _read(tensors: Tensors) -> list[str]:
    """Names of those that a product reads."""
    return [name for name in tensors if not name.startswith(KEPT)]


def pieces(tensors: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """The tensors of every weight that `join` made one of, as views; `rows` of each."""
    total = sum(rows)
    found: list[Tensors] = [{} for _ in rows]
    for name, tensor in tensors.items():
        sizes = [tensor.shape[0] * count // total for count in rows]
        for piece, view in zip(
            found, [tensor] * len(rows) if _shared(name, tensor) else tensor.split(sizes), strict=True
        ):
            piece[name] = view
    return found


def _shared(name: str, tensor: torch.Tensor) -> bool:
    """Whether all rows of a weight share a tensor."""
    return name in (*_STATIC, "column_side") or (name == "table" and tensor.dim() == 1)


def per_row(part: torch.Tensor, q: QTensor) -> torch.Tensor:
    """A scale-shaped tensor with one entry for every row, (out, groups)."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    return part if height == 1 else part.repeat_interleave(height, dim=0)[: q.shape[0]]


def as_blocks(part: torch.Tensor, fill: float) -> torch.Tensor:
    """(out, groups) → (blocks, groups, 16), missing rows filled."""
    rows, groups = part.shape
    part = torch.nn.functional.pad(part, (0, 0, 0, -rows % BLOCK), value=fill)
    return part.reshape(-1, BLOCK, groups).transpose(1, 2).contiguous()


def per_tile(blocks: torch.Tensor, meta: Meta) -> torch.Tensor:
    """The inverse of `per_row` and `as_blocks`."""
    rows = blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[: meta.shape[0]]
    return rows[:: tile_shape(meta.scheme.granularity, meta.shape)[0]].contiguous()


def narrowest(scale: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """The same numbers in the smallest type that holds them; where the scheme names one, that is tried alone."""
    named = STORED.get(storage) if isinstance(storage, str) else None
    for dtype in (named,) if named is not None else (torch.bfloat16, torch.float16):
        narrow = scale.to(dtype)
        if torch.equal(narrow.float(), scale):
            return narrow
    return scale


def _groups_with_nan(q: QTensor) -> torch.Tensor | None:
    """The kernels read every pattern of an 8-bit float as a number: the groups (out, groups) that have one that is none."""
    if not q.scheme.format.name.startswith("fp8"):
        return None
    first = 0x7F if q.scheme.format.name == "fp8_e4m3" else 0x7C
    bad = (q.codes & 0x7F) >= first
    if not bool(bad.any()):
        return None
    width = tile_shape(q.scheme.granularity, q.shape)[1]
    return torch.nn.functional.pad(bad, (0, -q.shape[1] % width)).unflatten(1, (-1, width)).any(dim=2)


def _outer(name: str, part: torch.Tensor | QTensor | None) -> Tensors:
    """What tells the codes of quantized scales from their real values: their own scales, or all of them where rounding the
    values gives other codes (scales made elsewhere)."""
    if not isinstance(part, QTensor):
        return {}
    packed = pack_part(name, part, part.scheme)
    again = _round_again(part.dequantize(), part)
    if again is not None and torch.equal(again.codes, part.codes):
        del packed[f"{name}_codes"]
    return packed


def _stored(name: str, kept: Tensors, storage: str | Scheme, real: torch.Tensor) -> torch.Tensor | QTensor:
    """Scales or offsets as they were before `prepack`, from their real values and what it kept."""
    shape = tuple(real.shape)
    if name in kept or f"{name}_codes" in kept:
        return unpack_part(name, kept, storage, shape)
    if not isinstance(storage, Scheme) or not any(key.startswith(f"{name}_") for key in kept):
        return real
    grid = {key.removeprefix(f"{name}_"): part for key, part in kept.items() if key.startswith(f"{name}_")}
    blank = torch.zeros(shape, dtype=code_dtype(storage.format), device="cpu")
    found = _round_again(real, on_grid(blank, grid, storage))
    assert found is not None
    return found


def _round_again(real: torch.Tensor, like: QTensor) -> QTensor | None:
    """Numbers on the grid of `like`; None where they are not finite or the grid is quantized in turn."""
    if isinstance(like.scale, QTensor) or isinstance(like.offset, QTensor) or not bool(torch.isfinite(real).all()):
        return None
    return quantize_with(real, like.scheme, Grid(like.scale, like.zero_point, like.offset))
