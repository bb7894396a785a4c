"""A model directory as Hugging Face lays it out: config.json, safetensors files, tokenizer files; or a GGUF, ONNX or TFLite file, seen as one.

Owns: `ModelDir`, which finds and checks all of it without reading a weight, and reads one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.config import check_config, check_generation, decode_floats
from arrondi.checkpoint.containers.gguf import view as gguf
from arrondi.checkpoint.containers.gguf.header import is_gguf
from arrondi.checkpoint.containers.hub import resolve
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.onnx import view as onnx
from arrondi.checkpoint.containers.side_files import copy_side_files, side_files
from arrondi.checkpoint.containers.tensor_file import Entry, read_header, read_tensor
from arrondi.checkpoint.containers.tflite import view as tflite
from arrondi.checkpoint.containers.tflite.header import is_tflite
from arrondi.checkpoint.containers.torch_file import (
    INDEX,
    is_torch_file,
    read_torch_header,
    torch_files,
    torch_load_allowed,
)
from arrondi.checkpoint.foreign import what_directory, what_file
from arrondi.errors import FileFormatError

_FILES: Final[tuple[tuple[Callable[[Path], bool], Callable[[Path], Any]], ...]] = (
    (is_gguf, gguf.view_of),
    (onnx.is_onnx, onnx.view_of),
    (is_tflite, tflite.view_of),
)
"""Kinds of files that are seen as directories: how one is known, and what it would be."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelDir:
    """A checked model directory.

    Attributes:
        path: the directory, or the file.
        config: config.json as it is stored: written again, it is the same.
        entries: every stored tensor by name, in the order of the files.
        home: where config, tokenizer and the like lie: the directory, or that of the view of a file.
    """

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    home: Path

    @classmethod
    def open(cls, path: str | Path) -> ModelDir:
        """Read config and headers, and check that they fit together. `path` may be the name of a model on the Hub.

        Raises:
            FileFormatError: nothing there, no config, no safetensors weights, a file that lies, a missing shard.
        """
        path = onnx.graph_in(resolve(path))
        for is_one, view_of in _FILES:
            if path.is_file() and is_one(path):
                view = view_of(path)
                return cls(path, view.config, view.entries, view.home)
        if is_torch_file(path):
            return cls(path, _config(path.parent), read_torch_header(path), path.parent)
        if not path.is_dir():
            what = what_file(path) or (
                "a file, but a model is a directory with config.json and safetensors files. Give its directory"
            )
            raise FileFormatError(f"{path}: {what}.")
        if not (path / "config.json").exists():
            raise FileFormatError(f"{path}: {what_directory(path)}.")
        config = _config(path)
        entries = _entries(path)
        if not entries:
            raise FileFormatError(f"{path}: its files hold no tensor.")
        return cls(path, config, entries, path)

    @property
    def model_config(self) -> dict[str, Any]:
        """config.json with its special floats decoded, as transformers builds a model from it."""
        decoded: dict[str, Any] = decode_floats(self.config)
        return decoded

    def stored(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        return read_tensor(self.entries[name])

    def read(self, name: str) -> torch.Tensor:
        """One tensor as the model has it, in its stored type; blocks of ggml as rows of bytes."""
        return self.entries[name].made(self.stored(name))

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries.values())

    def other_files(self) -> list[Path]:
        """Tokenizer, generation config, chat templates, licence, … : what a copy takes along, relative to the directory."""
        return side_files(self.home) if (self.home / "config.json").exists() else []

    def copy_other_files(self, out: Path) -> list[Path]:
        """Copy them into another directory, at the same places."""
        return copy_side_files(self.home, out)

    def fingerprint(self) -> str:
        """A hash of config, headers and file times: changes when the model does, without reading its weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for entry in self.entries.values():
            digest.update(f"{entry.name}|{entry.dtype}|{entry.shape}|{entry.start}".encode())
        for path in sorted({e.path for e in self.entries.values()}):
            stat = path.stat()
            digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, checked; empty where there is none."""
    if not (folder / "config.json").exists():
        return {}
    config = read_json(folder / "config.json", "Download it again.")
    check_config(config, folder / "config.json")
    check_generation(folder)
    return config


def _entries(path: Path) -> dict[str, Entry]:
    """Every stored tensor. As in transformers, model.safetensors comes first, then the index, then whatever is there."""
    weight_map: dict[str, str] = {}
    index = next((path / name for name in _indexes(path) if (path / name).exists()), None)
    if (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    elif index is not None:
        weight_map = _read_index(index)
        files = [path / file for file in sorted(set(weight_map.values()))]
    else:
        files = _weight_files(path)
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in (read_torch_header if is_torch_file(file) else read_header)(file).items():
            if name in entries:
                raise FileFormatError(
                    f"{file}: tensor {name!r} is also in {entries[name].path.name}. Remove one of the files."
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise FileFormatError(
                f"{path / shard}: tensor {name!r} should be here, says its index. Download both again."
            )
    return entries


def _indexes(path: Path) -> tuple[str, ...]:
    """Names of the files that say which tensor is in which shard."""
    pickled = torch_load_allowed() and not any(path.glob("*.safetensors"))
    return (_INDEX, INDEX) if pickled else (_INDEX,)


def _read_index(index: Path) -> dict[str, str]:
    """The weight_map: tensor → shard beside the index."""
    weight_map = read_json(index, "Download it again.").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileFormatError(f"{index}: has no weight_map. Download it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise FileFormatError(f"{index}: puts tensor {name!r} into {file!r}, which is no file beside it.")
        if not (index.parent / file).is_file():
            raise FileFormatError(
                f"{index.parent / file}: the index names this shard, but it is not there. Download it."
            )
    return weight_map


def _weight_files(path: Path) -> list[Path]:
    files = sorted(p for p in path.glob("*.safetensors") if p.is_file()) or torch_files(path)
    if not files:
        raise FileFormatError(f"{path}: {what_directory(path)}.")
    return files
