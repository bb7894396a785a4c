"""Codes as the GPU reads them, and back.

Owns: `PLANES`, `lanes_of`, `pack_words`, `unpack_words`. A code of b bits is cut into planes of 8, 4, 2 and 1 bits, the lowest first. A
chunk of a row is 32 · L columns, L lanes: lane l and number j stand for column j · L + l of the chunk. A word holds, of one lane and one
plane, as many codes with consecutive j as fit in 32 bits; words lie as (row, chunk, word, lane). Neighbouring lanes read neighbouring
words and neighbouring x, whatever the width, and columns of one j share a scale where groups are a multiple of L.
"""

from __future__ import annotations

from typing import Final

import torch

PLANES: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code → widths of its planes, that of the lowest bits first."""

NUMBERS: Final = 32
"""Columns of a chunk in one lane."""

_PACKED: Final = 1 << 22
"""Codes packed at a time, which takes some twenty bytes for each."""


def lanes_of(columns: int, width: int) -> int:
    """How many lanes chunks of a row have: 32, or 16 where groups or the padding of the row ask for it.

    Args:
        columns: of the weight.
        width: columns under one scale.
    """
    wide = 32 * NUMBERS
    return 32 if (width % 32 == 0 or width >= columns) and columns % wide in (0, *range(wide // 2 + 1, wide)) else 16


def pack_words(codes: torch.Tensor, bits: int, lanes: int) -> torch.Tensor:
    """Codes (rows, columns) uint8 → int32 (rows, chunks, bits, lanes); missing columns are zero."""
    step = max(_PACKED // max(codes.shape[1], 1), 1)
    return torch.cat([_packed(part, bits, lanes) for part in codes.split(step)])


def _packed(codes: torch.Tensor, bits: int, lanes: int) -> torch.Tensor:
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (NUMBERS * lanes)))
    numbers = codes.reshape(len(codes), -1, NUMBERS, lanes)
    found, lowest = [], 0
    for width in PLANES[bits]:
        plane = ((numbers >> lowest) & (2**width - 1)).unflatten(2, (width, NUMBERS // width)).to(torch.int64)
        shifts = torch.arange(0, 32, width, device=codes.device)[:, None]
        words = (plane << shifts).sum(dim=3)
        found.append(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32))
        lowest += width
    return torch.cat(found, dim=2)


def unpack_words(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_words`: (rows, columns) uint8."""
    _, chunks, _, lanes = words.shape
    step = max(_PACKED // max(chunks * NUMBERS * lanes, 1), 1)
    return torch.cat([_unpacked(part, bits) for part in words.split(step)])[:, :columns].contiguous()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    codes = None
    lowest = 0
    for width, plane in zip(PLANES[bits], words.split(PLANES[bits], dim=2), strict=True):
        shifts = torch.arange(0, 32, width, device=words.device, dtype=torch.int32)[:, None]
        part = (((plane.unsqueeze(3) >> shifts) & (2**width - 1)) << lowest).flatten(2, 3).to(torch.uint8)
        codes = part if codes is None else codes | part
        lowest += width
    assert codes is not None
    return codes.flatten(1)
