"""The slow, obvious twin: packed codes that become floats again at every call.

Owns: `REFERENCE`, which takes every scheme on every device, and `pack_weight` / `decoded_rows`, the packed form that it
keeps: codes as a bit stream (`arrondi.tensor.packing`), scales in their stored type, zero points in one byte where they fit,
quantized scales packed in turn. The weight is decoded some rows at a time and forgotten, so the peak is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from arrondi.formats import Scheme, scale_shape, tile_shape
from arrondi.kernels.kernel import Kernel, Meta, Tensors
from arrondi.tensor.packing import pack, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_scale, signed, store_scale, unsigned

_CHUNK = 1 << 18
"""Weights decoded at a time for a few rows of x: with their temporaries they stay in the core's own cache."""

_WIDE_CHUNK = 1 << 20
"""The same for many rows of x, where the matrix product wants a wider matrix."""


def pack_weight(q: QTensor) -> Tensors:
    """Everything that `decoded_rows` needs, losslessly, in few bytes.

    Args:
        q: any scheme; 2-D.

    Returns:
        `codes` (out, bytes) uint8; `scale` in its stored type (e8m0 as exponent bytes), or `scale_codes`,
        `scale_scale`, … of a quantized scale; `zero_point`, `offset` (float32) and `group_index` (int32) where the
        tensor has them.
    """
    packed: Tensors = {}
    if isinstance(q.scale, QTensor):
        packed |= {f"scale_{name}": part for name, part in pack_weight(q.scale).items()}
    else:
        packed["scale"] = _stored_scale(q.scale, q.scheme.scale)
    if q.zero_point is not None:
        packed["zero_point"] = _narrow(q.zero_point)
    if (offset := q.real_offset) is not None:
        packed["offset"] = offset
    if q.group_index is not None:
        packed["group_index"] = q.group_index.to(torch.int32)
    # A clone, since a view would keep the whole of a larger tensor or file mapping alive.
    return {"codes": _packed_codes(q)} | {name: part.clone().contiguous() for name, part in packed.items()}


def decoded_rows(
    tensors: Tensors, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, chunk: int = _CHUNK
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
    plain = replace(scheme, scale="float32")
    scale = _real_scale(tensors, scheme, shape)
    zero, offset, index = tensors.get("zero_point"), tensors.get("offset"), tensors.get("group_index")
    shared = max(tile_shape(scheme.granularity, shape)[0], 1)
    step = max(chunk // max(columns, 1), 1)
    if 1 < shared < rows:
        step = -(-step // shared) * shared
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = slice(start // shared, -(-stop // shared))
        codes = signed(unpack(tensors["codes"][start:stop], scheme.format.bits, columns), scheme.format)
        zeros = None if zero is None else zero[part].int()
        q = QTensor(codes, scale[part], zeros, None if offset is None else offset[part], plain, index)
        yield slice(start, stop), q.dequantize(dtype)


def decoded(
    tensors: Tensors, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The whole weight in real numbers, (out, in); written into `out` when it is given."""
    whole = torch.empty(shape, dtype=dtype, device=tensors["codes"].device) if out is None else out
    for rows, values in decoded_rows(tensors, scheme, shape, dtype):
        whole[rows] = values
    return whole


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if len(shape) != 2:
        return f"It multiplies by matrices (out, in), got shape {shape}."
    return None if dtype.is_floating_point else f"It computes in a floating type, got {dtype}."


def _prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    return pack_weight(q)


def _linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty((*x.shape[:-1], meta.shape[0]))
    chunk = _CHUNK if x.numel() <= 16 * meta.shape[1] else _WIDE_CHUNK
    for rows, weight in decoded_rows(tensors, meta.scheme, meta.shape, meta.dtype, chunk):
        y[..., rows] = torch.nn.functional.linear(x, weight, None if bias is None else bias[rows])
    return y


def _packed_codes(q: QTensor) -> torch.Tensor:
    """Some rows at a time: packing needs up to eight bytes for each code."""
    format, rows = q.scheme.format, max(_WIDE_CHUNK // max(q.shape[1], 1), 1)
    return torch.cat([pack(unsigned(part, format), format.bits) for part in q.codes.split(rows)])


def _stored_scale(scale: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """In the storage type; values that do not fit it (a tensor made by hand) stay in float32."""
    if isinstance(storage, Scheme):
        return scale
    stored = store_scale(scale, storage)
    exact = torch.equal(load_scale(stored), scale)
    return stored if exact else scale


def _real_scale(tensors: Tensors, scheme: Scheme, shape: tuple[int, int]) -> torch.Tensor:
    """Scales as float32, (tiles of rows, tiles of columns)."""
    if isinstance(scheme.scale, Scheme) and "scale" not in tensors:
        inner = {name.removeprefix("scale_"): part for name, part in tensors.items() if name.startswith("scale_")}
        rows, columns = scale_shape(scheme.granularity, shape)
        return decoded(inner, scheme.scale, (rows, columns), torch.float32)
    return load_scale(tensors["scale"])


def _narrow(zero_point: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.uint8, torch.int8):
        if torch.equal(zero_point.to(dtype).int(), zero_point):
            return zero_point.to(dtype)
    return zero_point


REFERENCE = Kernel("reference", _refuse, _prepack, _linear)
"""Error: that of `torch.nn.functional.linear` on the dequantized weight, which is rounded once to the dtype of x."""
