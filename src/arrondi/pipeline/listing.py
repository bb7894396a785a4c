"""Names in a sentence: `listed`, and `NAMED`, how many of them stand there; the others are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

NAMED: Final = 3


def listed(names: Sequence[str]) -> str:
    """The first of some names with commas between them, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
