"""The sentence pieces of a tokenizer.json, as the library tokenizers writes it.

Owns: `pieces_of_json`, and `added_to`, the tokens of any vocabulary with those that were added to it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER,
    Pieces,
    bytes_of_unigrams,
)
from arrondi.errors import SchemeError

_BYTES: Final = frozenset(f"<0x{i:02X}>" for i in range(256))
_ELSE: Final = "Give a GGUF file of this model: --template F16.gguf."


def pieces_of_json(path: Path, document: Mapping[str, Any], size: int) -> Pieces:
    """The vocabulary of a tokenizer.json whose model is BPE with byte fallback, or Unigram.

    Args:
        path: names the file.
        document: what it holds.
        size: rows of the model's table of tokens.

    Raises:
        SchemeError: something is done to a text that llama.cpp does not do.
    """
    model = document.get("model") or {}
    unigram = model.get("type") == "Unigram"
    if unigram:
        scored = {token: float(score) for token, score in model.get("vocab") or []}
        vocabulary = {token: i for i, (token, _) in enumerate(model.get("vocab") or [])}
        unknown = next((t for t, i in vocabulary.items() if i == model.get("unk_id")), None)
        if model.get("byte_fallback"):
            raise bytes_of_unigrams(path)
    else:
        vocabulary, unknown = model.get("vocab") or {}, model.get("unk_token")
        scored = _scores(vocabulary, model)
    types = {
        t: UNKNOWN if t == unknown else BYTE if t in _BYTES and not unigram else NORMAL for t in vocabulary
    }  # fmt: skip
    tokens, kinds = added_to(document, vocabulary, types, size)
    lowest = min(scored.values(), default=0.0)
    scores = [scored.get(t, lowest) for t in tokens]
    prefix, trimmed, charsmap = _spaces(path, document, vocabulary, unigram)
    return Pieces("t5" if unigram else "llama", tokens, scores, kinds, prefix, trimmed, charsmap)


def added_to(
    document: Mapping[str, Any], vocabulary: Mapping[str, int], kinds: Mapping[str, int], size: int
) -> tuple[list[str], list[int]]:
    """Every token by its number, and of what kind it is.

    Args:
        document: of tokenizer.json.
        vocabulary: token → its number.
        kinds: token → its kind.
        size: how many there must be at least.
    """
    added = {t["id"]: t for t in document.get("added_tokens") or []}
    last = max((*vocabulary.values(), *added), default=-1) + 1
    tokens = [f"[PAD{i}]" for i in range(max(size, last))]
    types = [UNUSED] * len(tokens)
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, kinds[token]
    for number, token in added.items():
        tokens[number] = token["content"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if token.get("special") else USER
    return tokens, types


def _scores(vocabulary: Mapping[str, int], model: Mapping[str, Any]) -> dict[str, float]:
    """How early pairs are merged into a token: llama.cpp merges the pair with the highest score first, as the list of merges says."""
    merges = model.get("merges") or []
    order = {m.replace(" ", "") if isinstance(m, str) else "".join(m): i for i, m in reversed([*enumerate(merges)])}
    return {token: -float(order.get(token, len(merges))) for token in vocabulary}


def _spaces(
    path: Path, document: Mapping[str, Any], vocabulary: Mapping[str, int], unigram: bool
) -> tuple[bool, bool, bytes]:
    """What is done to a text before it is cut: whether a space is put before it, whether spaces are trimmed, and the map of characters.

    Raises:
        SchemeError: it is more than llama.cpp does for such a vocabulary.
    """
    escaped = prefix = trimmed = stripped = split = False
    charsmap = b""
    for step in _steps(document.get("normalizer"), "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and pattern == {"String": " "} and step.get("content") == SPACE:
            escaped = True
        elif unigram and kind == "Precompiled":
            charsmap = base64.b64decode(step.get("precompiled_charsmap") or "")
        elif unigram and kind == "Replace" and pattern == {"Regex": " {2,}"} and step.get("content") in (" ", SPACE):
            trimmed = True
        elif unigram and kind == "Strip" and step.get("strip_right"):
            stripped = True
        else:
            raise _more(path, "changes a text", step)
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            escaped, split = True, step.get("split", True)
            prefix = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        elif not (escaped and step.get("type") == "Split" and step.get("pattern") == {"String": " "}):
            raise _more(path, "splits a text", step)
    across = next((t for t in vocabulary if SPACE in t[1:] and t.strip(SPACE)), None)
    if not escaped or trimmed != stripped or (split and across is not None):
        what = f"has the token {across!r} though it splits texts at spaces"
        what = "keeps spaces" if not escaped else "trims some spaces and keeps others" if trimmed != stripped else what
        raise SchemeError(f"{path}: {what}, which llama.cpp does not for sentence pieces. {_ELSE}")
    return prefix, trimmed, charsmap


def _steps(found: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a sequence that may hold sequences."""
    for step in [found] if found else []:
        if step.get("type") == "Sequence":
            for inner in step.get(key) or []:
                yield from _steps(inner, key)
        else:
            yield step


def _more(path: Path, what: str, step: Mapping[str, Any]) -> SchemeError:
    return SchemeError(
        f"{path}: {what} with {step.get('type')} before it is cut, which llama.cpp does not do so for sentence pieces. {_ELSE}"
    )
