"""Bit-shift trellises: codes of a few bits whose value depends on the codes before them in a ring.

Owns: `Trellis`, and the grammar of its name. Knows no tensor; `arrondi.tensor.trellis` computes the values.

A ring of weights is a closed line of codes, K bits each. The *state* of a weight is the last L bits of the line, its own code lowest:
state = (state of the weight before << K | code) mod 2^L. Its value is a function of the state that looks random, so that a search
over all lines (Viterbi's) comes close to what a code of K bits can reach for normal numbers, and decoding is one multiplication.

Sources: Tseng, Sun, Hou, De Sa 2024, arXiv:2406.11235 (QTIP); the functions are those of the EXL3 format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from arrondi.errors import SchemeError

Function = Literal["bytes", "mul1", "mcg", "3inst"]
"""state → value. "bytes": the sum of the four bytes of state · 0x83DCD12D mod 2^32, less 510, an integer; the others are those of EXL3,
float16: "mul1" the same sum made normal, "mcg" and "3inst" two halves of a product added."""

Ring = Literal["rows", "square", "tile"]
"""Who follows whom: "rows": 256 rows of one column; "square": 16 columns of 16 rows, column by column; "tile": the same in the order of EXL3."""

RING: Final = 256
"""Weights of a ring; the last of a column takes what is left over, too."""

BITS: Final = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Bits of a weight; halves alternate between the whole numbers beside them. More than 4 are for files of others."""

SIDE: Final = 16
"""Rows and columns of a square or a tile."""

STATES: Final = range(8, 17)
"""Bits of a state."""

_NAME: Final = re.compile(r"tcq([1-8](?:\.5)?)(?:-l([0-9]{1,2}))?(?:-(bytes|mul1|mcg|3inst))?(?:-(square|tile))?")


@dataclass(frozen=True)
class Trellis:
    """A trellis, without any numbers.

    Attributes:
        rate: bits of a weight, one of `BITS`.
        state: bits of a state, L.
        function: state → value.
        ring: which weights are on one line.
    """

    rate: float
    state: int = 12
    function: Function = "bytes"
    ring: Ring = "rows"

    def __post_init__(self) -> None:
        if self.rate not in BITS:
            raise SchemeError(f"A trellis has 1 to 4 bits a weight, in halves, or 5 to 8, got {self.rate:g}.")
        if self.state not in STATES:
            raise SchemeError(f"States of a trellis have {STATES[0]} to {STATES[-1]} bits, got {self.state}. Use 12.")
        if self.ring == "tile" and self.rate % 1:
            raise SchemeError(f"Tiles have whole bits a weight, got {self.rate:g}. Leave 'tile' out.")

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the codes at even and at odd places of a ring."""
        low = int(self.rate)
        return low, low + (self.rate > low)

    @property
    def name(self) -> str:
        """`tcq2`, `tcq3.5-l14`, `tcq3-l16-3inst-tile`: what is usual is left out."""
        parts = [f"tcq{self.rate:g}", "" if self.state == 12 else f"l{self.state}"]
        parts += ["" if self.function == "bytes" else self.function, "" if self.ring == "rows" else self.ring]
        return "-".join(part for part in parts if part)


def trellis_of(name: str) -> Trellis | None:
    """The trellis of that name; None if it is no name of one.

    >>> trellis_of("tcq2.5-l14").bits
    (2, 3)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    rate, state, function, ring = found.groups()
    trellis = Trellis(float(rate), int(state or 12), function or "bytes", ring or "rows")  # type: ignore[arg-type]
    return trellis
