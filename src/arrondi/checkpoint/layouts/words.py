"""Codes in 32-bit words, as GPTQ and AWQ lay them out.

Owns: `pack_down` and `unpack_down` (a bit stream down each column), `pack_across` and `unpack_across` (along each row), and the order in
which AWQ puts eight codes into a word (`INTERLEAVED`).
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.layouts.checks import check_padding
from arrondi.tensor.packing import pack, packed_width, unpack

BYTES: Final = 4
INTERLEAVED: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns is the first, second, … nibble of AWQ's words."""


def words(codes: int, bits: int) -> int:
    """Words that hold so many codes.

    >>> words(64, 4), words(64, 3), words(40, 3)
    (8, 6, 4)
    """
    return packed_width(codes, bits, BYTES) // BYTES


def pack_across(codes: torch.Tensor, bits: int, lowest: int = 0) -> torch.Tensor:
    """(m, n) codes → (m, words) int32, the first code in the lowest bits of each row."""
    return pack(codes.contiguous(), bits, word_bytes=BYTES, lowest=lowest).view(torch.int32)


def unpack_across(name: str, packed: torch.Tensor, bits: int, columns: int, lowest: int = 0) -> torch.Tensor:
    """The inverse: (m, columns) uint8, or int8 where `lowest` is negative.

    Raises:
        FileFormatError: bits are set after the last code.
    """
    # Not `contiguous`, which leaves a matrix of one row or column with the strides that it had.
    stream = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    check_padding(name, stream, bits, columns)
    return unpack(stream, bits, columns, lowest=lowest)


def pack_down(codes: torch.Tensor, bits: int, lowest: int = 0) -> torch.Tensor:
    """(m, n) codes → (words, m) int32: row i becomes column i, the first code in the lowest bits."""
    return pack_across(codes, bits, lowest).T.contiguous()


def unpack_down(name: str, packed: torch.Tensor, bits: int, columns: int, lowest: int = 0) -> torch.Tensor:
    """The inverse: (m, columns) uint8, or int8 where `lowest` is negative."""
    return unpack_across(name, packed.T, bits, columns, lowest)


def interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Columns in the order in which AWQ's words hold them."""
    return codes.unflatten(-1, (-1, 8))[..., list(INTERLEAVED)].flatten(-2)


def straightened(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `interleaved`."""
    back = [INTERLEAVED.index(i) for i in range(8)]
    return codes.unflatten(-1, (-1, 8))[..., back].flatten(-2)
