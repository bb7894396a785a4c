"""A model directory: which of its files are weights, and what is said when they do not fit together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arrondi.checkpoint import Checkpoint, ModelDir
from arrondi.errors import FileFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """config.json and nothing else."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def shards(folder: Path, files: dict[str, list[str]], weight_map: dict[str, Any] | None = None) -> None:
    for number, (file, names) in enumerate(files.items()):
        save_file({n: torch.full((2,), float(number)) for n in names}, folder / file)
    index = {n: f for f, names in files.items() for n in names} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_are_read_through_the_index(folder: Path) -> None:
    shards(folder, {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]})
    save_file({"other": torch.zeros(1)}, folder / "not-in-the-index.safetensors")
    model = ModelDir.open(folder)
    assert list(model.entries) == ["a", "b"]
    assert model.read("b").tolist() == [1, 1]
    assert model.nbytes == 16


def test_model_safetensors_comes_before_the_index_as_in_transformers(folder: Path) -> None:
    shards(folder, {"model-00001-of-00001.safetensors": ["stale"]})
    save_file({"whole": torch.zeros(1)}, folder / "model.safetensors")
    save_file({"adapter": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert list(ModelDir.open(folder).entries) == ["whole"]


def test_other_names_are_taken_when_there_is_nothing_else(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "weights.safetensors")
    assert list(ModelDir.open(folder).entries) == ["x"]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def only_config(folder: Path) -> None: ...


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def no_tensor(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


def twice(folder: Path) -> None:
    shards(
        folder, {"one.safetensors": ["a"], "two.safetensors": ["a"]}, {"a": "one.safetensors", "b": "two.safetensors"}
    )


def twice_without_index(folder: Path) -> None:
    twice(folder)
    (folder / "model.safetensors.index.json").unlink()


def missing_shard(folder: Path) -> None:
    shards(folder, {"one.safetensors": ["a"]}, {"a": "one.safetensors", "b": "two.safetensors"})


def shard_is_a_directory(folder: Path) -> None:
    missing_shard(folder)
    (folder / "two.safetensors").mkdir()


def not_in_its_shard(folder: Path) -> None:
    shards(folder, {"one.safetensors": ["a"]}, {"a": "one.safetensors", "gone": "one.safetensors"})


def outside(folder: Path) -> None:
    shards(folder, {"one.safetensors": ["a"]}, {"a": "one.safetensors", "b": "../elsewhere/two.safetensors"})


def file_no_word(folder: Path) -> None:
    shards(folder, {"one.safetensors": ["a"]}, {"a": ["one.safetensors"]})


def no_weight_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_no_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("<html>")


def truncated_shard(folder: Path) -> None:
    shards(folder, {"one.safetensors": ["a"], "two.safetensors": ["b"]})
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


BROKEN: list[tuple[Callable[[Path], None], list[str]]] = [
    (no_config, ["config.json", "Give a directory"]),
    (broken_config, ["config.json", "JSON"]),
    (deep_config, ["config.json", "JSON"]),
    (list_config, ["config.json", "list"]),
    (only_config, ["no *.safetensors"]),
    (pickled, ["pytorch_model.bin", "save_pretrained"]),
    (no_tensor, ["hold no tensor"]),
    (twice, ["two.safetensors", "'a'", "one.safetensors"]),
    (twice_without_index, ["two.safetensors", "'a'", "one.safetensors"]),
    (missing_shard, ["two.safetensors", "not there"]),
    (shard_is_a_directory, ["two.safetensors", "not there"]),
    (not_in_its_shard, ["one.safetensors", "'gone'"]),
    (outside, ["'b'", "../elsewhere/two.safetensors"]),
    (file_no_word, ["'a'", "one.safetensors"]),
    (no_weight_map, ["model.safetensors.index.json", "weight_map"]),
    (index_no_json, ["model.safetensors.index.json", "JSON"]),
    (truncated_shard, ["two.safetensors", "'b'", "truncated"]),
]


@pytest.mark.parametrize(("breaks", "words"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_a_broken_directory_is_refused_in_one_sentence(
    breaks: Callable[[Path], None], words: list[str], folder: Path
) -> None:
    breaks(folder)
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert all(w in message for w in words) and "\n" not in message, message
    assert str(folder) in message


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_what_is_no_directory_is_refused_with_its_path(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("hello")
    with pytest.raises(FileFormatError, match=str(path)):
        Checkpoint.open(path)


def test_the_fingerprint_changes_with_config_header_and_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    seen = [ModelDir.open(folder).fingerprint()]
    assert ModelDir.open(folder).fingerprint() == seen[0]
    (folder / "config.json").write_text('{"model_type": "llama", "a": 1}')
    seen.append(ModelDir.open(folder).fingerprint())
    save_file({"y": torch.zeros(2)}, path)
    seen.append(ModelDir.open(folder).fingerprint())
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    seen.append(ModelDir.open(folder).fingerprint())
    assert len(set(seen)) == 4
