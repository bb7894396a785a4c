"""What is said of one reader of an output: `Verdict`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TRANSFORMERS: Final = "transformers 5.23"


@dataclass(frozen=True)
class Verdict:
    """What one reader does with an output.

    Attributes:
        reader: its name, and its version where the verdict is tested.
        ok: it loads the files and computes what `arrondi.load` computes, up to the rounding of floating-point sums.
        sentence: for people: what differs where `ok` is false, and what to know where it is true.
    """

    reader: str
    ok: bool
    sentence: str
