"""The pieces of a vocabulary that writes spaces as ▁, out of the file that SentencePiece itself writes (tokenizer.model).

Owns: `Pieces` and `read_pieces`. What llama.cpp's tokenizer of that kind does not do to a text is refused.

Source: sentencepiece_model.proto of google/sentencepiece (messages ModelProto, TrainerSpec, NormalizerSpec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.wire import BYTES, Field, Wire, signed
from arrondi.errors import FileFormatError, SchemeError

SPACE: Final = "▁"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens: SentencePiece, and GGUF after it, have the same numbers."""
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2
_TAKE: Final = "Take it from the original model."
_NUMBERS: Final[Mapping[int, tuple[str, int]]] = {40: ("unk", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}
"""Field of TrainerSpec → the special token whose number it is, and that number where it is left out."""


@dataclass(frozen=True)
class Pieces:
    """A vocabulary.

    Attributes:
        kind: how a text is cut: "llama", where the pair with the highest score is joined first, or "t5", the likeliest pieces.
        tokens, scores, types: by number.
        prefix: a space is put before the text.
        trimmed: spaces at the ends are dropped, and several in a row are one.
        charsmap: what is done to characters before, as SentencePiece compiles it.
        special: "bos", "eos", "unk" or "pad" → its number.
    """

    kind: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    prefix: bool
    trimmed: bool = False
    charsmap: bytes = b""
    special: Mapping[str, int] = field(default_factory=dict)


def read_pieces(path: Path) -> Pieces:
    """The vocabulary of a tokenizer.model.

    Raises:
        FileFormatError: it cannot be read.
        SchemeError: it cuts texts in a way that llama.cpp does not.
    """
    try:
        with path.open("rb") as file:
            return _pieces(Wire(path, file, "SentencePiece model", _TAKE))
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). {_TAKE}") from error


def _pieces(wire: Wire) -> Pieces:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Field] = {}
    normalizer: dict[int, Field] = {}
    for message in wire.fields(0, wire.size):
        parts = {f.number: f for f in wire.fields(message.start, message.stop)} if message.kind == BYTES else {}
        if message.number == _PIECE:
            kind = parts[3].value if 3 in parts else NORMAL
            if not NORMAL <= kind <= BYTE:
                raise wire.wrong(message.start, f"a piece of the kind {kind}")
            text = wire.text(parts[1]) if 1 in parts else ""
            tokens.append(
                text.replace(SPACE, " ") if kind == USER else text
            )  # they are looked for in the text as it is
            scores.append(wire.real(parts[2]) if 2 in parts else 0.0)
            types.append(kind)
        elif message.number == _TRAINER:
            trainer = parts
        elif message.number == _NORMALIZER:
            normalizer = parts
    algorithm = trainer[3].value if 3 in trainer else _UNIGRAM
    charsmap = wire.bytes(normalizer[2]) if 2 in normalizer else b""
    if not tokens or algorithm not in (_UNIGRAM, _BPE):
        raise SchemeError(
            f"{wire.path}: holds no vocabulary of pairs or of likely pieces. Give a GGUF file of this model: --template F16.gguf."
        )
    if algorithm == _BPE and charsmap:
        raise SchemeError(
            f"{wire.path}: changes characters before it cuts a text, which llama.cpp does not for a vocabulary of pairs. Give a GGUF file of this model: --template F16.gguf."
        )
    if algorithm == _UNIGRAM and BYTE in types:
        raise bytes_of_unigrams(wire.path)
    special = {name: signed(trainer[n].value) if n in trainer else usual for n, (name, usual) in _NUMBERS.items()}
    return Pieces(
        "llama" if algorithm == _BPE else "t5", tokens, scores, types,
        prefix=3 not in normalizer or bool(normalizer[3].value), trimmed=algorithm == _UNIGRAM and (4 not in normalizer or bool(normalizer[4].value)),
        charsmap=charsmap, special={name: n for name, n in special.items() if 0 <= n < len(tokens)},
    )  # fmt: skip


def bytes_of_unigrams(path: Path) -> SchemeError:
    """The refusal of a vocabulary of likely pieces that spells unknown characters in bytes."""
    return SchemeError(
        f"{path}: spells characters that it lacks in bytes, which llama.cpp does not for a vocabulary of likely pieces. Give a GGUF file of this model: --template F16.gguf."
    )
