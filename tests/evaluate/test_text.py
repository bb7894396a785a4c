"""Text to windows: the protocol, and texts that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.errors import DataError, FileFormatError
from arrondi.evaluate.text import load_tokenizer, protocol, read_windows, special_tokens
from arrondi.sample import sample_path


class Letters:
    """A tokenizer by hand: one token for each character."""

    def __init__(self, *, bos: int | None = None, cls: int | None = None, sep: int | None = None) -> None:
        self.bos_token_id, self.cls_token_id, self.sep_token_id = bos, cls, sep

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


@pytest.mark.parametrize("length", [0, 1, 9])
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
