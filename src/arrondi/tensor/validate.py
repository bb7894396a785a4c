"""Whether the numbers of a QTensor can be what they claim: for readers, who get them from a file.

Owns: `validate` and `complaint`. A QTensor checks shapes and types when it is made; this looks at every number once.
"""

from __future__ import annotations

import math

import torch

from arrondi.errors import FileFormatError
from arrondi.formats import Format
from arrondi.tensor.apart import wrong_numbers
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tables import wrong_table
from arrondi.tensor.turned import wrong_sides


def validate(q: QTensor, name: str) -> QTensor:
    """`q` itself, if every code, scale, zero point and offset is one that its scheme allows.

    Raises:
        FileFormatError: one is not; the message has `name`, the number, and where it is.
    """
    reason = complaint(q)
    if reason is not None:
        raise FileFormatError(f"{name}: {reason}. The file is damaged, or its config describes another one.")
    return q


def complaint(q: QTensor) -> str | None:
    """What is wrong with the numbers of a QTensor, None if nothing is."""
    scheme = q.scheme
    if isinstance(q.scale, QTensor) and (reason := complaint(q.scale)):
        return f"scale: {reason}"
    if isinstance(q.offset, QTensor) and (reason := complaint(q.offset)):
        return f"offset: {reason}"
    return (
        _wrong_codes(q.codes, scheme.format)
        or _wrong_scales(q.real_scale, scheme.signed_scales, scheme.scale == "e8m0")
        or _wrong_zeros(q.zero_point, scheme.format)
        or _not_finite("offset", q.real_offset)
        or _wrong_groups(q)
        or wrong_table(q.table)
        or wrong_numbers(q.apart, q.shape)
        or wrong_sides(q.sides)
    )


def _wrong_codes(codes: torch.Tensor, format: Format) -> str | None:
    if not codes.numel():
        return None
    low, high = (int(end) for end in torch.aminmax(codes))
    if low < format.qmin or high > format.qmax:
        worst = low if low < format.qmin else high
        return f"code {worst}{_place(codes == worst)} is outside {format.qmin} … {format.qmax} of {format}"
    bad = [c for c, v in enumerate(format.values or ()) if not math.isfinite(v)]
    if bad:
        found = torch.isin(codes, codes.new_tensor(bad))
        if bool(found.any()):
            return f"a code{_place(found)} means NaN or infinity in {format}"
    return None


def _wrong_scales(scale: torch.Tensor, signed: bool, powers: bool) -> str | None:
    if (reason := _not_finite("scale", scale)) is not None:
        return reason
    if not signed and bool((scale < 0).any()):
        return (
            f"scale {float(scale.min()):.6g}{_place(scale == scale.min())} is negative, which the scheme does not allow"
        )
    if powers and scale.numel() and bool((torch.frexp(scale).mantissa != 0.5).any()):
        wrong = torch.frexp(scale).mantissa != 0.5
        return f"scale {float(scale[wrong][0]):.6g}{_place(wrong)} is no power of two"
    return None


def _wrong_zeros(zero: torch.Tensor | None, format: Format) -> str | None:
    if zero is None or not zero.numel():
        return None
    low, high = (int(end) for end in torch.aminmax(zero))
    if low >= format.qmin and high <= format.qmax:
        return None
    worst = low if low < format.qmin else high
    return f"zero point {worst}{_place(zero == worst)} is outside {format.qmin} … {format.qmax} of {format}"


def _not_finite(what: str, part: torch.Tensor | None) -> str | None:
    if part is None or bool(torch.isfinite(part).all()):
        return None
    return f"{what} {float(part[~torch.isfinite(part)][0])}{_place(~torch.isfinite(part))}"


def _wrong_groups(q: QTensor) -> str | None:
    index = q.group_index
    if index is None:
        return None
    if index.shape != q.codes.shape[-1:]:
        return f"group index of shape {tuple(index.shape)} for {q.codes.shape[-1]} columns"
    groups = q.real_scale.shape[-1]
    if bool(((index < 0) | (index >= groups)).any()):
        worst = int(index.min()) if int(index.min()) < 0 else int(index.max())
        return f"group index {worst} is outside 0 … {groups - 1}"
    return None


def _place(where: torch.Tensor) -> str:
    first = torch.nonzero(where)[0].tolist()
    return f" at {first}" if first else ""
