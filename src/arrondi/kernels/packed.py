"""A quantized matrix in few bytes on any device, and back: what the reference kernel and the modules beside linears hold.

Owns: `pack_weight`, its inverse `unpack_weight`, `decoded_rows` and `decoded`. Codes are a bit stream
(`arrondi.tensor.packing`), scales are in their stored type, zero points take one byte where they fit, quantized scales are packed
in turn. The weight is decoded some rows at a time and forgotten, so the peak is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch

from arrondi.formats import Scheme, scale_shape, tile_shape
from arrondi.kernels.kernel import Tensors
from arrondi.kernels.packed_rings import Rings, decoded_rings, rings_at
from arrondi.tensor.apart import Kept
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_codes, load_scale, store_codes, store_scale
from arrondi.tensor.tables import load_table, store_table
from arrondi.tensor.turned import Sides

CHUNK: Final = 1 << 18
"""Weights decoded at a time for a few rows of x: with their temporaries they stay in the core's own cache."""

WIDE_CHUNK: Final = 1 << 20
"""The same for many rows of x, where the matrix product wants a wider matrix."""


def pack_weight(q: QTensor) -> Tensors:
    """Everything that `unpack_weight` needs, losslessly, in few bytes.

    Args:
        q: any scheme; 2-D.

    Returns:
        `codes` (out, bytes) uint8; `scale` in its stored type (e8m0 as exponent bytes), or `scale_codes`,
        `scale_scale`, … of a quantized scale; `zero_point`, `offset` (as `scale`), `group_index` (int32), `table` and
        `apart_index`, `apart_values`, `row_side`, `column_side` where the tensor has them. Of a trellis, `codes` (in, bytes).
    """
    # A clone, since a view would keep the whole of a larger tensor or file mapping alive.
    return {"codes": _packed_codes(q)} | {name: part.clone().contiguous() for name, part in pack_grid(q).items()}


def pack_grid(q: QTensor) -> Tensors:
    """All of `pack_weight` but the codes; views where nothing was to be packed."""
    packed = pack_part("scale", q.scale, q.scheme.scale)
    if q.zero_point is not None:
        packed["zero_point"] = _narrow(q.zero_point)
    if q.offset is not None:
        packed |= pack_part("offset", q.offset, q.scheme.offset)
    if q.group_index is not None:
        packed["group_index"] = q.group_index.to(torch.int32)
    if q.table is not None:
        packed |= _pack_table(q)
    if q.apart is not None:
        packed |= {"apart_index": q.apart.index, "apart_values": q.apart.values}
    if q.sides is not None:
        packed |= {"row_side": q.sides.rows, "column_side": q.sides.columns}
    return packed


def unpack_weight(tensors: Tensors, scheme: Scheme, shape: tuple[int, ...]) -> QTensor:
    """The tensor that `pack_weight` packed.

    Args:
        tensors: from `pack_weight`.
        scheme, shape: of the tensor, 2-D.
    """
    return on_grid(load_codes(tensors["codes"], shape, scheme.format), tensors, scheme)


def on_grid(codes: torch.Tensor, tensors: Tensors, scheme: Scheme) -> QTensor:
    """The tensor of these codes on the grid that `pack_grid` packed."""
    wanted = scale_shape(scheme.granularity, tuple(codes.shape))
    scale = unpack_part("scale", tensors, scheme.scale, wanted)
    zero = tensors["zero_point"].int() if scheme.zero_point == "integer" else None
    offset = unpack_part("offset", tensors, scheme.offset, wanted) if scheme.zero_point == "float" else None
    table = load_table(tensors["table"]) if scheme.table is not None else None
    return QTensor(
        codes, scale, zero, offset, scheme, tensors.get("group_index"), table, _kept(tensors), _sides(tensors)
    )


def pack_part(name: str, part: torch.Tensor | QTensor, storage: str | Scheme) -> Tensors:
    """Scales or offsets: `name` in the storage type, or `name_codes`, `name_scale`, … of quantized ones.

    Values that do not fit the type (a tensor made by hand) stay in float32.
    """
    if isinstance(part, QTensor):
        return {f"{name}_{inner}": tensor for inner, tensor in pack_weight(part).items()}
    if isinstance(storage, Scheme):
        return {name: part}
    stored = store_scale(part, storage)
    return {name: stored if torch.equal(load_scale(stored), part) else part}


def unpack_part(name: str, tensors: Tensors, storage: str | Scheme, shape: tuple[int, ...]) -> torch.Tensor | QTensor:
    """The inverse of `pack_part`; float32 where it is not quantized."""
    if isinstance(storage, Scheme) and name not in tensors:
        inner = {key.removeprefix(f"{name}_"): part for key, part in tensors.items() if key.startswith(f"{name}_")}
        return unpack_weight(inner, storage, shape)
    return load_scale(tensors[name])


