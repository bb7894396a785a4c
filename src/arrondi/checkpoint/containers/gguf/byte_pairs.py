"""Vocabularies of bytes, written as letters, that are joined in the order of a list (GPT-2, Llama 3, Qwen, Falcon).

Owns: `byte_pairs_of`. What a tokenizer.json does to a text before that must be what llama.cpp does: anything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.merges import all_reached, pairs_of
from arrondi.checkpoint.containers.gguf.splits import flat, name_of_splits
from arrondi.checkpoint.containers.gguf.tokens import NORMAL, Vocabulary, added_to
from arrondi.errors import SchemeError

_COMPOSED: Final = "NFC"
"""The one normal form that such tokenizers may ask for: llama.cpp takes texts as they come, and nearly all are in it."""
_APART: Final = {"falcon": re.compile("Ġ[0-9]")}
"""Pieces that no merge reaches under a way to cut, and that llama.cpp, which cuts a little less under that name, would make."""


def byte_pairs_of(document: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json whose model is BPE without byte fallback.

    Raises:
        SchemeError: something is done to a text that llama.cpp does not do.
    """
    model = document["model"]
    vocabulary: dict[str, int] = model.get("vocab") or {}
    strange = [step.get("type") for step in flat(document.get("normalizer"), "normalizers")]
    if set(strange) - {_COMPOSED}:
        raise SchemeError(f"it changes texts by {strange[0]} before it cuts them, which llama.cpp does not.")
    ignored = bool(model.get("ignore_merges"))
    pre = name_of_splits(document.get("pre_tokenizer"), ignored, lambda: all_reached(document))
    apart = _APART.get(pre)
    if apart and (piece := next((p for p in vocabulary if apart.match(p)), None)):
        raise SchemeError(f"it never makes its piece {piece!r}, and llama.cpp would.")
    kinds = dict.fromkeys(vocabulary, NORMAL)
    tokens, types = added_to(vocabulary, kinds, document.get("added_tokens") or [], pieces=False)
    return Vocabulary("gpt2", tokens, types, pre=pre, merges=[" ".join(pair) for pair in pairs_of(model)])
