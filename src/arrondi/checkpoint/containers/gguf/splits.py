"""How byte-level tokenizers cut a text before they merge, and what llama.cpp calls it.

Owns: `name_of_splits`, `cut_named` for the way back, and `flat`. A way of cutting is the list of what a document does, so that one with a further step is another; what is not
in the table is refused, as llama.cpp would cut otherwise under any other name.

Source: llama.cpp's vocabulary (MIT); patterns are those that transformers has for the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from arrondi.errors import SchemeError

_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_WORDS: Final = {**_BYTES, "use_regex": True}
"""Words, numbers and the rest by GPT-2's own pattern."""


def _pattern(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _digits(each: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": each}


_STEPS: Final[Mapping[str, tuple[dict[str, Any], ...]]] = MappingProxyType({
    "gpt-2": (_WORDS,),
    "starcoder": (_digits(True), _WORDS),
    "falcon": ({"type": "Punctuation", "behavior": "Contiguous"}, _WORDS, _digits(False), _pattern("[0-9][0-9][0-9]")),
})  # fmt: skip
"""Name → what is done, in the words of a tokenizer.json; a piece that is a whole word is merged like any other."""
_PATTERNS: Final = (("smaug-bpe", "llama-bpe"), ("qwen2", ""), ("qwen35", ""), ("", "tekken"), ("gpt-4o", ""))
"""Names of texts that are cut by one pattern and nothing else, and their names where a piece that is a whole word is not merged."""


_WHOLE: Final = frozenset({"llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"})
"""Further names under which llama.cpp does not merge a piece that is a whole word."""


def flat(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, one after another."""
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [part for one in step.get(inner) or [] for part in flat(one, inner)]
    return [step]


def name_of_splits(before: Any, ignored: bool, indifferent: Callable[[], bool]) -> str:
    """The name of a way to cut.

    Args:
        before: the pre-tokenizer of tokenizer.json.
        ignored: a piece that is a whole word is taken without merging.
        indifferent: whether merging gives it all the same; asked where a name of the other way is all there is.

    Raises:
        SchemeError: llama.cpp has no name for it.
    """
    steps = tuple(_described(part) for part in flat(before, "pretokenizers"))
    listed = next((n for n, own in _STEPS.items() if steps == tuple(map(_described, own))), "")
    merged, taken = (listed, "") if listed else _by_pattern(steps) or ("", "")
    found, other = (taken, merged) if ignored else (merged, taken)
    if found or (other and indifferent()):
        return found or other
    raise SchemeError("it cuts texts in a way that llama.cpp has no name for.")


def cut_named(name: str) -> tuple[dict[str, Any] | None, bool]:
    """The way back: a pre-tokenizer, None for a name that is not in the tables, and whether a piece that is a whole word is not merged."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    regex = GGUF_PRE_TOKENIZER_SPLITS.get(name)
    steps = _STEPS.get(name) or ((_pattern(regex), _BYTES) if regex else ())
    before = {"type": "Sequence", "pretokenizers": list(steps)} if steps else None
    return before, name in _WHOLE or name in (taken for _, taken in _PATTERNS if taken)


def _by_pattern(steps: tuple[tuple[Any, ...], ...]) -> tuple[str, str] | None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    patterns = {}
    for names in reversed(_PATTERNS):
        known = next((GGUF_PRE_TOKENIZER_SPLITS[n] for n in reversed(names) if n in GGUF_PRE_TOKENIZER_SPLITS), None)
        patterns[known] = names
    if (
        len(steps) != 2
        or steps[1] != _described(_BYTES)
        or steps[0][0] != "Split"
        or steps[0][2] not in ("Isolated", "Removed")
    ):
        return None
    return patterns.get(steps[0][1])


def _described(part: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a step does, with all that changes it."""
    kind = part.get("type")
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            return (kind, "with a space before the text")
        return (kind, bool(part.get("use_regex", True)))
    if kind == "Digits":
        return (kind, bool(part.get("individual_digits")))
    if kind == "Punctuation":
        return (kind, part.get("behavior"))
    if kind == "Split":
        pattern = part.get("pattern") or {}
        behavior = "inverted" if part.get("invert") and part.get("behavior") != "Removed" else part.get("behavior")
        return (kind, pattern.get("Regex"), behavior)
    return (kind,)
