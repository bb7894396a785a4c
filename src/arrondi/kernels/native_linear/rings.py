"""States of a trellis in the layout of the compiled kernels, and back; and the kernel that multiplies them.

Owns: `TRELLIS`, and `ring_rows`, rows of a table that are looked up. A slab of rows has one entry for every column: its codes and the sixteen bits before them, in which every state is a field
of bits, so that a few instructions give sixteen values wherever a ring begins; squares are kept whole; see native/kernels.h. A turned weight stays in its own
basis: the product turns x before and its results afterwards.

Source of the way states are decoded: Tseng, Sun, Hou, De Sa 2024, arXiv:2406.11235 (QTIP).
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.formats import Scheme
from arrondi.formats.trellis import RING
from arrondi.kernels.hadamard import hadamard
from arrondi.kernels.kernel import Kernel, Meta, Tensors
from arrondi.kernels.native_linear.coding import slab_shape
from arrondi.kernels.native_linear.operator import bind, linear
from arrondi.kernels.native_linear.prepack import (
    as_blocks,
    check_parts,
    facts_of,
    narrowest,
    parts_of,
    per_row,
    per_tile,
)
from arrondi.native import TYPES, available, native, operand, threads
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.trellis import refuse_shape
from arrondi.tensor.turned import Sides, sides_of

_MOST_COLUMNS: Final = 65536
_LARGEST: Final = 2**31 - 1


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    trellis = scheme.format.trellis
    if trellis is None:
        return f"It multiplies states of trellises, got {scheme.format}."
    if device.type != "cpu":
        return f"It runs on the CPU, got {device}."
    if not available():
        return "This installation has no compiled kernels, or ARRONDI_CPU=none leaves them alone."
    if dtype not in TYPES:
        return f"It takes float32, bfloat16 and float16 activations, got {dtype}."
    if trellis.function != "bytes" or trellis.ring == "tile" or trellis.rate > 4:
        return f"It takes sums of bytes along rows or squares with up to 4 bits a weight, got {scheme.format}."
    if len(shape) != 2 or not all(shape):
        return f"It multiplies by matrices (out, in) that are not empty, got shape {shape}."
    if shape[1] > _MOST_COLUMNS or shape[0] * shape[1] > _LARGEST:
        return f"It takes up to {_MOST_COLUMNS} columns and 2³¹ weights, got shape {shape}."
    return refuse_shape(shape, trellis)


def _prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    assert native is not None and q.scheme.format.trellis is not None
    (rows, columns), trellis = q.shape, q.scheme.format.trellis
    codes, squares = q.codes.contiguous(), trellis.ring == "square"
    packed = torch.empty(slab_shape(rows, columns, trellis.bits, squares), dtype=torch.uint8, device="cpu")
    native.pack_rings(
        rows, columns, *trellis.bits, 0 if squares else RING, operand("codes", codes, (rows, columns), torch.uint8),
        operand("packed codes", packed, packed.shape, torch.uint8), threads(),
    )  # fmt: skip
    tensors = {"codes": packed, "scale": as_blocks(narrowest(per_row(q.real_scale, q), q.scheme.scale), 1.0)}
    if q.scheme.turned is not None:
        sides = q.sides or sides_of(q.shape, q.scheme.turned)
        tensors |= {"row_side": sides.rows.float().clone(), "column_side": sides.columns.float().clone()}
    return tensors


def _unpack(tensors: Tensors, meta: Meta) -> QTensor:
    assert native is not None and meta.scheme.format.trellis is not None
    (rows, columns), trellis, turned = meta.shape, meta.scheme.format.trellis, meta.scheme.turned
    squares = trellis.ring == "square"
    packed, codes = tensors["codes"], torch.empty(meta.shape, dtype=torch.uint8, device="cpu")
    native.unpack_rings(
        rows, columns, *trellis.bits, 0 if squares else RING, operand("codes", codes, codes.shape, torch.uint8),
        operand("packed codes", packed, slab_shape(rows, columns, trellis.bits, squares), torch.uint8), threads(),
    )  # fmt: skip
    stored = turned is not None and turned.seed is None
    sides = Sides(tensors["row_side"].clone(), tensors["column_side"].clone()) if stored else None
    scale = per_tile(tensors["scale"], meta).float()
    return QTensor(codes, scale, None, None, meta.scheme, sides=sides)


def ring_rows(tensors: Tensors, meta: Meta, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the weight.

    Args:
        tensors, meta: of `TRELLIS`; rows are turned in blocks of up to 128.
        ids: int64 (n,), each a row of the weight.

    Returns:
        float32 (n, in).
    """
    assert native is not None
    facts, ids = facts_of(tensors, meta), ids.contiguous()
    _, _, (codes, scale, *_) = check_parts(parts_of(tensors), facts)
    rows = torch.empty(len(ids), facts.columns, dtype=torch.float32, device="cpu")
    at = operand("ids", ids, ids.shape, torch.int64), operand("rows", rows, rows.shape, torch.float32)
    native.ring_rows(list(facts), codes, scale, len(ids), *at, threads())
    if meta.scheme.turned is None:
        return rows
    if facts.column_run > 1:
        rows = hadamard(rows.reshape(-1, facts.column_run)).reshape(rows.shape)
    return rows.mul_(tensors["column_side"]).mul_(tensors["row_side"][ids, None])


TRELLIS: Final = Kernel("trellis", _refuse, _prepack, _unpack, linear, bind=bind)
"""Compiled for this CPU. Error: that of the digits of x (15 bits of the largest of 256 for bfloat16 and float16, 23 for float32) or of
float32 sums; values are integers and exact."""