def decoded_rows(
    tensors: Tensors, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, chunk: int = CHUNK
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in real numbers, a few rows at a time.

    Args:
        tensors: from `pack_weight`.
        scheme, shape: of the weight, (out, in).
        dtype: computed in float32 and rounded once to this.
        chunk: weights wanted at a time; a block of rows that share a scale is never split.

    Yields:
        (rows, values (rows, in)): in order, every row once.
    """
    rows, columns = shape
    wanted = scale_shape(scheme.granularity, shape)
    scale = _real(unpack_part("scale", tensors, scheme.scale, wanted))
    offset = None
    if scheme.zero_point == "float":
        offset = _real(unpack_part("offset", tensors, scheme.offset, wanted))
    zero, index = tensors.get("zero_point"), tensors.get("group_index")
    plain = replace(scheme, scale="float32", offset="float32", signed=None, apart=None)
    kept, own = _kept(tensors), scheme.table
    tables = None if own is None else load_table(tensors["table"])
    tall = 1 if own is None else own.rows or rows
    shared = max((h for h in (tile_shape(scheme.granularity, shape)[0], tall) if 1 < h < rows), default=1)
    step = max(chunk // max(columns, 1), 1)
    if scheme.format.trellis is not None:
        for part, values in decoded_rings(_rings(tensors, scheme, shape), step):
            yield part, values.to(dtype)
        return
    step = -(-step // shared) * shared
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = _granules(start, stop, tile_shape(scheme.granularity, shape)[0])
        codes = load_codes(tensors["codes"][start:stop], (stop - start, columns), scheme.format)
        zeros = None if zero is None else zero[part].int()
        own_tables = None if tables is None else tables[_granules(start, stop, tall)]
        q = QTensor(codes, scale[part], zeros, None if offset is None else offset[part], plain, index, own_tables)
        values = q.dequantize(dtype)
        yield slice(start, stop), values if kept is None else kept.rows(start, stop - start, shape).put(values)


def _granules(start: int, stop: int, height: int) -> slice:
    """Those that some rows need, of granules of so many rows."""
    return slice(start // max(height, 1), -(-stop // max(height, 1)))


def decoded(
    tensors: Tensors, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The whole weight in real numbers, (out, in); written into `out` when it is given."""
    whole = torch.empty(shape, dtype=dtype, device=tensors["codes"].device) if out is None else out
    for rows, values in decoded_rows(tensors, scheme, shape, dtype):
        whole[rows] = values
    return whole


def rows_at(tensors: Tensors, scheme: Scheme, shape: tuple[int, int], ids: torch.Tensor) -> torch.Tensor:
    """Rows (n,) of a weight of a trellis, float32 (n, in); every row is decoded with its ring."""
    return rings_at(_rings(tensors, scheme, shape), ids)


def _rings(tensors: Tensors, scheme: Scheme, shape: tuple[int, int]) -> Rings:
    scale = _real(unpack_part("scale", tensors, scheme.scale, scale_shape(scheme.granularity, shape)))
    return Rings(tensors["codes"], scale, _sides(tensors), scheme, shape)


def _pack_table(q: QTensor) -> Tensors:
    """Tables in their stored type; as they are where they do not fit it (made by hand)."""
    assert q.table is not None and q.scheme.table is not None
    stored = store_table(q.table, q.scheme.table)
    return {"table": stored if torch.equal(load_table(stored), q.table) else q.table}


def _kept(tensors: Tensors) -> Kept | None:
    return Kept(tensors["apart_index"], tensors["apart_values"]) if "apart_index" in tensors else None


def _sides(tensors: Tensors) -> Sides | None:
    return Sides(tensors["row_side"], tensors["column_side"]) if "row_side" in tensors else None


def _packed_codes(q: QTensor) -> torch.Tensor:
    """Some rows at a time: packing needs up to eight bytes for each code."""
    format, rows = q.scheme.format, max(WIDE_CHUNK // max(q.shape[1], 1), 1)
    if format.trellis is not None:
        return torch.cat(
            [store_codes(part, format) for part in q.codes.split(max(WIDE_CHUNK // max(q.shape[0], 1), 1), 1)]
        )
    return torch.cat([store_codes(part, format) for part in q.codes.split(rows)])


def _real(part: torch.Tensor | QTensor) -> torch.Tensor:
    return part.dequantize() if isinstance(part, QTensor) else part


def _narrow(zero_point: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.uint8, torch.int8):
        if torch.equal(zero_point.to(dtype).int(), zero_point):
            return zero_point.to(dtype)
    return zero_point
