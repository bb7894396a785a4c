"""Rows of quantized matrices: `rows_of`, `stack_rows`, `split_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from arrondi.formats import tile_shape
from arrondi.tensor.qtensor import QTensor


def rows_of(q: QTensor, start: int, count: int) -> QTensor:
    """Some rows of a matrix, cut where a tile ends; a scale for all rows goes with every part."""
    height = tile_shape(q.scheme.granularity, q.shape)[0]
    first, last = (0, None) if height == q.shape[0] else (start // height, -(-(start + count) // height))
    zero, offset = (None if p is None else p[first:last] for p in (q.zero_point, q.offset))
    if isinstance(q.scale, QTensor):
        rows = q.scale.shape[0] if last is None else last - first
        scale: torch.Tensor | QTensor = rows_of(q.scale, first, rows)
    else:
        scale = q.scale[first:last]
    return QTensor(q.codes[start : start + count], scale, zero, offset, q.scheme, q.group_index)


def stack_rows(parts: Sequence[QTensor]) -> QTensor:
    """Matrices below each other as one; every scale belongs to rows of one part."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    scale: torch.Tensor | QTensor
    if isinstance(first.scale, QTensor):
        scale = stack_rows([p.scale for p in parts if isinstance(p.scale, QTensor)])
    else:
        scale = torch.cat([p.real_scale for p in parts])
    zero = None if first.zero_point is None else torch.cat([p.zero_point for p in parts if p.zero_point is not None])
    offset = None if first.offset is None else torch.cat([p.offset for p in parts if p.offset is not None])
    return QTensor(torch.cat([p.codes for p in parts]), scale, zero, offset, first.scheme, first.group_index)


def split_rows(q: QTensor, sizes: list[int]) -> list[QTensor]:
    """The inverse of `stack_rows`, for schemes whose rows are rounded one by one."""
    if len(sizes) == 1:
        return [q]

    def cut(part: torch.Tensor | QTensor | None) -> list[Any]:
        if part is None:
            return [None] * len(sizes)
        return split_rows(part, sizes) if isinstance(part, QTensor) else list(part.split(sizes))

    parts = zip(q.codes.split(sizes), cut(q.scale), cut(q.zero_point), cut(q.offset), strict=True)
    return [QTensor(c, s, z, o, q.scheme, q.group_index) for c, s, z, o in parts]
