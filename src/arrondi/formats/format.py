"""Number formats: what each code of a few bits means.

Owns: `Format`, the constructors of its three kinds, and the table `FORMATS`. Knows nothing of tensors, scales or models.

A format is data. An *integer* format says which codes exist (`qmin … qmax`), and a code is its own value. A *float* format
(fp8, fp6, fp4) and a *codebook* (NF4) list the value of every code; a float's top bit is its sign. A codebook without values is a
*look-up table* (`lut2` … `lut8`): every tensor brings the values itself, learned from its numbers. A *trellis* (`tcq2`) gives a code its
value by those before it.

Sources: Micikevicius et al. 2022, arXiv:2209.05433 (fp8); OCP Microscaling Formats 1.0, 2023 (fp6, fp4, e8m0);
Dettmers et al. 2023, arXiv:2305.14314 (NF4, FP4 of bitsandbytes).
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal

from arrondi.arguments import said
from arrondi.errors import SchemeError, unknown
from arrondi.formats.trellis import BITS, Trellis, trellis_of


@dataclass(frozen=True)
class Format:
    """A set of codes with their real values, before any scale.

    Attributes:
        name: the field's name: `int4`, `uint8`, `fp8_e4m3`, `nf4`, `ternary`.
        kind: "integer" (a code is its value), "float" (sign and magnitude, ties to the even code), "codebook" or "trellis".
        bits: stored bits of one code, the most of any of a trellis.
        qmin, qmax: smallest and largest code, inclusive.
        values: value of code 0, 1, …; None for integers, look-up tables and trellises. NaN marks codes that are never produced.
        trellis: of a trellis, which.
    """

    name: str
    kind: Literal["integer", "float", "codebook", "trellis"]
    bits: int
    qmin: int
    qmax: int
    values: tuple[float, ...] | None = field(default=None, repr=False)
    trellis: Trellis | None = None

    @cached_property
    def largest(self) -> float:
        """The largest magnitude that a code can mean."""
        if self.learned or self.trellis is not None:
            return 1.0  # by convention: tables are laid out for numbers of at most one, and a trellis is not laid out
        if self.values is None:
            return float(max(-self.qmin, self.qmax))
        return max(abs(v) for v in self.values if math.isfinite(v))

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.qmax - self.qmin + 1

    @property
    def learned(self) -> bool:
        """Whether every tensor has values of its own."""
        return self.kind == "codebook" and self.values is None

    @property
    def rate(self) -> float:
        """Stored bits of a code, on the average."""
        return float(self.bits) if self.trellis is None else self.trellis.rate

    @cached_property
    def balanced(self) -> bool:
        """Whether the negative of every value is a value too: ternary and fp4 are, int4, NF4 and look-up tables are not."""
        if self.values is None:
            return self.qmin == -self.qmax and not self.learned
        known = {v for v in self.values if math.isfinite(v)}
        return known == {-v for v in known}

    def value(self, code: int) -> float:
        """The real value of one code, for people and tests; tensors go through `arrondi.dequantize`."""
        if self.learned or self.trellis is not None:
            raise SchemeError(f"The values of {self} belong to a tensor. Ask the tensor that has them.")
        return float(code) if self.values is None else self.values[code]

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[..., Format], tuple[object, ...]]:
        # A NaN that was pickled no longer equals the table's, so a named format travels as its name.
        if FORMATS.get(self.name) is self:
            return get_format, (self.name,)
        return Format, (self.name, self.kind, self.bits, self.qmin, self.qmax, self.values, self.trellis)


def integer(bits: int, *, signed: bool = True) -> Format:
    """The two's complement (or unsigned) integer format of 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise SchemeError(f"Integer formats have 2 to 8 bits, got {bits}. For one bit use 'binary'.")
    if signed:
        return Format(f"int{bits}", "integer", bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Format(f"uint{bits}", "integer", bits, 0, 2**bits - 1)


def codebook(name: str, values: Iterable[float]) -> Format:
    """A format whose levels are given: sorted ascending, nearest wins, an exact tie goes to the lower level.

    Raises:
        SchemeError: not sorted, repeated, not finite, fewer than two or more than 256 levels.
    """
    try:
        levels = tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        raise SchemeError(f"The levels of codebook {name!r} are numbers, got {said(values)}.") from None
    if not 2 <= len(levels) <= 256:
        raise SchemeError(f"Codebook {name!r} needs 2 to 256 levels, got {len(levels)}.")
    if not all(math.isfinite(v) for v in levels) or any(a >= b for a, b in itertools.pairwise(levels)):
        raise SchemeError(
            f"Codebook {name!r} must list finite, strictly ascending levels, got {levels}. Sort them first."
        )
    return Format(name, "codebook", (len(levels) - 1).bit_length(), 0, len(levels) - 1, levels)


def look_up(bits: int) -> Format:
    """The format of 2 to 8 bits whose values each tensor brings in tables."""
    return Format(f"lut{bits}", "codebook", bits, 0, 2**bits - 1)


def of_trellis(trellis: Trellis) -> Format:
    """The format of a trellis: unsigned codes without values of their own."""
    most = trellis.bits[1]
    return Format(trellis.name, "trellis", most, 0, 2**most - 1, None, trellis)


def _float(name: str, exponent: int, mantissa: int, bias: int, *, ieee: bool = False, nan: bool = False) -> Format:
    """A small float: 1 sign bit, `exponent` and `mantissa` bits, subnormals.

    `ieee`: the top exponent holds infinities and NaN. `nan`: only the all-ones pattern is NaN (the "fn" variant).
    """
    half: list[float] = []
    for pattern in range(2 ** (exponent + mantissa)):
        e, m = divmod(pattern, 2**mantissa)
        if ieee and e == 2**exponent - 1:
            half.append(math.inf if m == 0 else math.nan)
        elif nan and pattern == 2 ** (exponent + mantissa) - 1:
            half.append(math.nan)
        elif e == 0:
            half.append(m * 2.0 ** (1 - bias - mantissa))
        else:
            half.append((2**mantissa + m) * 2.0 ** (e - bias - mantissa))
    bits = 1 + exponent + mantissa
    return Format(name, "float", bits, 0, 2**bits - 1, (*half, *(-v for v in half)))


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA's table as its authors ship it: normal quantiles rounded to float32; a test derives it from the quantiles."""

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of ggml's IQ4 types: fine steps near zero, where most weights are."""

_FP4_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes of bitsandbytes' FP4 in code order, before dividing by 12; bit 3 is the sign."""


def _single(x: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def dynamic_levels(signed: bool = True) -> tuple[float, ...]:
    """The 256 values of the log-spaced 8-bit map, ascending: 7 decades of 2^i intervals of [0.1, 1] (2^(i+1) without signs), their midpoints, 0 and 1.

    Each is a float32 and comes of sums and products in that type, so that they are those of bitsandbytes to the last bit: edges are one
    rounding of start + k · step, counted from the nearer end.

    Source: Dettmers 2016, arXiv:1511.04561; as in Dettmers et al. 2021, arXiv:2110.02861.
    """
    levels = {0.0, 1.0}
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        start = _single(0.1)
        step = _single(_single(1 - start) / count)
        near = (count + 1) // 2
        edges = [_single(start + step * k if k < near else 1 - step * (count - k)) for k in range(count + 1)]
        for low, high in itertools.pairwise(edges):
            middle = _single(_single(10.0 ** (i - 6)) * _single(_single(low + high) / 2))
            levels |= {middle, -middle} if signed else {middle}
    return tuple(sorted(levels))


def _log8() -> Format:
    """Sixteen steps an octave below 1, as HiSilicon's NNIE has them: ±2^(q/16 - 127/16), 0, and one more positive number below all others.

    A number is at most 2.2 % off down to 2^(-126/16) of the largest, where the steps of int8 are a quarter of it.
    """
    sizes = [2.0 ** ((q - 127) / 16) for q in range(128)]
    return codebook("log8", [*(-v for v in reversed(sizes[1:])), 0.0, *sizes])


e8m0: Final = Format("e8m0", "codebook", 8, 0, 255, (*(2.0 ** (i - 127) for i in range(255)), math.nan))
"""Powers of two: the scale format of MX blocks. It has no zero and no sign."""

_TABLE: Final = (
    *(integer(b) for b in range(2, 9)),
    *(integer(b, signed=False) for b in range(2, 9)),
    _float("fp8_e4m3", 4, 3, 7, nan=True),
    _float("fp8_e5m2", 5, 2, 15, ieee=True),
    _float("fp6_e3m2", 3, 2, 3),
    _float("fp6_e2m3", 2, 3, 1),
    _float("fp4_e2m1", 2, 1, 1),
    codebook("nf4", _NF4),
    codebook("iq4_nl", _IQ4_NL),
    Format("fp4_bnb", "float", 4, 0, 15, tuple(s * v / 12 for s in (1, -1) for v in _FP4_BNB)),
    Format("ternary", "integer", 2, -1, 1),
    codebook("binary", (-1.0, 1.0)),
    codebook("dynamic8", dynamic_levels()),
    _log8(),
    e8m0,
)

FORMATS: Final[Mapping[str, Format]] = MappingProxyType({f.name: f for f in _TABLE})
"""Every named format that has values of its own. Other codebooks are made with `codebook` and need no entry here."""

LOOK_UPS: Final[Mapping[str, Format]] = MappingProxyType({f.name: f for f in map(look_up, range(2, 9))})
"""The formats whose values each tensor brings."""

TRELLISES: Final[Mapping[str, Format]] = MappingProxyType(
    {f.name: f for f in (of_trellis(Trellis(bits)) for bits in BITS[:7])}
)
"""The usual trellises; others say more in their names."""

_ALIASES: Final = {"fp8": "fp8_e4m3", "fp4": "fp4_e2m1", "fp6": "fp6_e3m2"}


def get_format(name: str) -> Format:
    """The format of that name, `int1`-like mistakes answered with the nearest known name.

    >>> get_format("int4").qmin, get_format("fp8").largest
    (-8, 448.0)
    """
    if not isinstance(name, str):
        raise unknown("number format", name, FORMATS)
    key = re.sub(r"^i(?=\d)", "int", name.lower())
    key = _ALIASES.get(key, key)
    if (trellis := trellis_of(key)) is not None:
        return of_trellis(trellis)
    if key not in FORMATS and key not in LOOK_UPS:
        raise unknown("number format", str(name), [*FORMATS, *LOOK_UPS, *TRELLISES])
    return FORMATS.get(key) or LOOK_UPS[key]
