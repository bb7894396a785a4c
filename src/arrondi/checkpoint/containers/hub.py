"""A model by its name on the Hugging Face Hub.

Owns: `resolve`, and `title_of` for the way back. A path that exists always wins; then the local cache; then, unless the machine is told to stay offline, the
Hub. Only what a model directory needs is downloaded: JSON, tokenizer files and safetensors; pickles only where they may be read.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

from arrondi.checkpoint.containers.torch_file import torch_files, torch_load_allowed
from arrondi.errors import DataError, FileFormatError

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_REPOSITORY: Final = "models--"
"""What a folder of the cache begins with that has the snapshots of a model."""
_WANTED: Final = [
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.vocab", "*.py", "LICENSE*", "NOTICE*",
]  # fmt: skip

_FILES: Final = frozenset({".gguf", ".safetensors", ".onnx", ".tflite", ".pt2"})
"""Endings of models that are one file; a name on the Hub is that of a directory."""
_OURS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""What this machine refuses, and not the Hub."""


def resolve(model: str | Path) -> Path:
    """The directory (or file) that `model` names: a path, or a name such as `org/model` on the Hub.

    Raises:
        FileFormatError: nothing there, and no such model in the cache or on the Hub.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise DataError(f"A model directory or a name on the Hub is needed here, got {type(model).__name__}.")
    path = Path(model)
    name = str(model)
    if not name.strip():
        raise FileFormatError("The model's name is empty. Give the path of a model directory, or a name on the Hub.")
    if path.exists():
        return path
    if path.is_symlink():
        raise FileFormatError(f"{path}: a link to {os.readlink(path)}, where nothing is. Give the directory itself.")
    if "://" in name:
        raise FileFormatError(
            f"{name}: an address. Give the path of a model directory, or a name on the Hub such as org/model."
        )
    if path.suffix.lower() in _FILES:
        raise FileFormatError(f"{path}: no such file. Check the name.")
    missing = f"{path}: no such directory. Give the path of a model directory with config.json and safetensors files"
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise FileFormatError(f"{missing}.")
    cached = _cached(name)
    if cached is not None:
        return cached
    return _downloaded(name, missing)


def title_of(path: Path) -> str:
    """What the model of a directory or a file is called: by the name of that, or by that on the Hub of a snapshot in the cache."""
    path = path.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith(_REPOSITORY):
        return repository.rpartition("--")[2]
    return path.stem if path.suffix.lower() in _FILES else path.name


def _cached(name: str) -> Path | None:
    """The snapshot in the local cache, if it has a config and every shard that its index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found: str | None = snapshot_download(name, allow_patterns=_wanted(), local_files_only=True)
    except LocalEntryNotFoundError as error:  # the shards may all be there though a side file is not
        found = getattr(error, "snapshot_path", None)
    except (OSError, ValueError):
        return None
    return Path(found) if found is not None and _complete(Path(found)) else None


def _wanted() -> list[str]:
    """Files by their names; those of torch.save only where they may be read."""
    return [*_WANTED, "pytorch_model*.bin"] if torch_load_allowed() else _WANTED


def _complete(path: Path) -> bool:
    from arrondi.checkpoint.containers.json_file import parse_json

    if not (path / "config.json").exists():
        return False
    try:
        index = parse_json((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return any(shard.exists() for shard in path.glob("*.safetensors")) or bool(torch_files(path))
    return (path / "model.safetensors").exists() or all((path / str(f)).exists() for f in files)


def _downloaded(name: str, missing: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=_wanted()))
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        known = {401: "the Hub has no such model, or it needs a login", 403: "access to this model must be asked for on its page", 404: "the Hub has no such model"}  # fmt: skip
        raise FileFormatError(
            f"{missing}, or the name of a model on the Hugging Face Hub: {known.get(status, 'the Hub refused')}."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if getattr(error, "errno", None) in _OURS:
            raise
        raise FileFormatError(
            f"{missing}, or the name of a model on the Hugging Face Hub: this one is not complete in the local cache, "
            "and the Hub cannot be reached. Go online, or check the name."
        ) from error
