"""A short run of the fuzzer of GGUF files, and that it would notice."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.header import read_header
from arrondi.errors import FileFormatError
from tests.fuzz.gguf import KINDS, bases, run, verdict


def test_mutants_are_read_or_refused() -> None:
    result = run(seed=2026, mutants=100, seconds=300)
    assert result.mutants == 100 * len(KINDS)
    assert not result.failures, result.failures[:3]


def test_another_place_of_a_tensor_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(path: Path) -> object:
        header = read_header(path)
        name, stored = next(iter(header.tensors.items()))
        return type(header)(
            path, header.version, header.fields, {**header.tensors, name: stored._replace(start=stored.start + 32)}
        )

    assert verdict(bases()["header"], "header", tmp_path) is None
    monkeypatch.setattr("tests.fuzz.gguf.read_header", moved)
    assert "to the package gguf" in str(verdict(bases()["header"], "header", tmp_path))


@pytest.mark.parametrize(("new", "said"), [(2**31, "2147483648"), (None, "None")])
def test_a_number_of_blocks_that_cannot_be_is_refused(new: int | None, said: str, tmp_path: Path) -> None:
    """Of one that is left out, the class would take one of its own."""
    key = b"block_count"
    field = key + struct.pack("<II", 4, 1)
    raw = bases()["model"].replace(field, b"block_C" + field[7:] if new is None else key + struct.pack("<II", 4, new))
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match=f"gives {said} as its number of blocks, and holds 12 tensors"):
        Checkpoint.open(tmp_path / "m.gguf")


def test_an_empty_tensor_with_a_long_axis_is_refused(tmp_path: Path) -> None:
    raw = bases()["header"].replace(struct.pack("<QQ", 256, 2), struct.pack("<QQ", 0, 2**38), 1)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match="has the shape"):
        read_header(tmp_path / "m.gguf")


def test_rows_without_blocks_are_refused(tmp_path: Path) -> None:
    """Of a type that others have, in a model that has no width."""
    raw, square = bases()["model"], struct.pack("<QQ", 256, 256)
    at = raw.index(b"blk.0.ffn_gate.weight") + len(b"blk.0.ffn_gate.weight") + 4
    assert raw[at : at + 16] == square
    (tmp_path / "m.gguf").write_bytes(raw[:at] + struct.pack("<QQ", 0, 256) + raw[at + 16 :])
    with pytest.raises(FileFormatError, match=r"m\.gguf.*gate_proj.weight should be rows of Q2_K"):
        Checkpoint.open(tmp_path / "m.gguf").verify()


@pytest.mark.parametrize(
    ("key", "new", "said"),
    [
        (b"embedding_length", None, "a number of its header is missing"),
        (b"attention.head_count_kv", 3_000_000, "is no such tensor of a model with this header"),
    ],
)
def test_numbers_that_give_no_model_are_refused(key: bytes, new: int | None, said: str, tmp_path: Path) -> None:
    raw = bases()["model"]
    at = raw.index(key + struct.pack("<I", 4)) + len(key)
    name = b"llama.rope.dimension_count"
    turned = struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, 8)
    turned += struct.pack("<Q", 9) + b"of no use" + struct.pack("<I?", 7, True)  # so that 64 bytes are put in
    if new is None:
        raw = raw[: at - 1] + b"_" + raw[at:]
    else:
        raw = raw[: at + 4] + struct.pack("<I", new) + raw[at + 8 :]
    start = raw.index(struct.pack("<Q", len("general.architecture")) + b"general.architecture")
    raw = raw[:16] + struct.pack("<Q", struct.unpack("<Q", raw[16:24])[0] + 2) + raw[24:start] + turned + raw[start:]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match=r"m\.gguf: .*" + said):
        Checkpoint.open(tmp_path / "m.gguf")
