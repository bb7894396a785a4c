"""Keys and values in few bits along the directions in which they vary: `SpectralCache`.

Keys of one head, before the rotary embedding turns them, and values lie close to a plane of few dimensions. Along the principal
directions that calibration finds, a channel gets 8, 4, 2 or no bits, as much as its variance is worth, and nothing else is stored: no
scale of a token, none of a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError

_WORD: Final = re.compile(r"pca(\d(?:\.\d{1,2})?)")


@dataclass(frozen=True)
class SpectralCache:
    """What one layer's keys and values become.

    Attributes:
        keys, values: bits of a channel in the mean, 1 to 8.
        window: the newest tokens that stay as they are.
        first: tokens at the beginning of the text that stay, too: models look at them often, and they are like no others.

    Sources: transform coding, Goyal 2001, doi:10.1109/79.952802; keys before the rotary embedding, Hooper et al. 2024,
    arXiv:2401.18079; the first tokens, Xiao et al. 2023, arXiv:2309.17453.
    """

    keys: float = 2.0
    values: float = 2.0
    window: int = 128
    first: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        for name, bits in (("keys", self.keys), ("values", self.values)):
            if not 1 <= bits <= 8:
                raise SchemeError(f"The {name} of a cache have 1 to 8 bits along their directions, got {bits:g}.")
        for name, count in (("window", self.window), ("first", self.first)):
            if count < 0:
                raise SchemeError(f"A cache keeps 0 or more tokens as they are, got {name}={count}.")

    @property
    def static(self) -> bool:
        """Whether calibration comes before the text: always."""
        return True

    def refuse_width(self, width: int) -> str | None:
        """Why heads of this width cannot be rounded so, in one sentence; None if they can."""
        if width % 4:
            return f"Keys and values along their directions fill bytes only in heads that are a multiple of 4 wide, and these have {width}. Use int8."
        return None

    def __str__(self) -> str:
        parts = [f"k=pca{self.keys:g}", f"v=pca{self.values:g}", f"window={self.window}", f"first={self.first}"]
        return ",".join(parts)


def spectral_bits(word: str) -> float | None:
    """The bits that a word such as `pca2.5` means; None if it is another word."""
    found = _WORD.fullmatch(word)
    return None if found is None else float(found[1])
