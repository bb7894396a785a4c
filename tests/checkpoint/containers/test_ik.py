"""Types of ik_llama.cpp: its own C functions' numbers from the same bytes, and files that hold them."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.gguf.encode import GGUFPlan, GGUFWriter
from arrondi.checkpoint.containers.gguf.header import read_header
from arrondi.checkpoint.containers.gguf.ik import IK_TYPES, NAMED, decode_ik
from arrondi.errors import FileFormatError, SchemeError
from arrondi.pipeline.convert import convert_model

COLUMNS = 768
DIGESTS: dict[str, str] = {
    "Q6_0": "10ce71231945db8c",
    "IQ2_K": "f377ae8ec7b41e60",
    "IQ3_K": "e85e6787174ee5cb",
    "IQ4_K": "3c10eff003a5db3c",
    "IQ5_K": "43b0750d9567c3b0",
    "IQ6_K": "e510592f349d137b",
    "IQ4_KS": "fb5193c6c1224c4f",
    "IQ2_KS": "280943e485ba299e",
    "IQ4_KSS": "65b092d86cb18b00",
    "IQ5_KS": "32e31bca286c9e4c",
    "IQ2_KT": "b4a2a223e7ed77f0",
    "IQ3_KT": "db7f5911a8b4741e",
    "IQ4_KT": "8212750ffad15f40",
    "IQ3_KS": "6d21b6fa87cab476",
    "IQ2_KL": "da9b4ec89e65fe60",
    "IQ1_KT": "7ce68509d69f7a43",
}
"""Of the float32 that ik_llama.cpp makes of `rows_of`."""


def rows_of(name: str, count: int = 3, columns: int = COLUMNS) -> torch.Tensor:
    """Any bytes, under scales that are numbers."""
    kind = IK_TYPES[name]
    raw = np.random.default_rng(kind.number).integers(0, 256, (count, kind.row_bytes(columns)), dtype=np.uint8)
    scales = np.random.default_rng(0).normal(size=raw.size)
    if kind.head:
        dtype = np.float16 if kind.head == 2 else np.float32
        raw[:, : kind.head] = scales[:count].astype(dtype).view(np.uint8).reshape(count, -1)
    else:
        blocks = raw.reshape(-1, kind.size)
        blocks[:, :2] = scales[: len(blocks)].astype(np.float16).view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(raw)


@pytest.mark.parametrize("name", IK_TYPES)
def test_values_are_those_of_the_library(name: str) -> None:
    assert hashlib.sha256(decode_ik(rows_of(name), name).numpy().tobytes()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.peer
def test_the_library_itself(tmp_path: Path) -> None:
    python = os.environ.get("ARRONDI_IK_LLAMA", "")
    if not python:
        (pytest.fail if os.environ.get("ARRONDI_PEERS") else pytest.skip)(
            "ARRONDI_IK_LLAMA names no interpreter with ik-llama-cpp-python"
        )
    np.savez(tmp_path / "raw.npz", **{name: rows_of(name).numpy() for name in IK_TYPES})
    script = Path(__file__).with_name("ik_values.py")
    command = [python, script, tmp_path / "raw.npz", str(COLUMNS), tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, theirs in np.load(tmp_path / "out.npz").items():
        assert np.array_equal(decode_ik(rows_of(name), name).numpy(), theirs), name


@pytest.fixture
def mixed(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose matrices are of all types in turn: each is declared as bytes, and then called by its type."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
    }
    convert_model(models("llama", **sizes), tmp_path / "plain.gguf", "gguf")
    header = read_header(tmp_path / "plain.gguf")
    wide = [n for n, s in header.tensors.items() if n.startswith("blk.") and s.shape == (256, 256)]
    kinds = {n: list(IK_TYPES)[i % len(IK_TYPES)] for i, n in enumerate(wide)}
    assert set(kinds.values()) == set(IK_TYPES)
    raw = {n: rows_of(kind, 256, 256) for n, kind in kinds.items()}
    stored = {n: ("I8", tuple(raw[n].shape)) if n in raw else (s.type, s.shape) for n, s in header.tensors.items()}
    writer = GGUFWriter(tmp_path / "mixed.gguf", GGUFPlan(header.fields, stored))
    for n in header.tensors:
        writer.put(n, raw[n] if n in raw else header.read(n))
    writer.publish()
    data = bytearray((tmp_path / "mixed.gguf").read_bytes())
    for n, kind in kinds.items():
        at = data.index(n.encode() + struct.pack("<I", 2)) + len(n) + 4
        data[at : at + 20] = struct.pack("<QQI", 256, 256, IK_TYPES[kind].number)
    (tmp_path / "mixed.gguf").write_bytes(data)
    return tmp_path / "mixed.gguf"


def test_a_file_of_all_types(mixed: Path, tmp_path: Path) -> None:
    """Rows of queries lie in another order in the file; the header is read though gguf's package does not know the types."""
    checkpoint, header = Checkpoint.open(mixed), read_header(mixed)
    assert not {t.type for t in header.tensors.values()} - {t.name for t in GGMLQuantizationType} - set(IK_TYPES)
    kind = header.tensors["blk.0.attn_q.weight"].type
    stored = decode_ik(header.read("blk.0.attn_q.weight"), kind)
    in_halves = stored.reshape(4, 32, 2, 256).transpose(1, 2).reshape(256, 256)
    assert torch.equal(checkpoint.dense("model.layers.0.self_attn.q_proj.weight"), in_halves)
    down = header.tensors["blk.2.ffn_down.weight"].type
    found = checkpoint.dense("model.layers.2.mlp.down_proj.weight")
    assert torch.equal(found, decode_ik(rows_of(down, 256, 256), down))
    listed = {t["name"]: t for t in arrondi.inspect(mixed)["tensors"]}
    assert listed["model.layers.2.mlp.down_proj.weight"]["format"] == down
    result = arrondi.dequantize(mixed, tmp_path / "plain", "float32")
    assert result["restored"] == 21 and torch.equal(
        Checkpoint.open(tmp_path / "plain").dense("model.layers.2.mlp.down_proj.weight"), found
    )


