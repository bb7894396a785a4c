"""What a calibration text is: how much of it there is, and in which scripts.

Owns: `describe` and `scripts_of`. Scripts are told, languages are not: letters say which script they are of, and no more is needed to
see that a text is not in the one that the model will be used with.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from typing import Any, Final

from arrondi.measure.data import Windows

_RARE: Final = 0.001
"""Scripts with a smaller share of the letters are counted together as "other"."""
_NOT_SCRIPTS: Final = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HALFWIDTH": "", "FULLWIDTH": "", "MODIFIER": ""}
"""First words of Unicode names that say something else than the script, and what they stand for; "" to read the next word."""


def describe(windows: Windows, vocabulary: int | None, tokenizer: Any = None) -> dict[str, Any]:
    """Facts about windows, as plain data.

    Args:
        windows: what is calibrated on.
        vocabulary: tokens that the model knows, None if that is not known.
        tokenizer: turns ids back into text; None: nothing is said of scripts.

    Returns:
        tokens, distinct_tokens, vocabulary and vocabulary_share; window_tokens; documents and document_tokens (least, median,
        most) where there were documents; scripts with their shares of all letters, the largest first.
    """
    distinct = int(windows.ids.unique().numel())
    lengths = windows.documents
    sizes = (
        {"least": min(lengths), "median": int(statistics.median(lengths)), "most": max(lengths)} if lengths else None
    )
    return {
        "tokens": windows.ids.numel(),
        "distinct_tokens": distinct,
        "vocabulary": vocabulary,
        "vocabulary_share": round(distinct / vocabulary, 4) if vocabulary else None,
        "window_tokens": windows.seq_len,
        "documents": len(lengths) or None,
        "document_tokens": sizes,
        "scripts": None if tokenizer is None else scripts_of(_text(windows, tokenizer)),
    }


def scripts_of(text: str) -> dict[str, float]:
    """Script → its share of the letters, the largest first; rare ones are "other". No letters give no scripts.

    >>> scripts_of("Ein Wort und ещё")
    {'Latin': 0.7692, 'Cyrillic': 0.2308}
    """
    counts: Counter[str] = Counter()
    for character, number in Counter(text).items():
        if unicodedata.category(character)[0] == "L":
            counts[_script(character)] += number
    total = sum(counts.values())
    found: dict[str, float] = {}
    for script, number in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        name = script if number >= _RARE * total else "other"
        found[name] = found.get(name, 0.0) + number / total
    return {name: round(share, 4) for name, share in found.items()}


def _script(letter: str) -> str:
    """The script as the letter's Unicode name says it: GREEK SMALL LETTER ALPHA is Greek."""
    for word in unicodedata.name(letter, "other").replace("-", " ").split():
        script = _NOT_SCRIPTS.get(word, word.capitalize())
        if script:
            return script
    return "other"


def _text(windows: Windows, tokenizer: Any) -> str:
    return "\n".join(tokenizer.decode(row, skip_special_tokens=True) for row in windows.ids.tolist())
