"""Special tokens as the keys of a GGUF header: their numbers, whether texts begin and end with them, and the template of chats.

Owns: `said_by_tokenizer`, which asks transformers' tokenizer; `said_by_files` for a tokenizer.model, which transformers opens
only with other packages, and `with_added` for the tokens that the files beside it add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.checkpoint.containers.gguf.tokens import Vocabulary, added_to
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
_ASSUMED: Final = ("bos", "eos")
"""Tokens for which llama.cpp has numbers of its own where a file names none; the config may know them."""
_FILES: Final = ("special_tokens_map.json", "tokenizer_config.json")
"""Files that name special tokens; the last is believed first."""
_TAKE: Final = "Take it from the original model."


def said_by_tokenizer(home: Path, found: Any, model: str) -> dict[str, Field]:
    """Of a tokenizer that transformers loads.

    Args:
        home: its directory.
        found: the tokenizer.
        model: how its texts are cut, as `Vocabulary` says it.
    """
    numbers = {own: getattr(found, f"{own}_token_id", None) for own in _SPECIAL}
    if model == "bert":  # in whose files the token that begins a text is bos
        numbers["bos"] = numbers["cls"]
    numbers = _assumed(home, numbers)
    ids = found("a")["input_ids"]
    begins, ends = (numbers[own] is not None and ids[at] == numbers[own] for own, at in (("bos", 0), ("eos", -1)))
    return _fields(numbers, begins, ends, found.chat_template)


def with_added(home: Path, found: Vocabulary) -> Vocabulary:
    """The vocabulary of a tokenizer.model with what tokenizer_config.json or added_tokens.json add to it.

    Raises:
        FileFormatError: one of them cannot be read, or does not number its tokens.
    """
    config, alone = home / "tokenizer_config.json", home / "added_tokens.json"
    known = read_json(config, _TAKE).get("added_tokens_decoder") if config.exists() else None
    try:
        added = [
            {**token, "id": int(number), "content": str(token["content"])} for number, token in (known or {}).items()
        ]
        if not added and alone.exists():
            added = [{"id": int(number), "content": token} for token, number in read_json(alone, _TAKE).items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{home}: its added tokens are no texts by whole numbers. {_TAKE}") from error
    vocabulary = {token: i for i, token in enumerate(found.tokens)}
    kinds, scores = dict(zip(found.tokens, found.types, strict=True)), found.scores or []
    texts, types = added_to(vocabulary, kinds, added, pieces=True)
    lowest = min(scores, default=0.0)
    return replace(found, tokens=texts, types=types, scores=[*scores, *[lowest] * (len(texts) - len(scores))])


def said_by_files(home: Path, found: Vocabulary) -> dict[str, Field]:
    """Of a tokenizer.model, and of the files beside it.

    Raises:
        FileFormatError: one of them cannot be read.
    """
    said: dict[str, Any] = {}
    for name in _FILES:
        if (home / name).exists():
            said |= read_json(home / name, _TAKE)
    numbers: dict[str, Any] = dict(found.special)
    places = {token: i for i, token in enumerate(found.tokens)}
    for own in _SPECIAL:
        token = said.get(f"{own}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in places:
            numbers[own] = places[token]
    numbers = _assumed(home, numbers)
    template = said.get("chat_template")
    beside = home / "chat_template.jinja"
    if template is None and beside.exists():
        template = beside.read_text(encoding="utf-8")
    return _fields(numbers, bool(said.get("add_bos_token", True)), bool(said.get("add_eos_token")), template)


def _assumed(home: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, with those of the config where the tokenizer names none."""
    config = read_json(home / "config.json", "Download it again.") if (home / "config.json").exists() else {}
    more = {}
    for own in _ASSUMED:
        known = config.get(f"{own}_token_id")
        known = known[0] if isinstance(known, list) and known else known
        if numbers.get(own) is None and type(known) is int and known >= 0:
            more[own] = known
    return {**numbers, **more}


def _fields(numbers: Mapping[str, Any], begins: bool, ends: bool, template: Any) -> dict[str, Field]:
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
