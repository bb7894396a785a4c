"""Small vocabularies, as the library tokenizers and as SentencePiece write them.

Owns: `pairs`, `pieces`, `likely`, `scored`, `by_name` and `parts_of_words`, documents of a tokenizer.json, `model_file`, the bytes of a
tokenizer.model with the pieces of one, and `home`, a directory with either.
"""

from __future__ import annotations

import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from arrondi.sample import sample_path

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]
_OF_PIECES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_OF_WORDS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [
    "Once upon a time", "two  spaces", " leading", "  two leading", "trailing  ", " ", "\n", "\n\n\n", "tab\tb", 'He said, "Stop it"', "é à ü ß",
    "Привет, мир", "日本語のテキスト", "👍🏽 emoji 👩‍👩‍👧 family", "mixed — dash… “quotes”", "a\u00a0b", "0123456789 3.14", "def f(x):\n    return x\n", "",
    "ﬁ ligature ½ Ⅷ", "العربية", "one</s>", "zzzzzzzz qqqq",
    "trailing ", "a  b   c    d", "line\nbreak\n\nand\r\nmore", "\ttab\tand\u00a0nbsp",
    "naïve café Ünïcödé", "한국어 문장", "مرحبا بالعالم", "😀👍🏽 emoji 👩‍👩‍👧", "don't I'll we've HE'S", "1234567 3.14 1,000",
    "x=f(a)[0]{;} # code\n    return y", "<|endoftext|>after", "hello<|endoftext|> world", "𝕳𝖊𝖑𝖑𝖔 𒀀", "ALL CAPS AND MiXeD", "....!!!???", "\u200bzero\u200dwidth",
    "hello_world-foo/bar\\baz", "aaaaaaaaaaaaaaaa",
]  # fmt: skip
"""What is cut beside the sample's own words; "</s>" and "<|endoftext|>" are special where they are tokens."""


def texts() -> list[str]:
    """Of all kinds."""
    sample = (sample_path() / "heldout.txt").read_text(encoding="utf-8")
    return TEXTS + [sample[i : i + 400] for i in range(0, 4000, 400)]


def sample() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((sample_path() / "tokenizer.json").read_text(encoding="utf-8"))
    return document


WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LETTERS = {**WORDS, "use_regex": False}


def steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split_by(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


DIGITS = {"type": "Digits", "individual_digits": True}
CUTS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (WORDS, False),
    "starcoder": (steps(DIGITS, WORDS), False),
    "falcon": (steps({"type": "Punctuation", "behavior": "Contiguous"}, WORDS, {**DIGITS, "individual_digits": False}, split_by("[0-9][0-9][0-9]")), False),
    "llama-bpe": (steps(split_by(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), LETTERS), True),
    "smaug-bpe": (steps(split_by(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), LETTERS), False),
    "qwen2": (steps(split_by(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), LETTERS), False),
    "tekken": (steps(split_by(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), LETTERS), True),
    "gpt-4o": (steps(split_by(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]), LETTERS), False),
}  # fmt: skip
"""What llama.cpp calls a way to cut → the pre-tokenizer, and whether whole words are not merged."""


def by_name(name: str) -> dict[str, Any]:
    document = sample()
    document["pre_tokenizer"], document["model"]["ignore_merges"] = CUTS[name]
    if name == "falcon":  # whose own vocabulary has no such piece
        keep = document["model"]["vocab"] = {
            t: n for t, n in document["model"]["vocab"].items() if not re.match("Ġ[0-9]", t)
        }
        document["model"]["merges"] = [
            m for m in document["model"]["merges"] if {m[0], m[1], m[0] + m[1]} <= keep.keys()
        ]
    return document


def pieces(*, prefixed: bool, split: bool = False) -> dict[str, Any]:
    """Sentence pieces: the sample's merges of letters, with spaces as they write them and a piece for each byte."""
    document = sample()
    readable = {"Ġ": "▁", "Ċ": "\n"}
    letters = {t: "".join(readable.get(c, c) for c in t) for t in document["model"]["vocab"]}
    ascii_only = {t: p for t, p in letters.items() if p.isascii() or ("▁" in p and p.replace("▁", "").isascii())}
    merges = [m if isinstance(m, list) else m.split(" ") for m in document["model"]["merges"]]
    if split:
        ascii_only = {t: p for t, p in ascii_only.items() if "▁" not in p[1:]}
    merges = [[ascii_only[a], ascii_only[b]] for a, b in merges if {a, b, a + b} <= ascii_only.keys()]
    made = {a + b for a, b in merges}
    kept = [p for p in ascii_only.values() if len(p) == 1 or p in made]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *kept]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefixed else [replace]
    return {
        **document,
        "added_tokens": [
            {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            for i, t in enumerate(names[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True} if split else None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": {n: i for i, n in enumerate(names)}, "merges": merges,
        },
    }  # fmt: skip


def scored() -> dict[str, Any]:
    """Pieces with scores, without a table of letters."""
    found = [p for p in pieces(prefixed=True)["model"]["vocab"] if not p.startswith("<")]
    rows = [["<unk>", 0.0], *([p, -1.0 - 0.37 * i % 7 - 1 / len(p)] for i, p in enumerate(found))]
    return {
        **pieces(prefixed=True),
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": rows, "byte_fallback": False},
    }


def parts_of_words(*, lowercase: bool = True) -> dict[str, Any]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-_/\\[]{}()=#;日本語のテキストABCDEF"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "once", "##on", "time", "new"]
    special = [{"id": i, "content": n, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for i, n in enumerate(names[:4])]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
            "vocab": {n: i for i, n in enumerate(dict.fromkeys(names))},
        },
    }  # fmt: skip


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


def home(folder: Path, document: dict[str, Any], file: bytes = b"") -> Path:
    """A directory with this tokenizer: as a tokenizer.model where there is one."""
    folder.mkdir(exist_ok=True)
    known = str(document.get("model", {}).get("vocab", SPECIAL))
    named = _OF_WORDS if "[CLS]" in known else _OF_PIECES
    names = {word: token for word, token in named.items() if repr(token) in known}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if file:
        (folder / "tokenizer.model").write_bytes(file)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
