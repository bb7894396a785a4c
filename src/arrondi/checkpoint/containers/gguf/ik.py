"""Blocks of the types that only ik_llama.cpp has, as the numbers that they mean.

Owns: `IkType`, the table `IK_TYPES`, `decode_ik`, and `NAMED`, the types that are known by name alone. Their values are points of one of two tables
("K"), or what a hash makes of a state ("KT"), times a scale of a group and one of the row or of the block. Rows of some begin with
their scale.

Source: documentation and reference decoders of ik_llama.cpp (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

import torch

from arrondi.checkpoint.containers.gguf.planes import Plane, planes, read_planes

Decoded = tuple[torch.Tensor, torch.Tensor]
"""Scales (blocks, groups) and values (blocks, groups, numbers of a group)."""

_AT_ONCE: Final = 1 << 20
"""Numbers that are decoded at a time: states take eight bytes on the way."""
_TWO: Final = torch.tensor([[-31, -13, 1, 17], [-26, -8, 6, 22]])
_THREE: Final = torch.tensor([[-63, -40, -23, -10, 1, 13, 28, 47], [-59, -36, -19, -6, 5, 17, 32, 51]])
_FOUR: Final = torch.tensor([
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    [-123, -100, -79, -61, -45, -31, -18, -6, 5, 17, 29, 42, 57, 73, 93, 117],
])  # fmt: skip
_FIVE: Final = torch.tensor([
    [-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
     -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121],
    [-124, -112, -101, -90, -81, -72, -63, -55, -48, -41, -34, -28, -22, -16, -10, -4,
     1, 7, 13, 19, 25, 31, 38, 45, 53, 61, 70, 79, 89, 99, 111, 123],
])  # fmt: skip
_CUBIC: Final = torch.tensor([0.0011972, -0.11218, 6.2568, -127.0])
"""Values of six bits are a polynomial of the code, highest power first; those of the second table are one more."""
_PAIRS: Final = torch.tensor([[
    (-63, -23), (-63, 13), (-40, -63), (-40, -10), (-40, 13), (-40, 47), (-23, -40), (-23, -23), (-23, 1), (-23, 13), (-23, 28),
    (-10, -63), (-10, 1), (-10, 13), (-10, 47), (1, -23), (1, -10), (1, 1), (1, 13), (1, 28), (13, -40), (13, -23), (13, -10), (13, 1),
    (13, 13), (28, -63), (28, -23), (28, 1), (28, 28), (28, 47), (47, -23), (47, 13),
]])  # fmt: skip
_FACTOR, _FIRST, _BYTES = 0xCBAC1FED, 4096, 0x3F3F3F3F
"""Of the hash: a state is multiplied again and again, and four bytes of it are added up."""


@dataclass(frozen=True)
class IkType:
    """One type.

    Attributes:
        number: as ik_llama.cpp has it.
        size: bytes of a block.
        decode: what blocks (n, size) uint8 hold, but for the scale of the row or the block.
        head: bytes before the blocks of a row, its scale as float16 or float32; 0: every block begins with its own.
        elements: numbers of a block.
    """

    number: int
    size: int
    decode: Callable[[torch.Tensor], Decoded]
    head: int = 0
    elements: int = 256

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many numbers."""
        return self.head + columns // self.elements * self.size


