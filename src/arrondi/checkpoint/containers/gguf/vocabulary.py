"""A tokenizer as the keys of a GGUF header.

Owns: `fields_of_tokenizer`. Vocabularies of bytes in pairs (GPT-2, Llama 3, Qwen) are written from tokenizer.json, those of sentence pieces
(Llama, Mistral, Gemma) from it or from tokenizer.model; what llama.cpp would cut otherwise is refused rather than written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.pieces import NORMAL, UNUSED, Pieces, read_pieces
from arrondi.checkpoint.containers.gguf.special import said_by_files, said_by_tokenizer, with_added
from arrondi.checkpoint.containers.gguf.trained import added_to, pieces_of_json
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.errors import SchemeError

_UINT8, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 5, 6, 7, 8, 9
_GPT2: Final = "gpt-2"
_TAKE: Final = "Take it from the original model."


def fields_of_tokenizer(home: Path, size: int) -> dict[str, Field]:
    """The keys that describe the tokenizer of a model directory; none where it has no tokenizer.

    Args:
        home: the directory; of tokenizer.json and tokenizer.model the first is taken.
        size: rows of the model's table of tokens; the vocabulary is filled up to it.

    Raises:
        SchemeError: a tokenizer that GGUF has no keys for, or that is not known here.
        FileFormatError: its file cannot be read.
    """
    path, model_file = home / "tokenizer.json", home / "tokenizer.model"
    if path.exists():
        document = read_json(path, _TAKE)
        model = document.get("model") or {}
        kind = model.get("type")
        if kind not in ("BPE", "Unigram"):
            raise SchemeError(
                f"{path}: a vocabulary of the kind {kind!r} is not written to GGUF here. Give a GGUF file of this model: --template F16.gguf."
            )
        if kind == "BPE" and not model.get("byte_fallback"):
            fields = _byte_level(path, document, model, size)
        else:
            fields = _of_pieces(path, pieces_of_json(path, document, size), size)
        return fields | said_by_tokenizer(home)
    if model_file.exists():
        pieces = with_added(home, read_pieces(model_file))
        return _of_pieces(model_file, pieces, size) | said_by_files(home, pieces)
    return {}


def _of_pieces(path: Path, pieces: Pieces, size: int) -> dict[str, Field]:
    """Of sentence pieces."""
    more = max(size - len(pieces.tokens), 0)
    tokens = [*pieces.tokens, *(f"[PAD{len(pieces.tokens) + i}]" for i in range(more))]
    fields = _list(path, tokens, [*pieces.types, *[UNUSED] * more]) | {
        "tokenizer.ggml.model": Field(_STRING, None, pieces.kind),
        "tokenizer.ggml.pre": Field(_STRING, None, "default"),
        "tokenizer.ggml.scores": Field(_ARRAY, _FLOAT32, [*pieces.scores, *[min(pieces.scores, default=0.0)] * more]),
        "tokenizer.ggml.add_space_prefix": Field(_BOOL, None, pieces.prefix),
    }
    if pieces.kind == "t5":
        fields["tokenizer.ggml.remove_extra_whitespaces"] = Field(_BOOL, None, pieces.trimmed)
        if pieces.charsmap:
            fields["tokenizer.ggml.precompiled_charsmap"] = Field(_ARRAY, _UINT8, list(pieces.charsmap))
    return fields


def _byte_level(path: Path, document: Mapping[str, Any], model: Mapping[str, Any], size: int) -> dict[str, Field]:
    """Of bytes in pairs."""
    vocabulary: dict[str, int] = model.get("vocab") or {}
    tokens, types = added_to(document, vocabulary, dict.fromkeys(vocabulary, NORMAL), size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    return _list(path, tokens, types) | {
        "tokenizer.ggml.model": Field(_STRING, None, "gpt2"),
        "tokenizer.ggml.pre": Field(_STRING, None, _splits(path, document)),
        "tokenizer.ggml.merges": Field(_ARRAY, _STRING, merges),
    }


def _list(path: Path, tokens: list[str], types: list[int]) -> dict[str, Field]:
    """The tokens, of which no two may be spelled alike: llama.cpp does not load a model of such."""
    twice = next((t for t, n in Counter(tokens).items() if n > 1), None)
    if twice is not None:
        raise SchemeError(
            f"{path}: has the token {twice!r} under two numbers, which llama.cpp does not load. Give a GGUF file of this model: --template F16.gguf."
        )
    return {
        "tokenizer.ggml.tokens": Field(_ARRAY, _STRING, tokens),
        "tokenizer.ggml.token_type": Field(_ARRAY, _INT32, types),
    }


def _splits(path: Path, document: Mapping[str, Any]) -> str:
    """The name by which llama.cpp knows how a text is split before it is merged."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    before = document.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers") or [before]
    patterns = [p["pattern"].get("Regex") for p in parts if p.get("type") == "Split"]
    if not patterns and any(p.get("type") == "ByteLevel" and p.get("use_regex", True) for p in parts):
        return _GPT2
    named = {regex: name for name, regex in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    if len(patterns) != 1 or patterns[0] not in named:
        raise SchemeError(
            f"{path}: splits text in a way that llama.cpp has no known name for. Give a GGUF file of this model: --template F16.gguf."
        )
    return str({"llama3": "llama-bpe"}.get(named[patterns[0]], named[patterns[0]]))
