"""A tokenizer as the keys of a GGUF header.

Owns: `fields_of_tokenizer` and `named`. What llama.cpp would cut otherwise than the makers of a tokenizer is refused rather than written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.byte_pairs import byte_pairs_of
from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.sentencepiece import read_pieces
from arrondi.checkpoint.containers.gguf.special import said_by_files, said_by_tokenizer, with_added
from arrondi.checkpoint.containers.gguf.tokens import Vocabulary
from arrondi.checkpoint.containers.gguf.trained import joined_pieces_of, likely_pieces_of
from arrondi.checkpoint.containers.gguf.words import parts_of_words_of
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.tokenizer import tokenizer_of
from arrondi.errors import SchemeError

_JSON, _MODEL = "tokenizer.json", "tokenizer.model"
_OTHERS: Final = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
"""Files of tokenizers that transformers makes a tokenizer.json of."""
_PHI3: Final = re.compile("(phi)-?3", re.IGNORECASE)
_PHI3_TOKENS: Final = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})


def fields_of_tokenizer(home: Path, size: int) -> dict[str, Field]:
    """The keys that describe the tokenizer of a model directory; none where it has no tokenizer.

    Args:
        home: the directory; of tokenizer.json and tokenizer.model the first is taken.
        size: rows of the model's table of tokens; the vocabulary is filled up to it.

    Raises:
        SchemeError: a tokenizer that llama.cpp does not compute exactly, or that is not known here.
        FileFormatError: its files cannot be read.
    """
    names = [n for n in (_JSON, _MODEL, *_OTHERS) if (home / n).exists()]
    if not names:
        return {}
    path = home / names[0]
    try:
        if names[0] == _MODEL:
            found = with_added(home, read_pieces(path))
            return found.fields(size) | said_by_files(home, found)
        tokenizer = tokenizer_of(home)
        found = _of_document(_document(path, tokenizer))
        return found.fields(size) | said_by_tokenizer(home, tokenizer, found.model)
    except SchemeError as error:
        raise SchemeError(f"{path}: {error} Give a GGUF file of this model: --template F16.gguf.") from None


def named(name: str, fields: Mapping[str, Field]) -> str:
    """A model's name, by which llama.cpp tells vocabularies whose special tokens take the spaces behind them along.

    It takes every vocabulary of a model that is called Phi 3 for that of Phi 3, and does not load one in which a token of that is missing.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    known = tokens is None or _PHI3_TOKENS.issubset(tokens.value)
    return name if known else _PHI3.sub(r"\1_3", name)


def _document(path: Path, tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json says, or would say."""
    if path.name == _JSON:
        document = read_json(path, "Take it from the original model.")
    elif hasattr(tokenizer, "backend_tokenizer"):
        document = json.loads(tokenizer.backend_tokenizer.to_str())
    else:
        raise SchemeError(f"its tokenizer ({type(tokenizer).__name__}) is a program of its own.")
    return {**document, "model": document.get("model") or {}}


def _of_document(document: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json."""
    model = document["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind not in _KINDS:
        raise SchemeError(f"a vocabulary of the kind {kind!r} is not known to llama.cpp.")
    return _KINDS[kind](document)


def _pairs_of(document: Mapping[str, Any]) -> Vocabulary:
    model = document["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise SchemeError(f"its pieces have a {key} ({model[key]!r}), which llama.cpp does not know.")
    return (joined_pieces_of if model.get("byte_fallback") else byte_pairs_of)(document)


_KINDS: Final[Mapping[str | None, Callable[[Mapping[str, Any]], Vocabulary]]] = MappingProxyType({
    "BPE": _pairs_of, "Unigram": likely_pieces_of, "WordPiece": parts_of_words_of,
})  # fmt: skip
"""Type of a model of the library tokenizers → how it is read."""
