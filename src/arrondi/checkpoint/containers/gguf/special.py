"""Special tokens as the keys of a GGUF header: their numbers, whether texts begin and end with them, and the template of chats.

Owns: `said_by_tokenizer`, which asks transformers' tokenizer; `said_by_files` for a tokenizer.model, which transformers opens only with other
packages, and `with_added` for the tokens that the files beside it add.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.pieces import Pieces
from arrondi.checkpoint.containers.gguf.trained import added_to
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.errors import FileFormatError

_UINT32, _BOOL, _STRING = 4, 7, 8
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
_FILES: Final = ("special_tokens_map.json", "tokenizer_config.json")
"""Files that name special tokens; the last is believed first."""
_TAKE: Final = "Take it from the original model."


def said_by_tokenizer(home: Path) -> dict[str, Field]:
    """Of a directory whose tokenizer transformers reads."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(home, local_files_only=True)
    numbers = {own: getattr(found, f"{own}_token_id", None) for own in _SPECIAL}
    ids = found("a")["input_ids"]
    begins = found.bos_token_id is not None and ids[0] == found.bos_token_id
    ends = found.eos_token_id is not None and ids[-1] == found.eos_token_id
    return _fields(numbers, begins, ends, found.chat_template)


def with_added(home: Path, pieces: Pieces) -> Pieces:
    """The vocabulary of a tokenizer.model with what tokenizer_config.json or added_tokens.json add to it.

    Raises:
        FileFormatError: one of them cannot be read, or does not number its tokens.
    """
    config, alone = home / "tokenizer_config.json", home / "added_tokens.json"
    known = read_json(config, _TAKE).get("added_tokens_decoder") if config.exists() else None
    tokens = [{"id": number, **token} for number, token in (known or {}).items()]
    if not tokens and alone.exists():
        tokens = [{"id": number, "content": token} for token, number in read_json(alone, _TAKE).items()]
    try:
        added = [{**token, "id": int(token["id"])} for token in tokens]
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{home}: numbers its added tokens otherwise than with whole numbers. {_TAKE}") from error
    vocabulary = {token: i for i, token in enumerate(pieces.tokens)}
    texts, types = added_to({"added_tokens": added}, vocabulary, dict(zip(pieces.tokens, pieces.types, strict=True)), 0)
    more = len(texts) - len(pieces.tokens)
    return replace(pieces, tokens=texts, types=types, scores=[*pieces.scores, *[min(pieces.scores)] * more])


def said_by_files(home: Path, pieces: Pieces) -> dict[str, Field]:
    """Of a tokenizer.model, and of the files beside it.

    Raises:
        FileFormatError: one of them cannot be read.
    """
    said: dict[str, Any] = {}
    for name in _FILES:
        if (home / name).exists():
            said |= read_json(home / name, _TAKE)
    numbers: dict[str, Any] = dict(pieces.special)
    places = {token: i for i, token in enumerate(pieces.tokens)}
    for own in _SPECIAL:
        token = said.get(f"{own}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in places:
            numbers[own] = places[token]
    template = said.get("chat_template")
    beside = home / "chat_template.jinja"
    if template is None and beside.exists():
        template = beside.read_text(encoding="utf-8")
    return _fields(numbers, bool(said.get("add_bos_token", True)), bool(said.get("add_eos_token")), template)


def _fields(numbers: dict[str, Any], begins: bool, ends: bool, template: Any) -> dict[str, Field]:
    fields = {
        f"tokenizer.ggml.{key}_token_id": Field(_UINT32, None, int(numbers[own]))
        for own, key in _SPECIAL.items()
        if numbers.get(own) is not None
    }
    fields["tokenizer.ggml.add_bos_token"] = Field(_BOOL, None, begins and "tokenizer.ggml.bos_token_id" in fields)
    fields["tokenizer.ggml.add_eos_token"] = Field(_BOOL, None, ends and "tokenizer.ggml.eos_token_id" in fields)
    if isinstance(template, str):
        fields["tokenizer.chat_template"] = Field(_STRING, None, template)
    return fields