def decode_ik(raw: torch.Tensor, name: str) -> torch.Tensor:
    """The numbers of rows of blocks.

    Args:
        raw: (rows, bytes of a row) uint8.
        name: of the type.

    Returns:
        (rows, columns) float32; a damaged scale may have made them NaN or infinite.
    """
    kind = IK_TYPES[name]
    blocks = (raw.shape[1] - kind.head) // kind.size
    made = torch.empty(len(raw), blocks * kind.elements)
    step = max(_AT_ONCE // max(made.shape[1], 1), 1)
    for some, row in zip(made.split(step), raw.split(step), strict=True):
        body = row[:, kind.head :].reshape(-1, kind.size)
        scale = _scale(row[:, : kind.head]).repeat_interleave(blocks, 0) if kind.head else _scale(body[:, :2])
        of_groups, values = kind.decode(body)
        some.copy_(((scale * of_groups)[..., None] * values).reshape(some.shape))
    return made


def _scale(stored: torch.Tensor) -> torch.Tensor:
    """(n, bytes) → (n, 1)."""
    return stored.contiguous().view(torch.float16 if stored.shape[1] == 2 else torch.float32).float()


def _less(number: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts["scale"].int() - number


def _odd(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (2 * parts["scale"].int() + 1) * (1 - 2 * parts["sign"].int())


def _even(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Seven bits of a byte whose last one chooses the table."""
    return 2 * parts["scale"].int() - 127


def _signed(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts["scale"].view(torch.int8).int()


def _grid(
    table: torch.Tensor,
    layout: tuple[Plane, ...],
    scales: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    blocks: torch.Tensor,
) -> Decoded:
    """Codes that point into one of the tables (choices, codes) or (choices, codes, numbers of a code)."""
    parts = _parts(blocks, layout)
    scale = scales(parts)
    codes = parts["codes"].unflatten(1, (scale.shape[1], -1)).long()
    choice = parts["choice"].long()[..., None] if "choice" in parts else torch.zeros_like(codes[..., :1])
    return scale, table[choice, codes].flatten(2)


def _parts(blocks: torch.Tensor, layout: tuple[Plane, ...]) -> dict[str, torch.Tensor]:
    return read_planes(blocks, layout, {plane.part: plane.length * plane.of for plane in layout})


def _six(layout: tuple[Plane, ...], blocks: torch.Tensor) -> Decoded:
    code, made = torch.arange(64, dtype=torch.float64), torch.zeros(64)
    for factor in _CUBIC:  # one rounding for product and sum, as where the library is compiled for multiply-add
        made = (made.double() * code + factor.double()).float()
    return _grid(torch.stack((made, made + 1)), layout, _signed, blocks)


def _shared_bits(blocks: torch.Tensor) -> Decoded:
    """IQ4_KSS: of sixteen bits of codes the lowest is one of the scale, and the others are told apart by their neighbours."""
    words = blocks.view(torch.int16).int().bitwise_and(0xFFFF).unflatten(1, (8, 8))
    stored = ((words & 1) << torch.arange(8)).sum(-1)
    words = words & 0xFFFE
    words = words ^ (words >> 1)
    low = torch.stack((words & 0xFF, words >> 8), -1).flatten(2)
    codes = torch.cat((low & 15, low >> 4), -1)
    return (stored & 254) - 127, _FOUR[(stored & 1)[..., None], codes]


def _hashed(states: torch.Tensor, length: int) -> torch.Tensor:
    """What states (…) mean: (…, length) whole numbers."""
    made = []
    for _ in range(length):
        states = (states * _FACTOR) & 0xFFFFFFFF
        some = states & _BYTES
        made.append((some & 255) + (some >> 8 & 255) + (some >> 16 & 255) + (some >> 24) - 126)
    return torch.stack(made, -1)


def _in_groups(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).unflatten(1, (8, 32))


_KT1: Final = (
    Plane("scale", 0, 8, 8, 0, 4), *(Plane("top", 0, 8, 1, 4 + i, 1, 0, i, 4) for i in range(4)),
    Plane("low", 8, 32, 32, 0, 8), *planes("high", 40, 16, 16, 4),
)  # fmt: skip


def _one_hashed(blocks: torch.Tensor) -> Decoded:
    parts = {name: part.long() for name, part in _parts(blocks, _KT1).items()}
    states = parts["low"] + (parts["high"] << 8) + (parts["top"] << 12) + _FIRST
    return _FOUR[0][parts["scale"]], _in_groups(_hashed(states, 8))


def _two_hashed(blocks: torch.Tensor) -> Decoded:
    scale = _parts(blocks, planes("scale", 0, 4, 4, 4))["scale"].long()
    return _FOUR[0][scale], _in_groups(_hashed(_words(blocks[:, 4:]) + _FIRST, 8))


def _three_hashed(blocks: torch.Tensor) -> Decoded:
    parts = _parts(blocks, (*planes("scale", 0, 4, 4, 4), *planes("sign", 68, 32, 32, 1)))
    sizes = _hashed(_words(blocks[:, 4:68]) + _FIRST, 8).abs().float()  # zeros have signs, too
    return parts["scale"].int(), _in_groups(sizes) * (1 - 2 * _in_groups(parts["sign"].int()))


def _four_hashed(blocks: torch.Tensor) -> Decoded:
    heads = blocks[:, :32].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    parts = _parts(blocks, (Plane("low", 32, 64, 64, 0, 8), *planes("high", 96, 32, 32, 4)))
    top = heads[..., None] >> (8 + 3 * torch.arange(8)) & 7
    states = parts["low"].long() + (parts["high"].long() << 8) + (top.flatten(1) << 12)
    first = ((heads & 1) << 15) + _FIRST
    values = _hashed(states.unflatten(1, (8, 8)) + first[..., None], 4)
    return ((heads & 255) >> 1) - 64, values.flatten(2)


def _words(stored: torch.Tensor) -> torch.Tensor:
    """Two bytes each."""
    return stored.contiguous().view(torch.int16).long() & 0xFFFF


def _tables(at: int, layout: tuple[Plane, ...], count: int = 16) -> tuple[Plane, ...]:
    """The planes, and the bits from a byte on that choose the table of each group."""
    return (*layout, *planes("choice", at, count // 8, 1, 1))


_BYTE: Final = (Plane("scale", 0, 8, 8, 1, 7), Plane("choice", 0, 8, 8, 0, 1))
"""A byte for each group of 32."""
_FINE: Final = (*planes("scale", 8, 8, 1, 4), *planes("scale", 4, 4, 1, 2, 4))
"""Six bits for each group of 16."""

IK_TYPES: Final[Mapping[str, IkType]] = MappingProxyType({
    "Q6_0": IkType(133, 26, partial(
        _grid, torch.arange(64)[None] - 32, (
            *planes("codes", 10, 16, 16, 4), *(Plane("codes", 2, 8, 8, bit, 2, 4, turn, 4) for bit, turn in ((0, 0), (4, 1), (2, 2), (6, 3))),
        ), lambda parts: torch.ones_like(parts["codes"][:, :1]).int(),
    ), elements=32),
    "IQ2_K": IkType(137, 76, partial(_grid, _TWO, _tables(2, (*planes("codes", 12, 64, 32, 2), *planes("scale", 4, 8, 1, 4))), partial(_less, 8))),
    "IQ3_K": IkType(138, 110, partial(_grid, _THREE, _tables(2, (
        *planes("codes", 14, 64, 32, 2), *planes("codes", 78, 32, 32, 1, 2), *planes("scale", 6, 8, 1, 4), *planes("sign", 4, 2, 1, 1),
    )), _odd)),
    "IQ4_K": IkType(139, 144, partial(_grid, _FOUR, _tables(2, (*planes("codes", 16, 128, 16, 4), *_FINE)), partial(_less, 32))),
    "IQ5_K": IkType(140, 176, partial(
        _grid, _FIVE, _tables(2, (*planes("codes", 16, 128, 32, 4), *planes("codes", 144, 32, 32, 1, 4), *_FINE)), partial(_less, 32),
    )),
    "IQ6_K": IkType(141, 212, partial(_six, _tables(2, (
        *planes("codes", 20, 128, 32, 4), *planes("codes", 148, 64, 32, 2, 4), Plane("scale", 4, 16, 16, 0, 8),
    )))),
    "IQ4_KS": IkType(144, 136, partial(_grid, _FOUR, (*planes("codes", 8, 128, 16, 4), *_BYTE), _even), head=4),
    "IQ2_KS": IkType(145, 70, partial(_grid, _TWO, _tables(0, (
        *planes("codes", 6, 64, 32, 2), *planes("scale", 2, 4, 1, 4), *planes("scale", 1, 1, 1, 1, 4),
    ), 8), partial(_less, 16)), head=2),
    "IQ4_KSS": IkType(146, 128, _shared_bits, head=4),
    "IQ5_KS": IkType(152, 168, partial(
        _grid, _FIVE, (*planes("codes", 8, 128, 32, 4), *planes("codes", 136, 32, 32, 1, 4), *_BYTE), _even,
    ), head=4),
    "IQ2_KT": IkType(153, 68, _two_hashed, head=4),
    "IQ3_KT": IkType(154, 100, _three_hashed, head=4),
    "IQ4_KT": IkType(155, 128, _four_hashed, head=4),
    "IQ3_KS": IkType(156, 102, partial(_grid, _THREE, _tables(1, (
        *planes("codes", 6, 64, 32, 2), *planes("codes", 70, 32, 32, 1, 2), *planes("scale", 2, 4, 4, 4), *planes("scale", 0, 1, 1, 1, 4),
    ), 8), partial(_less, 16)), head=2),
    "IQ2_KL": IkType(157, 86, partial(_grid, _PAIRS, (
        *planes("codes", 6, 64, 16, 4), *planes("codes", 70, 16, 16, 1, 4), *planes("scale", 2, 4, 4, 4), *planes("scale", 0, 2, 1, 2, 4),
    ), partial(_less, 32)), head=2),
    "IQ1_KT": IkType(158, 56, _one_hashed, head=4),
})  # fmt: skip
"""Every type that is read, by its name."""

NAMED: Final[Mapping[int, str]] = MappingProxyType({
    134: "IQ1_BN", 135: "IQ2_BN", 151: "Q8_KV", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4",
    213: "Q5_K_R4", 214: "Q6_K_R4", 217: "IQ2_XS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8",
    229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4",
    344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 353: "MXFP4_R8", 398: "Q8_KV_R8", 399: "Q8_K_R8",
})  # fmt: skip
"""Number → name of types that are not read: ternary ones without a scale of their own, and rows that were woven together for one machine."""
