"""A tokenizer as the keys of a GGUF header.

Owns: `fields_of_tokenizer`. Vocabularies of bytes in pairs (GPT-2, Llama 3, Qwen) and of sentence pieces (Llama, Mistral, Gemma) are
written from tokenizer.json; a vocabulary of another kind is refused rather than written as one of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.errors import SchemeError

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_GPT2: Final = "gpt-2"
_SPECIAL: Final = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "cls": "cls",
    "mask": "mask",
}
"""Special tokens of transformers → their keys in GGUF, which spells one of them so."""
_BYTES: Final = frozenset(f"<0x{i:02X}>" for i in range(256))


def fields_of_tokenizer(home: Path, size: int) -> dict[str, Field]:
    """The keys that describe the tokenizer of a model directory; none where it has no tokenizer.

    Args:
        home: the directory.
        size: rows of the model's table of tokens; the vocabulary is filled up to it.

    Raises:
        SchemeError: a tokenizer that GGUF has no keys for, or that is not known here.
        FileFormatError: its file cannot be read.
    """
    path = home / "tokenizer.json"
    if not path.exists():
        return {}
    document = read_json(path, "Take it from the original model.")
    model = document.get("model") or {}
    if model.get("type") != "BPE":
        raise SchemeError(
            f"{path}: a vocabulary of the kind {model.get('type')!r} is not written to GGUF here. Give a GGUF file of this model: --template F16.gguf."
        )
    tokens, types = _tokens(document, model, size)
    byte_level = not model.get("byte_fallback")
    fields = {
        "tokenizer.ggml.model": Field(_STRING, None, "gpt2" if byte_level else "llama"),
        "tokenizer.ggml.pre": Field(_STRING, None, _splits(path, document) if byte_level else "default"),
        "tokenizer.ggml.tokens": Field(_ARRAY, _STRING, tokens),
        "tokenizer.ggml.token_type": Field(_ARRAY, _INT32, types),
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    if byte_level:
        fields["tokenizer.ggml.merges"] = Field(_ARRAY, _STRING, merges)
    else:
        fields["tokenizer.ggml.scores"] = Field(_ARRAY, _FLOAT32, _scores(tokens, model))
        fields["tokenizer.ggml.add_space_prefix"] = Field(_BOOL, None, _prefixed(document))
    return fields | _special(home)


def _tokens(document: Mapping[str, Any], model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and of what kind it is."""
    vocabulary: dict[str, int] = model.get("vocab") or {}
    added = {t["id"]: t for t in document.get("added_tokens") or []}
    last = max((*vocabulary.values(), *added), default=-1) + 1
    tokens = [f"[PAD{i}]" for i in range(max(size, last))]
    types = [_UNUSED] * len(tokens)
    for token, number in vocabulary.items():
        unknown = token == model.get("unk_token")
        tokens[number], types[number] = (
            token,
            _BYTE if model.get("byte_fallback") and token in _BYTES else _UNKNOWN if unknown else _NORMAL,
        )
    for number, token in added.items():
        tokens[number] = token["content"]
        if types[number] != _UNKNOWN:
            types[number] = _CONTROL if token.get("special") else _USER
    return tokens, types


def _scores(tokens: list[str], model: Mapping[str, Any]) -> list[float]:
    """How early pairs are merged into a token: llama.cpp merges the pair with the highest score first, as the list of merges says."""
    order = {
        m.replace(" ", "") if isinstance(m, str) else "".join(m): i
        for i, m in reversed([*enumerate(model.get("merges") or [])])
    }
    last = len(order)
    return [-float(order.get(token, last)) for token in tokens]


def _prefixed(document: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normal = json.dumps(document.get("normalizer") or {})
    before = json.dumps(document.get("pre_tokenizer") or {})
    return '"Prepend"' in normal or '"prepend_scheme": "always"' in before or '"prepend_scheme": "first"' in before


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


def _special(home: Path) -> dict[str, Field]:
    """The numbers of special tokens, whether texts begin and end with them, and the template of chats."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(home, local_files_only=True)
    fields: dict[str, Field] = {}
    for own, key in _SPECIAL.items():
        number = getattr(found, f"{own}_token_id", None)
        if number is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = Field(_UINT32, None, int(number))
    ids = found("a")["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = Field(
        _BOOL, None, found.bos_token_id is not None and ids[0] == found.bos_token_id
    )
    fields["tokenizer.ggml.add_eos_token"] = Field(
        _BOOL, None, found.eos_token_id is not None and ids[-1] == found.eos_token_id
    )
    if isinstance(found.chat_template, str):
        fields["tokenizer.chat_template"] = Field(_STRING, None, found.chat_template)
    return fields
