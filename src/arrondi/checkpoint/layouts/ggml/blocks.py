"""The block types of ggml: what each is called, how large it is, and where its numbers lie.

Owns: `BlockType`, the table `BLOCKS` and `type_of`. All numbers are little-endian; float16 numbers are called d (the scale, or the scale of
the scales) and m (the offset, or less the scale of the offsets).

Source: documentation and reference decoder of ggml (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint.containers.gguf.planes import Plane, planes
from arrondi.formats import PRESETS, Scheme


@dataclass(frozen=True)
class BlockType:
    """One type of blocks.

    Attributes:
        name, number: as ggml has them.
        elements, size: of a block, and its bytes.
        scheme: what its numbers mean; None where its values are decoded by gguf's own package, which only reads.
        planes: where codes, and codes of scales and offsets, lie.
        halves: name of a float16 number → its first byte.
        trits: codes are packed in base 3.
        written: blocks of it are made here.
    """

    name: str
    number: int
    elements: int
    size: int
    scheme: Scheme | None = None
    planes: tuple[Plane, ...] = ()
    halves: tuple[tuple[str, int], ...] = ()
    trits: bool = False
    written: bool = True


def _scheme(name: str) -> Scheme:
    return PRESETS[name].weights


def _two_bits(part: str, at: int, count: int, shift: int = 0) -> tuple[Plane, ...]:
    return planes(part, at, count, 32, 2, shift)


_SIX_BITS: Final = (
    *(Plane(part, at, 4, 4, 0, 6, 0, 0, 2) for part, at in (("scale", 4), ("offset", 8))),
    *(Plane(part, 12, 4, 4, bit, 4, 0, 1, 2) for part, bit in (("scale", 0), ("offset", 4))),
    *(Plane(part, at, 4, 4, 6, 2, 4, 1, 2) for part, at in (("scale", 4), ("offset", 8))),
)
"""Eight scales and offsets of 6 bits in 12 bytes: four of each whole, and above them the upper bits of the other four."""

_D0: Final = (("d", 0),)
_DM: Final = (("d", 0), ("m", 2))

_TABLE: Final = (
    BlockType("Q4_0", 2, 32, 18, _scheme("Q4_0"), planes("codes", 2, 16, 16, 4), _D0),
    BlockType("Q4_1", 3, 32, 20, _scheme("Q4_1"), planes("codes", 4, 16, 16, 4), _DM),
    BlockType("Q5_0", 6, 32, 22, _scheme("Q5_0"), (*planes("codes", 6, 16, 16, 4), *planes("codes", 2, 4, 1, 1, 4)), _D0),
    BlockType("Q5_1", 7, 32, 24, _scheme("Q5_1"), (*planes("codes", 8, 16, 16, 4), *planes("codes", 4, 4, 1, 1, 4)), _DM),
    BlockType("Q8_0", 8, 32, 34, _scheme("Q8_0"), planes("codes", 2, 32, 32, 8), _D0),
    BlockType(
        "Q2_K", 10, 256, 84, _scheme("Q2_K"),
        (*_two_bits("codes", 16, 64), Plane("scale", 0, 16, 16, 0, 4), Plane("offset", 0, 16, 16, 4, 4)), (("d", 80), ("m", 82)),
    ),
    BlockType(
        "Q3_K", 11, 256, 110, _scheme("Q3_K"),
        (*_two_bits("codes", 32, 64), *planes("codes", 0, 32, 32, 1, 2), *planes("scale", 96, 8, 8, 4), *planes("scale", 104, 4, 4, 2, 4)),
        (("d", 108),),
    ),
    BlockType("Q4_K", 12, 256, 144, _scheme("Q4_K"), (*planes("codes", 16, 128, 32, 4), *_SIX_BITS), _DM),
    BlockType(
        "Q5_K", 13, 256, 176, _scheme("Q5_K"),
        (*planes("codes", 48, 128, 32, 4), *planes("codes", 16, 32, 32, 1, 4), *_SIX_BITS), _DM,
    ),
    BlockType(
        "Q6_K", 14, 256, 210, _scheme("Q6_K"),
        (*planes("codes", 0, 128, 64, 4), *_two_bits("codes", 128, 64, 4), *planes("scale", 192, 16, 16, 8)), (("d", 208),),
    ),
    BlockType("IQ2_XXS", 16, 256, 66),
    BlockType("IQ2_XS", 17, 256, 74),
    BlockType("IQ3_XXS", 18, 256, 98),
    BlockType("IQ1_S", 19, 256, 50),
    BlockType("IQ4_NL", 20, 32, 18, _scheme("IQ4_NL"), planes("codes", 2, 16, 16, 4), _D0),
    BlockType("IQ3_S", 21, 256, 110),
    BlockType("IQ2_S", 22, 256, 82),
    BlockType(
        "IQ4_XS", 23, 256, 136, _scheme("IQ4_XS"),
        (*planes("codes", 8, 128, 16, 4), *planes("scale", 4, 4, 1, 4), *planes("scale", 2, 2, 1, 2, 4)), _D0,
    ),
    BlockType("IQ1_M", 29, 256, 56),
    BlockType("TQ1_0", 34, 256, 54, _scheme("TQ1_0"), halves=(("d", 52),), trits=True),
    BlockType("TQ2_0", 35, 256, 66, _scheme("TQ2_0"), _two_bits("codes", 0, 64), (("d", 64),)),
    BlockType("MXFP4", 39, 32, 17, _scheme("MXFP4A16"), (*planes("codes", 1, 16, 16, 4), Plane("scale", 0, 1, 1, 0, 8))),
    BlockType(
        "NVFP4", 40, 64, 36, _scheme("NVFP4A16"), (*planes("codes", 4, 32, 8, 4), Plane("scale", 0, 4, 4, 0, 8)), written=False,
    ),
)  # fmt: skip

BLOCKS: Final[Mapping[str, BlockType]] = MappingProxyType({t.name: t for t in _TABLE})
"""Every type that files hold and that is no plain number, by ggml's name."""

_OF_SCHEMES: Final = {t.scheme: t for t in reversed(_TABLE) if t.scheme is not None and t.written and not t.trits}


def type_of(scheme: Scheme) -> BlockType | None:
    """The type whose blocks hold a scheme; of the ternary ones TQ2_0, which is read faster. None if there is none."""
    return _OF_SCHEMES.get(scheme)
