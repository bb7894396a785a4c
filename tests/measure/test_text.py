"""Text to windows: the protocol, documents of files, and texts that cannot be used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.errors import DataError, FileFormatError
from arrondi.measure import read_windows
from arrondi.measure.text import fit_length, load_tokenizer, positions_of, protocol, special_tokens
from arrondi.sample import sample_path


class Letters:
    """A tokenizer by hand: one token for each character."""

    def __init__(
        self, *, bos: int | None = None, cls: int | None = None, sep: int | None = None, eos: int | None = None
    ) -> None:
        self.bos_token_id, self.cls_token_id, self.sep_token_id, self.eos_token_id = bos, cls, sep, eos

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def abc(tmp_path: Path) -> Path:
    path = tmp_path / "abc.txt"
    path.write_text("abcdefghij")
    return path


def test_windows_do_not_overlap_and_the_last_partial_one_is_dropped(abc: Path) -> None:
    windows = read_windows(abc, Letters(), 3)
    assert ["".join(map(chr, w)) for w in windows.ids.tolist()] == ["abc", "def", "ghi"]
    assert windows.source == "abc.txt"
    assert windows.text_hash == hashlib.sha256(b"abcdefghij").hexdigest()
    assert windows.ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Letters(bos=1), [[1, 97, 98], [1, 99, 100]]),
        (Letters(cls=2, sep=3), [[2, 97, 3], [2, 98, 3]]),
        (Letters(bos=1, cls=2, sep=3), [[2, 97, 3], [2, 98, 3]]),
        (Letters(bos=0), [[0, 97, 98], [0, 99, 100]]),
    ],
    ids=["bos", "encoder", "both", "bos is token 0"],
)
def test_special_tokens_count_towards_the_length(tokenizer: Any, expected: list[list[int]], abc: Path) -> None:
    assert read_windows(abc, tokenizer, 3).ids[:2].tolist() == expected


def test_batches_hold_all_windows_in_order(abc: Path) -> None:
    windows = read_windows(abc, Letters(), 2)
    for size in (0, 1, 2, 3, 5, 9):
        batches = windows.batches(size)
        assert torch.equal(torch.cat(batches), windows.ids)
        assert all(len(b) == max(size, 1) for b in batches[:-1])


def test_the_protocol_is_said_in_one_sentence() -> None:
    assert protocol(Letters(bos=1), 256) == "non-overlapping windows of 255 tokens, BOS before each, every token of a window predicted once"  # fmt: skip
    assert "windows of 126 tokens, CLS and SEP around each" in protocol(Letters(cls=1, sep=2), 128)
    assert "windows of 64 tokens, nothing before each" in protocol(Letters(), 64)
    assert "windows of 64 tokens as they were given" in protocol(None, 64)


def letters(windows: Any) -> str:
    """All windows as one text; token 0 is written |."""
    return "".join("|" if token == 0 else chr(token) for token in windows.ids.flatten().tolist())


FILES = {
    "a byte-order mark": ("bom.txt", b"\xef\xbb\xbfabcdef", "abcdef"),
    "lines that end as elsewhere": ("crlf.txt", b"a\r\nb\rc\n", "a\nb\nc\n"),
    "JSON lines of texts": ("a.jsonl", b'"abc"\n\n"def"\n', "abc|de"),
    "JSON lines of objects": ("a.JSONL", b'{"text": "abc", "id": 1}\r\n{"text": "def"}', "abc|de"),
    "a mark and a line separator": ("b.ndjson", b'\xef\xbb\xbf{"text": "ab\xe2\x80\xa8c"}\n"def"', "ab\u2028c|def"),
    "a JSON list": ("a.json", b'["abc", {"text": "def"}, "   "]', "abc|de"),
    "JSON as plain text": ("a.txt", b'{"text": 1}!', '{"text": 1}!'),
}


@pytest.mark.parametrize("kind", FILES)
def test_documents_of_files(kind: str, tmp_path: Path) -> None:
    name, content, expected = FILES[kind]
    (tmp_path / name).write_bytes(content)
    windows = read_windows(tmp_path / name, Letters(eos=0), 2)
    assert letters(windows) == expected[: len(expected) // 2 * 2]
    assert windows.text_hash == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("end", "expected"), [({"eos": 0}, "ab|cd|ef"), ({}, "abcdef"), ({"sep": 0}, "ab|cd|ef")], ids=str
)
def test_texts_are_joined_by_the_end_token(end: dict[str, int], expected: str) -> None:
    assert letters(read_windows(["ab", "cd", " \n", "ef"], Letters(**end), 2)) == expected


NO_DOCUMENTS = {
    "no messages": ('{"messages": []}', "line 1: the field `messages` holds a conversation without messages"),
    "messages of another kind": (
        '{"messages": [3]}',
        "line 1: the field `messages` holds a list. Give .* role and content",
    ),
    "no content": ('[{"role": "user"}]', "line 1: message 1 has no role or no content"),
    "another field": ('"a"\n\n{"body": "x"}', "line 3: an object with the fields 'body' has no field `text`.*--column"),
    "no text": ('{"text": "a"}\n{"text": null}', "line 2: the field `text` holds null"),
    "a number": ("3", "line 1: a number is no text"),
    "half a line": ('"a"\n{"text": "b', "line 2: not JSON"),
    "plain text": ("Once upon a time.", r"line 1: not JSON .* plain text belongs into a \.txt file"),
}


@pytest.mark.parametrize("kind", NO_DOCUMENTS)
def test_lines_that_are_no_documents_are_named(kind: str, tmp_path: Path) -> None:
    content, words = NO_DOCUMENTS[kind]
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(FileFormatError, match=words):
        read_windows(tmp_path / "x.jsonl", Letters(), 1)
    with pytest.raises(FileFormatError, match=r"x\.json"):
        (tmp_path / "x.json").write_text(content)
        read_windows(tmp_path / "x.json", Letters(), 1)


@pytest.mark.parametrize("content", ["", " \n\t\n ", "\ufeff", "\u200b\u00a0\x00\n" * 50], ids=repr)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_nothing_but_white_space_is_no_text(content: str, name: str, tmp_path: Path) -> None:
    written = content if name == "a.txt" else f'{json.dumps(content)}\n{{"text": " "}}\n'
    (tmp_path / name).write_text(written, encoding="utf-8")
    with pytest.raises(DataError, match="holds no text, only white space"):
        read_windows(tmp_path / name, Letters(), 2, "calibration text")


def test_windows_are_as_long_as_the_model_takes_and_the_cut_is_said() -> None:
    assert fit_length(512, None) == fit_length(512, 512) == (512, None)
    length, note = fit_length(512, 128)
    assert length == 128 and note is not None and "128 tokens, not 512" in note


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.GPT2Config(n_positions=78), 78),
        (transformers.RobertaConfig(max_position_embeddings=80, pad_token_id=1, vocab_size=80), 78),
        (transformers.BloomConfig(), None),
    ],
    ids=lambda v: getattr(v, "model_type", str(v)),
)
def test_positions_are_those_that_a_model_runs_with(config: Any, expected: int | None) -> None:
    for name in ("num_hidden_layers", "n_layer"):
        setattr(config, name, 1)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert positions_of(model) == expected
    if config.model_type == "roberta":
        whole = transformers.AutoModel.from_config(config).eval()
        whole(torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            whole(torch.full((1, expected + 1), 5))


@pytest.mark.parametrize("length", [1, 9])
def test_a_text_shorter_than_one_window_says_how_long_it_is(length: int, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * length)
    with pytest.raises(DataError) as caught:
        read_windows(path, Letters(bos=1), 11, "calibration text")
    message = str(caught.value)
    assert f"short.txt: {length} tokens of calibration text, but one sample takes 10" in message
    assert "longer text or a smaller --seq-len" in message


def test_a_window_with_no_room_for_text_is_refused(abc: Path) -> None:
    with pytest.raises(DataError, match="2 tokens has no room beside its special tokens"):
        read_windows(abc, Letters(cls=1, sep=2), 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.arrow", "a table.* .jsonl"), ("a.CSV", "a table"), ("a.jsonl.gz", "packed. Unpack"), ("a.zip", "packed"), ("a.pdf", "a document")],
)  # fmt: skip
def test_files_that_are_no_text_by_their_name(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("PAR1 could be read as text")
    with pytest.raises(FileFormatError, match=words):
        read_windows(tmp_path / name, Letters(), 2)


def test_text_in_two_bytes_a_character_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("abcdef".encode("utf-16-le"))
    with pytest.raises(FileFormatError, match=r"NUL characters.* UTF-16"):
        read_windows(tmp_path / "a.txt", Letters(), 2)


def test_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"abc"\n"a\\ud800b"')
    for data in (tmp_path / "a.jsonl", ["abc", "a\ud800b"]):
        with pytest.raises(DataError, match=r"half of a surrogate pair \(\\ud800\)"):
            read_windows(data, Letters(), 2)


@pytest.mark.parametrize("kind", ["missing", "directory", "binary"])
def test_a_text_that_is_none_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if kind == "directory":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"caf\xe9 \xff")
    words = {"missing": "no such file", "directory": "a directory", "binary": r"not UTF-8 text \(byte 3\)"}[kind]
    with pytest.raises(FileFormatError, match=words) as caught:
        read_windows(path, Letters(), 3, "evaluation text")
    assert str(path) in str(caught.value) and "evaluation text" in str(caught.value)


def test_the_sample_tokenizer_starts_with_its_bos() -> None:
    tokenizer = load_tokenizer(sample_path())
    assert special_tokens(tokenizer) == ([tokenizer.bos_token_id], [])


def test_a_model_without_a_tokenizer_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match=r"no tokenizer files. Copy tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileFormatError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("model_max_length", "x"), ("eos_token", ["a"])])
def test_a_tokenizer_that_breaks_when_it_is_used_is_refused(key: str, value: object, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path() / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FileFormatError, match="the tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
