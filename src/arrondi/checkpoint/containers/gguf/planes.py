"""Where the bits of small numbers lie in the bytes of a block.

Owns: `Plane`, one run of bytes from each of which the same bits belong to one number of a part (codes, or codes of scales); `planes`, the
usual arrangement of several; `read_planes` and `write_planes`. A part is uint8, (blocks, numbers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


class Plane(NamedTuple):
    """Bits `bit … bit + bits - 1` of each byte are bits `shift …` of one number.

    Attributes:
        part: its name.
        at, length: the bytes of the block.
        span: bytes side by side whose numbers lie side by side.
        bit, bits, shift: as above.
        turn, of: a chunk of `span` bytes fills run `turn` of `of` runs of `span` numbers; the next chunk those after all of these.
    """

    part: str
    at: int
    length: int
    span: int
    bit: int
    bits: int
    shift: int = 0
    turn: int = 0
    of: int = 1


def planes(part: str, at: int, length: int, span: int, bits: int, shift: int = 0) -> tuple[Plane, ...]:
    """All bits of some bytes: in each chunk of `span` bytes the lowest ones hold the first `span` numbers, and so on upwards."""
    of = 8 // bits
    return tuple(Plane(part, at, length, span, turn * bits, bits, shift, turn, of) for turn in range(of))


def read_planes(blocks: torch.Tensor, layout: Sequence[Plane], sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The parts of some blocks.

    Args:
        blocks: (n, bytes) uint8.
        layout: planes; of those that share numbers, the one with their lowest bits comes first.
        sizes: numbers of each part in a block.
    """
    parts = {name: blocks.new_empty((len(blocks), size)) for name, size in sizes.items()}
    for plane in layout:
        there = _numbers(parts[plane.part], plane)
        stored = _bytes(blocks, plane)
        if plane.bits == 8:
            there.copy_(stored)
        elif plane.shift:
            there |= _moved(stored & (2**plane.bits - 1) << plane.bit, plane.shift - plane.bit)
        elif plane.bit + plane.bits == 8:
            torch.bitwise_right_shift(stored, plane.bit, out=there)
        else:
            torch.bitwise_and(stored, (2**plane.bits - 1) << plane.bit, out=there)
            _moved(there, -plane.bit)
    return parts


def write_planes(blocks: torch.Tensor, layout: Sequence[Plane], parts: Mapping[str, torch.Tensor]) -> None:
    """Put the parts into blocks (n, bytes) uint8 whose bytes are zero."""
    for plane in layout:
        numbers = _numbers(parts[plane.part], plane)
        picked = numbers & (2**plane.bits - 1) << plane.shift
        _bytes(blocks, plane).bitwise_or_(_moved(picked, plane.bit - plane.shift))


def _bytes(blocks: torch.Tensor, plane: Plane) -> torch.Tensor:
    """(n, chunks, span)."""
    return blocks[:, plane.at : plane.at + plane.length].unflatten(1, (-1, plane.span))


def _numbers(part: torch.Tensor, plane: Plane) -> torch.Tensor:
    """(n, chunks, span), where the numbers of a plane go."""
    return part.unflatten(1, (-1, plane.of, plane.span))[:, :, plane.turn]


def _moved(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted in place."""
    return bits.bitwise_left_shift_(by) if by > 0 else bits.bitwise_right_shift_(-by) if by < 0 else bits
