"""The same numbers in other words: a quantized tensor in another scheme whose grid holds its values.

Owns: `expressed`. Codes are shifted, zero points become codes or offsets and offsets zero points, scales are repeated for finer groups or taken once for equal
ones, and stored in another type. No code is chosen anew: where the scheme has no room for the values, there is no answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from arrondi.formats import Scheme, scale_shape, tile_shape
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED

_LARGEST_ZERO: Final = 255
"""No format has a code beyond it."""


def expressed(q: QTensor, scheme: Scheme) -> QTensor | None:
    """A tensor in another scheme, every code meaning what it meant, but for the storage of scales and offsets.

    Args:
        q: a matrix.
        scheme: what it becomes.

    Returns:
        a QTensor whose values are those of `q`, up to the storage type of its scales and offsets; None: the scheme has no such.
    """
    if q.scheme == scheme:
        return q
    own = q.scheme
    if (own.table, own.apart) != (scheme.table, scheme.apart) or isinstance(scheme.scale, Scheme):
        return None
    if isinstance(scheme.offset, Scheme) or scheme.scale == "e8m0" != own.scale:
        return None
    if q.offset is not None and scheme.zero_point != "float":
        whole = _with_whole_zeros(q)
        return None if whole is None else expressed(whole, scheme)
    shift = _shift(q, scheme)
    if shift is None:
        return None
    # The shifted codes fit, so sums that wrap are right, and no wider type is needed.
    codes = (q.codes.view(torch.uint8) + shift % 256 if shift else q.codes.view(torch.uint8)).view(
        code_dtype(scheme.format)
    )
    regrouped = [_regrouped(q, part, scheme) for part in (q.real_scale, q.zero_point, q.real_offset)]
    scale, zero, offset = (None if part is None else part[0] for part in regrouped)
    if scale is None or any(part is not None and part[0] is None for part in regrouped):
        return None
    if not scheme.signed_scales and bool((scale < 0).any()):
        return None
    zero, offset = _zero(scale, zero, offset, shift, scheme)
    stored = _rounded(scale, scheme.scale)
    if not bool(torch.isfinite(stored).all()):
        return None
    if zero is not None and bool(((zero < scheme.format.qmin) | (zero > scheme.format.qmax)).any()):
        return None
    if offset is not None:
        offset = _rounded(offset, scheme.offset)
        if not bool(torch.isfinite(offset).all()):
            return None
    index = q.group_index if scale.shape == q.real_scale.shape else None
    if index is None and q.group_index is not None:
        return None
    return replace(q, codes=codes, scale=stored, zero_point=zero, offset=offset, scheme=scheme, group_index=index)


def _with_whole_zeros(q: QTensor) -> QTensor | None:
    """The same with zero points in place of offsets, where every offset is less the scale times a code; None: one is not."""
    scale, offset = q.real_scale, q.real_offset
    if q.scheme.format.kind != "integer" or isinstance(q.scheme.scale, Scheme) or offset is None:
        return None
    zero = torch.round(-offset / torch.where(scale == 0, 1, scale))
    if not torch.equal(-scale * zero, offset) or bool((zero.abs() > _LARGEST_ZERO).any()):
        return None
    scheme = replace(q.scheme, zero_point="integer", offset="float32")
    return replace(q, zero_point=zero.int(), offset=None, scheme=scheme)


def _shift(q: QTensor, scheme: Scheme) -> int | None:
    """What is added to every code; None where the format cannot hold the values."""
    own, other = q.scheme.format, scheme.format
    if own == other and q.scheme.zero_point == scheme.zero_point:
        return 0
    if own.kind != "integer" or other.kind != "integer":
        return None
    if scheme.zero_point == "none":
        low, high = (0, 0) if q.zero_point is None else (int(n) for n in torch.aminmax(q.zero_point))
        shift = -low if low == high else None
    else:
        shift = other.qmin - own.qmin
    if shift is None or not q.codes.numel():
        return shift
    low, high = (int(n) + shift for n in torch.aminmax(q.codes))
    return shift if other.qmin <= low and high <= other.qmax else None


def _zero(
    scale: torch.Tensor, zero: torch.Tensor | None, offset: torch.Tensor | None, shift: int, scheme: Scheme
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Zero points and offsets of codes that were shifted."""
    if scheme.zero_point == "none":
        return None, None
    moved = torch.full(scale.shape, shift, dtype=torch.int32) if zero is None else (zero + shift).int()
    if scheme.zero_point == "integer":
        return moved, None
    return None, (-scale * moved if offset is None else offset - scale * shift)


def _regrouped(q: QTensor, part: torch.Tensor | None, scheme: Scheme) -> tuple[torch.Tensor | None] | None:
    """One part of the grid for the tiles of another granularity; (None,) where tiles do not fit into each other or differ."""
    if part is None:
        return None
    shape = q.shape
    wanted, tile, own = (
        scale_shape(scheme.granularity, shape),
        tile_shape(scheme.granularity, shape),
        tile_shape(q.scheme.granularity, shape),
    )
    if wanted == tuple(part.shape):
        return (part,)
    if q.group_index is not None:
        return (None,)
    made = part
    for axis, (fine, coarse) in enumerate(zip(tile, own, strict=True)):
        if fine == coarse:
            continue
        if coarse % fine and fine % coarse and fine < shape[axis]:
            return (None,)
        at = torch.arange(wanted[axis]) * fine // coarse
        taken = made.index_select(axis, at)
        if fine > coarse:
            back = torch.arange(made.shape[axis]) * coarse // fine
            if not torch.equal(taken.index_select(axis, back), made):
                return (None,)
        made = taken
    return (made,)


def _rounded(values: torch.Tensor, storage: object) -> torch.Tensor:
    """Float32 numbers as they read back from their storage type."""
    return values if storage == "e8m0" else values.to(STORED[str(storage)]).float()
