"""The vocabulary of the file that SentencePiece itself writes (tokenizer.model), read without a package.

Owns: `read_pieces`. What llama.cpp's tokenizer of that kind does not do to a text is refused.

Source: sentencepiece_model.proto of google/sentencepiece (messages ModelProto, TrainerSpec, NormalizerSpec).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.gguf.tokens import BYTE, NORMAL, SPACE, USER, Vocabulary
from arrondi.checkpoint.containers.gguf.trained import BYTES_OF_LIKELY
from arrondi.checkpoint.containers.wire import BYTES, Field, Wire, signed
from arrondi.errors import FileFormatError, SchemeError

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2
_SPACES: Final = {"prefix": 3, "trimmed": 4, "escaped": 5}
"""What is done to spaces → the field of NormalizerSpec that says so; all of it is where they say nothing."""
_SUFFIX: Final = 24
"""Field of TrainerSpec: spaces are marked at the end of a word."""
_TAKE: Final = "Take it from the original model."
_NUMBERS: Final[Mapping[int, tuple[str, int]]] = {40: ("unk", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("pad", -1)}
"""Field of TrainerSpec → the special token whose number it is, and that number where it is left out."""


def read_pieces(path: Path) -> Vocabulary:
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


def _pieces(wire: Wire) -> Vocabulary:
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
        raise SchemeError("it holds no vocabulary of pairs or of likely pieces.")
    said = {name: bool(normalizer[n].value) if n in normalizer else True for name, n in _SPACES.items()}
    if not said["escaped"] or (_SUFFIX in trainer and trainer[_SUFFIX].value):
        raise SchemeError("it marks spaces otherwise than by a piece that begins with them, which llama.cpp does not.")
    if algorithm == _BPE and (charsmap or said["trimmed"]):
        what = "changes characters" if charsmap else "trims spaces"
        raise SchemeError(f"it {what} before it cuts texts, which llama.cpp does not for a vocabulary of pairs.")
    if algorithm == _UNIGRAM and BYTE in types:
        raise SchemeError(BYTES_OF_LIKELY)
    flags = {"add_space_prefix": said["prefix"]}
    if algorithm == _UNIGRAM:
        flags["remove_extra_whitespaces"] = said["trimmed"]
    special = {name: signed(trainer[n].value) if n in trainer else usual for n, (name, usual) in _NUMBERS.items()}
    return Vocabulary(
        "llama" if algorithm == _BPE else "t5", tokens, types, scores=scores, flags=flags, charsmap=charsmap,
        special={name: n for name, n in special.items() if 0 <= n < len(tokens)},
    )  # fmt: skip
