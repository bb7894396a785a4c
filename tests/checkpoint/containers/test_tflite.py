"""TFLite files as model directories: every kind of grid means what the format says, and what lies is refused."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import ArrondiError, FileFormatError
from tests.checkpoint.containers.tflite_files import WEIGHTS, built, meant

SCHEMES = {
    "conv/kernel": "w=int8/channel", "depthwise/kernel": "w=int8/channel3", "full/weight": "w=int8/channel", "full/old": "w=uint8/tensor/asym",
    "full/narrow": "w=int4/channel", "words": "w=int8/tensor/asym",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "m.tflite").write_bytes(built())
    return tmp_path / "m.tflite"


def test_weights_mean_what_the_format_says(file: Path) -> None:
    checkpoint = Checkpoint.open(file)
    assert {n: str(p.scheme) for n, p in checkpoint.placed.items()} == SCHEMES
    assert checkpoint.names == {n: w["codes"].shape for n, w in WEIGHTS.items()}
    for name, weight in WEIGHTS.items():
        assert torch.equal(checkpoint.dense(name), torch.from_numpy(meant(weight))), name


def test_inspect_dequantize_and_convert(file: Path, tmp_path: Path) -> None:
    document = arrondi.inspect(file)
    assert document["container"] == "tflite" and document["metadata"] == {"description": "made by hand"}
    arrondi.dequantize(file, tmp_path / "plain", "float32")
    from arrondi.pipeline.diff import diff_models

    assert {row["verdict"] for row in diff_models(file, tmp_path / "plain")["tensors"]} == {"same values", "same codes", "different"} - {"different"}  # fmt: skip


def test_damaged_files_are_refused_or_read(file: Path) -> None:
    """Every cut, and bytes of the tables set at random: an ArrondiError or the file's own shapes, and never another exception."""
    whole = built()
    rng = random.Random(1)
    cuts = [whole[:stop] for stop in range(0, len(whole), 97)]
    changed = []
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 2, 5])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        changed.append(bytes(raw))
    refused = 0
    for raw in [*cuts, *changed]:
        file.write_bytes(raw)
        try:
            checkpoint = Checkpoint.open(file)
            checkpoint.verify()
            for name in checkpoint.names:
                checkpoint.dense(name)
        except ArrondiError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(cuts) // 2


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"not a flatbuffer")
    with pytest.raises(FileFormatError, match="does not begin as one"):
        Checkpoint.open(tmp_path / "x.tflite")


@pytest.mark.peer
def test_the_runtime_reads_the_same_grids(file: Path, tmp_path: Path) -> None:
    """The file that these tests build is a TFLite file, and LiteRT finds in it the grids that we find."""
    python = os.environ.get("ARRONDI_LITERT", "")
    if not python:
        pytest.skip("ARRONDI_LITERT names no interpreter with ai-edge-litert")
    script = Path(__file__).with_name("litert_tensors.py")
    done = subprocess.run([python, script, file, tmp_path / "o.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, checkpoint = np.load(tmp_path / "o.npz"), Checkpoint.open(file)
    for name in WEIGHTS:
        key = name.replace("/", "\\")
        assert tuple(theirs[f"{key}|shape"]) == checkpoint.names[name]
        if name in checkpoint.placed:
            q = checkpoint.layer(name).weight
            assert np.array_equal(theirs[f"{key}|scale"], q.real_scale.reshape(-1).numpy())
            zero = np.zeros(1) if q.zero_point is None else q.zero_point.reshape(-1).numpy()
            assert (theirs[f"{key}|zero"] == zero).all()
