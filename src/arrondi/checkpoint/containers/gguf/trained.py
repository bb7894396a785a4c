"""Sentence pieces of a tokenizer.json, as the library tokenizers writes it (Llama, Mistral, Gemma; T5).

Owns: `joined_pieces_of` and `likely_pieces_of`. What is done to a text before it is cut must be what llama.cpp does for such a vocabulary: anything
else is refused. Where a text begins with a space, llama.cpp puts another before it, as SentencePiece does; a Metaspace does not.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from arrondi.checkpoint.containers.gguf.merges import scores_of
from arrondi.checkpoint.containers.gguf.splits import flat
from arrondi.checkpoint.containers.gguf.tokens import (
    BYTE,
    BYTES,
    NORMAL,
    SPACE,
    UNKNOWN,
    Vocabulary,
    added_to,
)
from arrondi.errors import SchemeError

BYTES_OF_LIKELY: Final = (
    "it spells characters that it lacks in bytes, which llama.cpp does not for a vocabulary of likely pieces."
)
_PREFIX, _TRIMMED = "add_space_prefix", "remove_extra_whitespaces"


class _Spaces(NamedTuple):
    """What is done to a text before it is cut.

    Attributes:
        escaped: spaces become ▁.
        prefix: a space is put before the text.
        single: several spaces in a row are one.
        stripped: spaces at the end are dropped.
        split: pieces begin with a ▁ or have none.
        lines: texts are cut at line ends, too.
        charsmap: the map of characters.
    """

    escaped: bool = False
    prefix: bool = False
    single: bool = False
    stripped: bool = False
    split: bool = False
    lines: bool = False
    charsmap: bytes = b""


def joined_pieces_of(document: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose model is BPE with byte fallback: pieces that are joined, and bytes of what is none.

    Raises:
        SchemeError: llama.cpp would cut texts otherwise.
    """
    model = document["model"]
    vocabulary: dict[str, int] = model.get("vocab") or {}
    spaces = _spaces(document, vocabulary, likely=False)
    scored = scores_of(document)
    kinds = {t: UNKNOWN if t == model.get("unk_token") else BYTE if t in BYTES else NORMAL for t in vocabulary}
    return _pieces("llama", document, vocabulary, kinds, scored, {_PREFIX: spaces.prefix})


def likely_pieces_of(document: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose model is Unigram: the sum of the scores of a text's pieces is largest.

    Raises:
        SchemeError: llama.cpp would cut texts otherwise.
    """
    model = document["model"]
    if model.get("byte_fallback"):
        raise SchemeError(BYTES_OF_LIKELY)
    rows = model.get("vocab") or []
    vocabulary = {token: i for i, (token, _) in enumerate(rows)}
    spaces = _spaces(document, vocabulary, likely=True)
    kinds = {t: UNKNOWN if i == model.get("unk_id") else NORMAL for t, i in vocabulary.items()}
    flags = {_PREFIX: spaces.prefix, _TRIMMED: spaces.single}
    scored = {token: float(score) for token, score in rows}
    return _pieces("t5", document, vocabulary, kinds, scored, flags, spaces.charsmap)


def _pieces(
    model: str,
    document: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    kinds: Mapping[str, int],
    scored: Mapping[str, float],
    flags: Mapping[str, bool],
    charsmap: bytes = b"",
) -> Vocabulary:
    tokens, types = added_to(vocabulary, kinds, document.get("added_tokens") or [], pieces=True)
    lowest = min(scored.values(), default=0.0)
    return Vocabulary(
        model, tokens, types, scores=[scored.get(t, lowest) for t in tokens], flags=flags, charsmap=charsmap
    )


def _spaces(document: Mapping[str, Any], vocabulary: Mapping[str, int], *, likely: bool) -> _Spaces:
    """What becomes of spaces.

    Raises:
        SchemeError: that, or something else that is done to a text, is more than llama.cpp does for such a vocabulary.
    """
    found = _Spaces()
    for step in flat(document.get("normalizer"), "normalizers"):
        found = found._replace(**_normalized(step, likely))
    for step in flat(document.get("pre_tokenizer"), "pretokenizers"):
        found = found._replace(**_split(step, found.escaped, likely))
    if not found.escaped:
        raise SchemeError("it keeps spaces, which llama.cpp does not for sentence pieces.")
    if found.lines and not found.charsmap:
        raise SchemeError("it cuts texts at line ends and says nothing of them otherwise, which llama.cpp does not.")
    if found.single != found.stripped:
        raise SchemeError("it trims some spaces and keeps others, which llama.cpp does not for sentence pieces.")
    runs = found.single  # then there are none in a text
    across = next((t for t in vocabulary if SPACE in t[1:] and not (runs and not t.strip(SPACE))), None)
    if found.split and across is not None:
        raise SchemeError(f"it has the token {across!r} though it splits texts at spaces, which llama.cpp does not.")
    return found


def _normalized(step: Mapping[str, Any], likely: bool) -> dict[str, Any]:
    """What a step of the normalizer does."""
    kind, pattern = step.get("type"), step.get("pattern") or {}
    if kind == "Prepend" and step.get("prepend") == SPACE:
        return {"prefix": True}
    if kind == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE:
        return {"escaped": True}
    if likely and kind == "Precompiled":
        return {"charsmap": base64.b64decode(step.get("precompiled_charsmap") or "")}
    if likely and kind == "Replace" and pattern == {"Regex": " {2,}"} and step.get("content") in (" ", SPACE):
        return {"single": True}
    if likely and kind == "Strip" and step.get("strip_right"):
        return {"stripped": True}
    raise _more("changes", step)


def _split(step: Mapping[str, Any], escaped: bool, likely: bool) -> dict[str, Any]:
    """What a step of the pre-tokenizer does."""
    kind = step.get("type")
    if kind == "Metaspace" and step.get("replacement") == SPACE:
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return {"escaped": True, "split": step.get("split", True), "prefix": scheme != "never"}
    if likely and kind == "WhitespaceSplit":
        return {"single": True, "stripped": True, "lines": True}
    if escaped and kind == "Split" and step.get("pattern") == {"String": " "}:
        return {}
    raise _more("splits", step)


def _more(what: str, step: Mapping[str, Any]) -> SchemeError:
    return SchemeError(
        f"it {what} texts with {step.get('type')} before it cuts them, which llama.cpp does not so for sentence pieces."
    )
