"""The block types of ggml, llama.cpp's tensor library, as schemes.

Owns: the table `GGML`. Every type is x ≈ scale · code, or scale · code + offset, in groups of 16 or 32 along a row. In the types of
256 elements ("K", and IQ4_XS) scales and offsets are codes again, which share a float16 number; that of the offsets is negative, so that
their codes count how far a group lies below zero.

Source: documentation and reference decoder of ggml (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from arrondi.formats.format import FORMATS
from arrondi.formats.granularity import PerGroup
from arrondi.formats.scheme import Scheme


def _one(format: str, size: int = 32) -> Scheme:
    """A float16 scale for each group."""
    return Scheme(FORMATS[format], PerGroup(size), scale="float16")


def _two(format: str) -> Scheme:
    """A float16 scale and a float16 offset for 32."""
    return Scheme(FORMATS[format], PerGroup(32), "float", scale="float16", offset="float16")


def _nested(format: str, size: int, of_scales: str, *, offsets: bool = False) -> Scheme:
    """Scales, and perhaps offsets, that are codes of their own for each 256 elements."""
    inner = Scheme(FORMATS[of_scales], PerGroup(256 // size), scale="float16")
    if offsets:
        return Scheme(FORMATS[format], PerGroup(size), "float", scale=inner, offset=inner)
    return Scheme(FORMATS[format], PerGroup(size), scale=inner, signed=True)


GGML: Final[Mapping[str, Scheme]] = MappingProxyType({
    "Q4_0": _one("int4"),
    "Q4_1": _two("uint4"),
    "Q5_0": _one("int5"),
    "Q5_1": _two("uint5"),
    "Q8_0": _one("int8"),
    "Q2_K": _nested("uint2", 16, "uint4", offsets=True),
    "Q3_K": _nested("int3", 16, "int6"),
    "Q4_K": _nested("uint4", 32, "uint6", offsets=True),
    "Q5_K": _nested("uint5", 32, "uint6", offsets=True),
    "Q6_K": _nested("int6", 16, "int8"),
    "IQ4_NL": _one("iq4_nl"),
    "IQ4_XS": _nested("iq4_nl", 32, "int6"),
    "TQ2_0": _one("ternary", 256),
    "TQ1_0": _one("ternary", 256),
})  # fmt: skip
"""Type → what a weight in it is. The two ternary types differ in their bytes only. MXFP4 is what `MXFP4A16` is."""
