"""What a GGUF file says of a tokenizer: the tokens by number, of what kind each is, and how a text is cut into them.

Owns: `Vocabulary`, the kinds of tokens, `added_to`, and `caveats_of`. llama.cpp knows four ways to cut: pairs of bytes that are joined in the
order of a list ("gpt2"), sentence pieces of which the pair with the highest score is joined first ("llama"), sentence pieces whose sum of scores
is largest ("t5"), and parts of words ("bert").

Source: the GGUF specification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from arrondi.checkpoint.containers.gguf.header import Field
from arrondi.errors import SchemeError

_UINT8, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 5, 6, 7, 8, 9

SPACE: Final = "▁"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens: SentencePiece, and GGUF after it, have the same numbers."""
BYTES: Final = frozenset(f"<0x{i:02X}>" for i in range(256))
"""Pieces that stand for one byte each."""
_KEY: Final = "tokenizer.ggml."
_NONE: Final = "The source has no tokenizer that is read here: the file has none, and llama.cpp cuts no text with it."
_NO_BYTES: Final = "The vocabulary has no pieces for single bytes: llama.cpp ends at a letter that is no piece, where transformers takes the unknown token."


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, in the words of GGUF.

    Attributes:
        model: how a text is cut: "gpt2", "llama", "t5" or "bert".
        tokens, types: by number.
        pre: the name by which llama.cpp knows how a text is split before its bytes are joined.
        scores: of sentence pieces, by number.
        merges: of bytes, in order.
        flags: what else is true or false, by key.
        charsmap: what is done to characters before, as SentencePiece compiles it.
        special: "bos", "eos", "unk" or "pad" → its number, where the file of the tokenizer says it.
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""
    special: Mapping[str, int] = field(default_factory=dict)

    def fields(self, size: int) -> dict[str, Field]:
        """The keys of a header.

        Args:
            size: rows of the model's table of tokens, up to which they are filled with tokens that no text has.

        Raises:
            SchemeError: two tokens are spelled alike: llama.cpp does not load a model of such.
        """
        twice = next((t for t, n in Counter(self.tokens).items() if n > 1), None)
        if twice is not None:
            raise SchemeError(f"it has the token {twice!r} under two numbers, which llama.cpp does not load.")
        more = range(len(self.tokens), size)
        fields = {
            "model": Field(_STRING, None, self.model),
            "pre": Field(_STRING, None, self.pre),
            "tokens": Field(_ARRAY, _STRING, [*self.tokens, *map(_filler, more)]),
            "token_type": Field(_ARRAY, _INT32, [*self.types, *[UNUSED] * len(more)]),
            **{key: Field(_BOOL, None, value) for key, value in self.flags.items()},
        }
        if self.scores is not None:
            scores = [*self.scores, *[min(self.scores, default=0.0)] * len(more)]
            fields["scores"] = Field(_ARRAY, _FLOAT32, scores)
        if self.merges is not None:
            fields["merges"] = Field(_ARRAY, _STRING, self.merges)
        if self.charsmap:
            fields["precompiled_charsmap"] = Field(_ARRAY, _UINT8, list(self.charsmap))
        return {f"{_KEY}{key}": value for key, value in fields.items()}


def added_to(
    vocabulary: Mapping[str, int], kinds: Mapping[str, int], added: Iterable[Mapping[str, Any]], *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Every token by its number, and of what kind it is.

    Args:
        vocabulary: token → its number.
        kinds: token → its kind.
        added: tokens that are found before a text is cut, each with its "id" and "content", and "special" or "normalized" where they are.
        pieces: spaces are written as ▁ in the vocabulary. Such a token is searched for as it is in texts, so that one with a ▁ finds nothing that
            pieces do not, unless normalized texts are searched.
    """
    found = {int(t["id"]): t for t in added}
    last = max((*vocabulary.values(), *found), default=-1) + 1
    tokens, types = [_filler(i) for i in range(last)], [UNUSED] * last
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, kinds[token]
    for number, entry in found.items():
        text, special = entry["content"], bool(entry.get("special"))
        spaced = pieces and not special and SPACE in text
        if types[number] == UNKNOWN or (spaced and not entry.get("normalized")):
            continue
        tokens[number] = text.replace(SPACE, " ") if spaced else text
        types[number] = CONTROL if special else USER
    return tokens, types


def caveats_of(fields: Mapping[str, Field]) -> list[str]:
    """Sentences about what a reader should know of the tokenizer that a header describes."""
    model, tokens = fields.get(f"{_KEY}model"), fields.get(f"{_KEY}tokens")
    if model is None or tokens is None:
        return [_NONE]
    return [_NO_BYTES] if model.value == "llama" and not BYTES.issubset(tokens.value) else []


def _filler(number: int) -> str:
    """A token that no text has."""
    return f"[PAD{number}]"
