"""Small vocabularies of sentence pieces, as the library tokenizers and as SentencePiece write them.

Owns: `pairs` and `likely`, documents of a tokenizer.json, and `model_file`, the bytes of a tokenizer.model with the pieces of one.
"""

from __future__ import annotations

import json
import struct
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from arrondi.sample import sample_path

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [
    "Once upon a time", "two  spaces", " leading", "  two leading", "trailing  ", " ", "\n", "\n\n\n", "tab\tb", 'He said, "Stop it"', "é à ü ß",
    "Привет, мир", "日本語のテキスト", "👍🏽 emoji 👩‍👩‍👧 family", "mixed — dash… “quotes”", "a\u00a0b", "0123456789 3.14", "def f(x):\n    return x\n", "",
    "ﬁ ligature ½ Ⅷ", "العربية", "one</s>", "zzzzzzzz qqqq",
]  # fmt: skip
"""What is cut beside the sample's own words; the token in the last but one is special."""


def texts() -> list[str]:
    """Of all kinds."""
    sample = (sample_path() / "heldout.txt").read_text(encoding="utf-8")
    return TEXTS + [sample[i : i + 400] for i in range(0, 4000, 400)]


@cache
def _pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    text = (sample_path() / "heldout.txt").read_text(encoding="utf-8")[:20000]
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    joined = ["".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    single = sorted({c for token in joined for c in token} | {SPACE})
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *BYTES, *joined, *single])}
    merges = [[t[:i], t[i:]] for t in joined for i in range(1, len(t)) if t[:i] in vocabulary and t[i:] in vocabulary]
    return json.dumps({"vocab": vocabulary, "merges": merges})


def pairs() -> dict[str, Any]:
    """Pairs with byte fallback, as Llama 2 has them: every way to join a piece is in the list of merges."""
    made = json.loads(_pairs())
    tokenizer = Tokenizer(
        models.BPE(
            made["vocab"], [tuple(m) for m in made["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return _finished(tokenizer)


def likely() -> dict[str, Any]:
    """Likely pieces, as T5 has them."""
    made = [t for t in json.loads(_pairs())["vocab"] if t not in BYTES]
    scores = [(t, 0.0 if t in SPECIAL else -3.0 - i / 64 - 0.5 * (len(t) == 1)) for i, t in enumerate(made)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), SPACE)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> dict[str, Any]:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def model_file(document: dict[str, Any]) -> bytes:
    """A tokenizer.model with the pieces of a document of `pairs`, in its order."""
    order: dict[str, int] = {}
    for merge in document["model"]["merges"]:
        order.setdefault("".join(merge), len(order))
    pieces = b""
    for token in document["model"]["vocab"]:
        kind = 2 if token == "<unk>" else 3 if token in SPECIAL else 6 if token in BYTES else 1
        score = -float(order.get(token, len(order))) if kind == 1 else 0.0
        raw = token.encode()
        piece = _bytes(1, raw) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        pieces += _bytes(1, piece)
    trainer = _number(3, 2) + _number(35, 1) + _number(40, 0) + _number(41, 1) + _number(42, 2) + _number(43, -1)
    return pieces + _bytes(2, trainer) + _bytes(3, _bytes(1, b"identity") + _number(3, 1) + _number(4, 0))


def _varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
