"""A model by its name on the Hub: from a cache made by hand, or one sentence. Nothing here reaches the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.hub import resolve, title_of
from arrondi.errors import FileFormatError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, source: Path, name: str = "some/model") -> Path:
    """What huggingface_hub leaves after a download: blobs, a snapshot of links, a reference."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
        blob = repository / "blobs" / f"blob{number}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_model_in_the_cache_is_read_by_its_name(cache: Path, models: Callable[..., Path]) -> None:
    source = models("llama", num_hidden_layers=1)
    snapshot = cached(cache, source)
    checkpoint = Checkpoint.open("some/model")
    assert checkpoint.folder.path == snapshot
    assert checkpoint.names == Checkpoint.open(source).names
    assert Path("tokenizer.json") in checkpoint.folder.other_files()
    assert checkpoint.dense("model.norm.weight").equal(Checkpoint.open(source).dense("model.norm.weight"))


def test_what_a_model_is_called(cache: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    snapshot = cached(cache, models("llama", num_hidden_layers=1))
    assert title_of(snapshot) == "model"
    assert title_of(tmp_path / "Phi-3.5") == "Phi-3.5" and title_of(tmp_path / "Phi-3.5.gguf") == "Phi-3.5"


@pytest.mark.parametrize("name", ["m.gguf", "some/model.safetensors"])
def test_a_file_that_is_not_there(name: str, cache: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        resolve(name)


def test_a_directory_of_that_name_comes_first(cache: Path, models: Callable[..., Path], tmp_path: Path) -> None:
    cached(cache, models("llama", num_hidden_layers=1))
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert resolve("some/model") == Path("some/model")


def test_a_cache_without_all_shards_is_no_model(cache: Path, models: Callable[..., Path]) -> None:
    snapshot = cached(cache, models("llama", num_hidden_layers=1))
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match="the index names this shard"):
        Checkpoint.open("some/model")


@pytest.mark.parametrize("name", ["some/other", "gpt7", "out/model"])
def test_offline_a_name_that_is_nowhere_gives_one_sentence(cache: Path, name: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        Checkpoint.open(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: no such directory") and "Hub" in message and "\n" not in message


@pytest.mark.parametrize(
    "name", ["/no/such/path", "./model", "../model", "a/b/c", "model with spaces", "", "-", "a--b"]
)
def test_what_is_no_name_of_the_hub_is_not_asked_for(cache: Path, name: str) -> None:
    if Path(name).exists():
        return
    with pytest.raises(FileFormatError, match="no such directory") as caught:
        resolve(name)
    assert "Hub" not in str(caught.value)