def test_numbers_of_no_grid_are_told_of(mixed: Path, tmp_path: Path) -> None:
    """They are not quantized a second time in silence, and a file that grows says why."""
    with pytest.raises(SchemeError, match="already quantized"):
        arrondi.quantize(mixed, "Q8_0", out=tmp_path / "again.gguf", to="gguf")
    result = convert_model(mixed, tmp_path / "grown.gguf", "gguf")
    (said,) = [note for note in result["notes"] if "Written as numbers" in note]
    assert "and 18 more" in said and "IQ4_KT" in said
    name = "model.layers.2.mlp.down_proj.weight"
    one, two = (Checkpoint.open(p).dense(name) for p in (mixed, tmp_path / "grown.gguf"))
    assert torch.equal(one, two)


def test_rows_that_were_woven_together_are_named(mixed: Path) -> None:
    data = bytearray(mixed.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 20
    data[at : at + 4] = struct.pack("<I", 339)
    mixed.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"IQ4_K_R4 of ik_llama\.cpp, which is not read here"):
        read_header(mixed)
    assert not set(NAMED) & {kind.number for kind in IK_TYPES.values()}


def test_a_damaged_scale_is_refused(mixed: Path) -> None:
    header = read_header(mixed)
    name = next(n for n, s in header.tensors.items() if s.type == "IQ4_KT")
    with mixed.open("r+b") as file:
        file.seek(header.tensors[name].start)
        file.write(struct.pack("<f", float("nan")))
    path = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}[name.split(".")[2]]  # fmt: skip
    with pytest.raises(FileFormatError, match="IQ4_KT blocks is NaN"):
        Checkpoint.open(mixed).dense(f"model.layers.{name.split('.')[1]}.{path}.weight")
