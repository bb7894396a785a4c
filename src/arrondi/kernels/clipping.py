"""Codes of a byte with a clip, as LightSeq rounds: what lies beyond the clip is marked by one bit.

Owns: `clip_codes` (numbers → codes), `narrow` (sums of an integer product → codes), `widen` (codes → numbers) and `masked` (gradients of
what was not marked), each with a slow reference. Codes are in [-127, 127] and rounded half up, ⌊v + ½⌋, as the source has it; ties
are decided exactly.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from arrondi.errors import ShapeError
from arrondi.native import TYPES, available, native, operand, plain, threads

MOST: Final = 127

_TYPES: Final = (torch.float32, torch.bfloat16)
_SUMS: Final = 3
"""The extension's number for int32, beside those of `TYPES`."""


class Clipped(NamedTuple):
    """Codes, and which numbers lay beyond the clip.

    codes: (rows, columns) int8.
    beyond: (rows, ⌈columns / 8⌉) uint8, bit i of a byte for column 8 · byte + i; None where nobody asked.
    """

    codes: torch.Tensor
    beyond: torch.Tensor | None


def clip_codes(x: torch.Tensor, clip: torch.Tensor, *, unsigned: bool = False, marked: bool = False) -> Clipped:
    """clip(⌊127 x / clip + ½⌋, -127, 127); of a ReLU's output, clip(⌊254 x / clip - 127 + ½⌋, -127, 127).

    Args:
        x: (rows, columns), floating; computed in float32.
        clip: () float32, positive.
        unsigned: the second form, in which a code is worth (code + 127) · clip / 254. Numbers below zero count as zero, so it is the
            ReLU as well.
        marked: also say which |x| ≥ clip; of the second form, which x ≥ clip or x ≤ 0.

    Returns:
        See `Clipped`. A NaN becomes the lowest code and is not marked.
    """
    rows, columns = _shape(x)
    if not _compiled(x, *_TYPES):
        return clip_codes_reference(x, clip, unsigned=unsigned, marked=marked)
    clip = clip.detach().float()
    x = x.detach()
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        x = x.contiguous()
    found = _room(rows, columns, marked)
    factor, high = float((254 if unsigned else 127) / clip), float(clip)
    low, shift = (0.0, float(MOST)) if unsigned else (-high, 0.0)
    at = operand("x", x, (rows, columns), _TYPES, "rows")
    _clip(found, rows, columns, at, x.stride(0), TYPES[x.dtype], factor, shift, low, high)
    return found


def clip_codes_reference(
    x: torch.Tensor, clip: torch.Tensor, *, unsigned: bool = False, marked: bool = False
) -> Clipped:
    """The slow reference of `clip_codes`."""
    values, clip = x.detach().float(), clip.detach().float()
    there = values * ((254 if unsigned else 127) / clip)
    codes = half_up(there - MOST if unsigned else there)
    if not marked:
        return Clipped(codes, None)
    return Clipped(codes, _packed((values >= clip) | (values <= (0 if unsigned else -clip))))


def narrow(sums: torch.Tensor, factor: torch.Tensor, *, marked: bool = False) -> Clipped:
    """clip(⌊sums · factor + ½⌋, -127, 127): the sums of a product of codes as codes of a byte.

    Args:
        sums: (rows, columns) int32.
        factor: () float32, clip of the one side · clip of the other / (clip of the result · 127).
        marked: also say where |sums · factor| ≥ 127.
    """
    rows, columns = _shape(sums)
    if not _compiled(sums, torch.int32):
        return narrow_reference(sums, factor, marked=marked)
    sums, found = sums.contiguous(), _room(rows, columns, marked)
    at = operand("sums", sums, (rows, columns), torch.int32)
    _clip(found, rows, columns, at, columns, _SUMS, float(factor.detach()), 0.0, -float(MOST), float(MOST))
    return found


def narrow_reference(sums: torch.Tensor, factor: torch.Tensor, *, marked: bool = False) -> Clipped:
    """The slow reference of `narrow`."""
    there = sums.float() * factor.detach().float()
    return Clipped(half_up(there), _packed(there.abs() >= MOST) if marked else None)


