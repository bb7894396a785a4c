"""Codes of a byte with a clip, as LightSeq rounds: what lies beyond the clip is marked by one bit.

Owns: `clip_codes` (numbers → codes), `narrow` (sums of an integer product → codes) and `marks` (the bits as numbers), each with a slow
reference. Codes are in [-127, 127] and rounded half up, ⌊v + ½⌋, as the source has it; ties are decided exactly.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from arrondi.errors import ShapeError

MOST: Final = 127


class Clipped(NamedTuple):
    """Codes, and which numbers lay beyond the clip.

    codes: (rows, columns) int8.
    beyond: (rows, ⌈columns / 8⌉) uint8, bit i of a byte for column 8 · byte + i; None where nobody asked.
    """

    codes: torch.Tensor
    beyond: torch.Tensor | None


def clip_codes(x: torch.Tensor, clip: torch.Tensor, *, unsigned: bool = False, marked: bool = False) -> Clipped:
    """clip(⌊127 x / clip + ½⌋, -127, 127); of numbers that are never negative, clip(⌊254 x / clip - 127 + ½⌋, -127, 127).

    Args:
        x: (rows, columns), floating; computed in float32.
        clip: () float32, positive.
        unsigned: the second form, in which a code is worth (code + 127) · clip / 254.
        marked: also say which |x| ≥ clip; of the second form, which x ≥ clip or x < 0.

    Returns:
        See `Clipped`. A NaN becomes the lowest code and is not marked.
    """
    _matrix(x)
    return clip_codes_reference(x, clip, unsigned=unsigned, marked=marked)


def clip_codes_reference(
    x: torch.Tensor, clip: torch.Tensor, *, unsigned: bool = False, marked: bool = False
) -> Clipped:
    """The slow reference of `clip_codes`."""
    values, clip = x.detach().float(), clip.detach().float()
    there = values * ((254 if unsigned else 127) / clip)
    codes = half_up(there - MOST if unsigned else there)
    if not marked:
        return Clipped(codes, None)
    beyond = (values >= clip) | (values < 0) if unsigned else values.abs() >= clip
    return Clipped(codes, _packed(beyond))


def narrow(sums: torch.Tensor, factor: torch.Tensor, *, marked: bool = False) -> Clipped:
    """clip(⌊sums · factor + ½⌋, -127, 127): the sums of a product of codes as codes of a byte.

    Args:
        sums: (rows, columns) int32.
        factor: () float32, clip of the one side · clip of the other / (clip of the result · 127).
        marked: also say where |sums · factor| ≥ 127.
    """
    _matrix(sums)
    return narrow_reference(sums, factor, marked=marked)


def narrow_reference(sums: torch.Tensor, factor: torch.Tensor, *, marked: bool = False) -> Clipped:
    """The slow reference of `narrow`."""
    there = sums.float() * factor.detach().float()
    return Clipped(half_up(there), _packed(there.abs() >= MOST) if marked else None)


def half_up(values: torch.Tensor) -> torch.Tensor:
    """clip(⌊values + ½⌋, -127, 127) as int8, where values + ½ is not rounded before it is cut; NaN is the lowest."""
    values = values.nan_to_num(nan=-MOST).clamp(-MOST, MOST)
    nearest = values.round()
    return (nearest + (values - nearest >= 0.5)).to(torch.int8)


def marks(beyond: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, columns) bool from the bits of `Clipped`."""
    places = torch.arange(8, dtype=torch.uint8, device=beyond.device)
    bits = (beyond[..., None] >> places) & 1
    return bits.reshape(len(beyond), -1)[:, :columns].bool()


def _packed(beyond: torch.Tensor) -> torch.Tensor:
    """Eight columns in a byte."""
    rows, columns = beyond.shape
    whole = torch.nn.functional.pad(beyond.to(torch.uint8), (0, -columns % 8)).reshape(rows, -(-columns // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=beyond.device)
    return (whole << places).sum(-1, dtype=torch.uint8)


def _matrix(x: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ShapeError(f"A matrix (rows, columns) is rounded, got shape {tuple(x.shape)}. Reshape it first.")


__all__ = ["MOST", "Clipped", "clip_codes", "clip_codes_reference", "half_up", "marks", "narrow", "narrow_reference"]
