"""Rows of quantized matrices: `rows_of`, `stack_rows`, `split_rows`, `pick_rows`; and `rowwise` and `separable`, schemes of which
every row, or every matrix, is on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from arrondi.errors import ShapeError
from arrondi.formats import PerChannel, PerGroup, Scheme, tile_shape
from arrondi.formats.trellis import RING
from arrondi.tensor.apart import stack_kept
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.trellis import TILE
from arrondi.tensor.turned import Sides, block_of


def rowwise(scheme: Scheme) -> bool:
    """Whether each row of a matrix is rounded by itself: those of a trellis are on rings."""
    return separable(scheme) and scheme.apart is None and scheme.format.trellis is None


def separable(scheme: Scheme) -> bool:
    """Whether a matrix shares nothing with one that lies below it in the same tensor; of a trellis, one of whole rings."""
    shared = (scheme.apart is not None and scheme.apart.what == "elements") or (
        scheme.table is not None and scheme.table.rows != 1
    )
    rows = scheme.granularity == PerChannel() or (
        isinstance(scheme.granularity, PerGroup) and _along_rows(scheme.scale) and _along_rows(scheme.offset)
    )
    return rows and not shared


def _along_rows(storage: str | Scheme) -> bool:
    """Whether scales or offsets share nothing with those of other rows: plain, or in groups along a row."""
    return not isinstance(storage, Scheme) or (isinstance(storage.granularity, PerGroup) and separable(storage))


def rows_of(q: QTensor, start: int, count: int) -> QTensor:
    """Some rows of a matrix, cut where a tile ends; a scale for all rows goes with every part.

    Raises:
        ShapeError: of a trellis, rows that are not on rings, or turned in blocks, of their own.
    """
    if not _whole_rings(q, start, count):
        raise ShapeError(
            f"Rows {start} … {start + count - 1} of {q.shape[0]} on a trellis cannot be cut out: their values depend on rows around them. "
            "Quantize the parts of this matrix one by one, or in another format."
        )
    tile = tile_shape(q.scheme.granularity, q.shape)
    height = tile[0]
    if len(tile) < len(q.shape) and (start, count) != (0, q.shape[0]):
        raise ShapeError(
            f"Rows of {q.shape} cannot be cut out where blocks of {height} run across them. Keep the tensor whole, or use groups."
        )
    whole = height == q.shape[0] or len(tile) < len(q.shape)
    first, last = (0, 1) if whole else (start // height, -(-(start + count) // height))

    def cut(part: Any) -> Any:
        if isinstance(part, QTensor):
            return part if whole else rows_of(part, first, last - first)
        return part if part is None or whole else part[first:last]

    codes = q.codes[start : start + count]
    table = q.table
    if table is not None and q.scheme.table is not None and q.scheme.table.rows:
        table = table[start // q.scheme.table.rows : -(-(start + count) // q.scheme.table.rows)]
    kept = None if q.apart is None else q.apart.rows(start, count, q.shape)
    scheme = q.scheme
    if kept is not None and scheme.apart is not None and not kept.columns:
        few = kept.index.numel()
        scheme, kept = replace(scheme, apart=replace(scheme.apart, count=few) if few else None), kept if few else None
    sides = None if q.sides is None else Sides(q.sides.rows[start : start + count], q.sides.columns)
    return QTensor(codes, cut(q.scale), cut(q.zero_point), cut(q.offset), scheme, q.group_index, table, kept, sides)


def _whole_rings(q: QTensor, start: int, count: int) -> bool:
    """Whether rows mean the same without the others: one ring after the other, in the blocks in which the whole is turned."""
    trellis, turned, rows = q.scheme.format.trellis, q.scheme.turned, q.shape[0]
    if trellis is None or count == rows:
        return True
    tall = RING if trellis.ring == "rows" else TILE
    last = (
        rows // tall * tall if rows % tall == 0 else max(rows // tall - 1, 0) * tall
    )  # where the longer last ring begins
    rings = (
        start % tall == 0 and start <= last and (start + count == rows or (count % tall == 0 and start + count <= last))
    )
    if turned is None:
        return rings
    block = block_of(rows, turned)
    return rings and start % block == 0 and block_of(count, turned) == block


def stack_rows(parts: Sequence[QTensor]) -> QTensor:
    """Matrices below each other as one; every scale belongs to rows of one part."""
    if len(parts) == 1:
        return parts[0]

    def joined(some: list[Any]) -> Any:
        if isinstance(some[0], QTensor):
            return stack_rows(some)
        return None if some[0] is None else torch.cat(some)

    scale, zero, offset = (
        joined(list(p)) for p in zip(*((q.scale, q.zero_point, q.offset) for q in parts), strict=True)
    )
    table = joined([q.table for q in parts])
    kept = stack_kept([q.apart for q in parts], [q.shape for q in parts])
    codes = torch.cat([p.codes for p in parts])
    return QTensor(codes, scale, zero, offset, parts[0].scheme, parts[0].group_index, table, kept)


def split_rows(q: QTensor, sizes: list[int]) -> list[QTensor]:
    """The inverse of `stack_rows`, for schemes whose rows are rounded one by one."""
    if len(sizes) == 1:
        return [q]

    def cut(part: torch.Tensor | QTensor | None) -> list[Any]:
        if part is None:
            return [None] * len(sizes)
        return split_rows(part, sizes) if isinstance(part, QTensor) else list(part.split(sizes))

    parts = zip(q.codes.split(sizes), cut(q.scale), cut(q.zero_point), cut(q.offset), cut(q.table), strict=True)
    return [QTensor(c, s, z, o, q.scheme, q.group_index, t) for c, s, z, o, t in parts]


def pick_rows(new: QTensor, old: QTensor, better: torch.Tensor) -> QTensor:
    """Every row (m,) from one tensor or the other, for schemes whose rows are rounded one by one; tables stay those of `old`."""
    pick = better.unsqueeze(1)

    def part(a: Any, b: Any) -> Any:
        return pick_rows(a, b, better) if isinstance(a, QTensor) else None if a is None else torch.where(pick, a, b)

    scale, zero, offset = part(new.scale, old.scale), part(new.zero_point, old.zero_point), part(new.offset, old.offset)
    return replace(old, codes=torch.where(pick, new.codes, old.codes), scale=scale, zero_point=zero, offset=offset)