def widen(codes: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """codes · row + bias.

    Args:
        codes: (rows, columns) int8.
        row: (rows,) float32.
        bias: (columns,) float32, or None.
        dtype: of the result, a floating type.
    """
    rows, columns = _shape(codes)
    if not _compiled(codes, torch.int8) or dtype not in _TYPES:
        return widen_reference(codes, row, bias, dtype)
    kept = (
        codes.contiguous(),
        row.detach().float().contiguous(),
        None if bias is None else bias.detach().float().contiguous(),
    )
    y = torch.empty((rows, columns), dtype=dtype)
    module: Any = native
    module.widen_codes(
        rows, columns, operand("codes", kept[0], (rows, columns), torch.int8), operand("row", kept[1], (rows,), torch.float32),
        operand("bias", kept[2], (columns,), torch.float32), y.data_ptr(), TYPES[dtype], threads(),
    )  # fmt: skip
    return y


def widen_reference(
    codes: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The slow reference of `widen`."""
    values = codes.float() * row.float()[:, None]
    return (values if bias is None else values + bias.float()).to(dtype)


def masked(
    slope: torch.Tensor, beyond: torch.Tensor, codes: torch.Tensor | None = None, *, unsigned: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A gradient where nothing is marked, and what a clip gets of the rest.

    Args:
        slope: (rows, columns), floating. What is not finite is not hidden by a mark.
        beyond: as in `Clipped`.
        codes: (rows, columns) int8; None: the clip gets nothing.
        unsigned: codes are of the second form, whose lower end is always zero.

    Returns:
        (rows, columns), in the type of slope; and (rows,) float32, of every row Σ slope · sign(code) of those that are marked, or None.
    """
    rows, columns = _shape(slope)
    if not _compiled(slope, torch.float32) or not beyond.is_cpu:
        return masked_reference(slope, beyond, codes, unsigned=unsigned)
    kept = slope.detach().contiguous(), beyond.contiguous(), None if codes is None else codes.contiguous()
    y = torch.empty((rows, columns), dtype=torch.float32)
    ends = None if codes is None else torch.empty(rows, dtype=torch.float32)
    module: Any = native
    module.mask_slopes(
        rows, columns, operand("slope", kept[0], (rows, columns), torch.float32),
        operand("marks", kept[1], (rows, -(-columns // 8)), torch.uint8), operand("codes", kept[2], (rows, columns), torch.int8),
        unsigned, y.data_ptr(), 0 if ends is None else ends.data_ptr(), threads(),
    )  # fmt: skip
    return y, ends


def masked_reference(
    slope: torch.Tensor, beyond: torch.Tensor, codes: torch.Tensor | None = None, *, unsigned: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slow reference of `masked`."""
    marked = marks(beyond, slope.shape[1])
    if codes is None:
        return slope * ~marked, None
    side = codes.sign() * marked
    return slope * ~marked, (slope.float() * (side.clamp_min(0) if unsigned else side)).sum(1)


def half_up(values: torch.Tensor) -> torch.Tensor:
    """clip(⌊values + ½⌋, -127, 127) as int8, where values + ½ is not rounded before it is cut; NaN is the lowest."""
    values = values.nan_to_num(nan=-MOST).clamp(-MOST, MOST)
    nearest = values.round()
    return (nearest + (values - nearest >= 0.5)).to(torch.int8)


def marks(beyond: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, columns) bool from the bits of `Clipped`."""
    places = torch.arange(8, dtype=torch.uint8, device=beyond.device)
    bits = (beyond[..., None] >> places) & 1
    return bits.flatten(1)[:, :columns].bool()


def _clip(found: Clipped, rows: int, columns: int, *numbers: Any) -> None:
    codes, beyond = found
    module: Any = native
    module.clip_codes(rows, columns, *numbers, codes.data_ptr(), 0 if beyond is None else beyond.data_ptr(), threads())


def _room(rows: int, columns: int, marked: bool) -> Clipped:
    beyond = torch.empty((rows, -(-columns // 8)), dtype=torch.uint8) if marked else None
    return Clipped(torch.empty((rows, columns), dtype=torch.int8), beyond)


def _packed(beyond: torch.Tensor) -> torch.Tensor:
    """Eight columns in a byte."""
    rows, columns = beyond.shape
    whole = torch.nn.functional.pad(beyond.to(torch.uint8), (0, -columns % 8)).reshape(rows, -(-columns // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=beyond.device)
    return (whole << places).sum(-1, dtype=torch.uint8)


def _compiled(x: torch.Tensor, *types: torch.dtype) -> bool:
    return plain(x) and x.dtype in types and available() and hasattr(native, "clip_codes")


def _shape(x: torch.Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ShapeError(f"A matrix (rows, columns) is rounded, got shape {tuple(x.shape)}. Reshape it first.")
    return int(x.shape[0]), int(x.shape[1])


__all__ = [
    "MOST",
    "Clipped",
    "clip_codes",
    "clip_codes_reference",
    "half_up",
    "marks",
    "masked",
    "masked_reference",
    "narrow",
    "narrow_reference",
    "widen",
    "widen_reference",
]
