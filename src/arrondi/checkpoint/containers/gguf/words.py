"""Vocabularies of words and parts of words (BERT).

Owns: `parts_of_words_of`. The longest part that a word begins with is taken, then the longest of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.tokens import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    added_to,
)
from arrondi.errors import SchemeError

_MARK: Final = "##"


def parts_of_words_of(document: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose model is WordPiece; llama.cpp marks beginnings of words where BERT marks all else.

    Raises:
        SchemeError: texts are cut into words otherwise than BERT does.
    """
    model, normal, before = document["model"], document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    plain = normal.get("clean_text", True) and normal.get("handle_chinese_chars", True)
    of_bert = (model.get("continuing_subword_prefix"), normal.get("type"), before.get("type"))
    if of_bert != (_MARK, "BertNormalizer", "BertPreTokenizer") or not plain:
        raise SchemeError("it cuts texts into words otherwise than BERT does, which llama.cpp does not.")
    vocabulary: dict[str, int] = model.get("vocab") or {}
    kinds = {token: UNKNOWN if token == model.get("unk_token") else NORMAL for token in vocabulary}
    tokens, types = added_to(vocabulary, kinds, document.get("added_tokens") or [], pieces=False)
    lower, strip = bool(normal.get("lowercase", True)), normal.get("strip_accents")
    flags = {"normalizer.lowercase": lower, "normalizer.strip_accents": lower if strip is None else bool(strip)}
    return Vocabulary("bert", [*map(_marked, tokens, types)], types, flags=flags)


def _marked(token: str, kind: int) -> str:
    if kind in (CONTROL, UNKNOWN, UNUSED):
        return token
    return token[len(_MARK) :] if token.startswith(_MARK) else SPACE + token
