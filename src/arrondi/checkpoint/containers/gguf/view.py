"""A GGUF file as a model directory: its entries, a config, and a folder with the files that GGUF keeps in its header.

Owns: `View` and `view_of`. Config and tokenizer are made by transformers' own reading of GGUF; what that leaves out of the header and
the model needs is added here or refused. The folder lies among the temporary files of this process and goes with it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.gguf.config import config_of
from arrondi.checkpoint.containers.gguf.header import Header, read_header, split_files
from arrondi.checkpoint.containers.gguf.names import model_entries
from arrondi.checkpoint.containers.gguf.spoken import tokenizer_of_header
from arrondi.checkpoint.containers.json_file import write_json
from arrondi.checkpoint.containers.tensor_file import DTYPES, Entry
from arrondi.errors import ArrondiError, FileFormatError

_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_COMPUTED: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say what the config says."""
_KINDS: Final = ("Embedding", "Conv1D")
"""Classes of modules besides Linear whose weights are stored in blocks."""
_KEPT: Final = 8
"""Files of which a view is kept."""


@dataclass(frozen=True)
class View:
    """What a model directory would hold.

    Attributes:
        headers: of all files.
        config: config.json; its quantization_config names the type of every tensor that is made of blocks.
        entries: tensors by the names of a plain checkpoint.
        home: folder with config.json and the files of the tokenizer.
    """

    headers: list[Header]
    config: dict[str, Any]
    entries: dict[str, Entry]
    home: Path


def view_of(path: Path) -> View:
    """What a GGUF file (or any part of one that is split) would be as a directory.

    Raises:
        FileFormatError: not a model that transformers knows, a header that lies, or a form of a tensor that is not known here.
    """
    files = split_files(path)
    stats = tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return _view(stats)


@lru_cache(maxsize=_KEPT)
def _view(files: tuple[tuple[Path, int, int], ...]) -> View:
    headers = [read_header(path) for path, _, _ in files]
    first = headers[0]
    if first.value("general.type", "model") != "model":
        raise FileFormatError(f"{first.path}: a GGUF file of the type {first.value('general.type')!r}, not a model.")
    _check_blocks(first, sum(len(h.tensors) for h in headers))
    config = config_of(first)
    parsed, model = _built(first, config)
    entries = model_entries(headers, {**parsed.to_dict(), **config}, model)
    entries = {n: e for n, e in entries.items() if n not in _COMPUTED}
    if not entries:
        raise FileFormatError(f"{first.path}: holds no tensor.")
    stored = {e.dtype for e in entries.values()}
    said: dict[str, Any] = {**parsed.to_diff_dict(), "architectures": [type(model).__name__]}
    said["dtype"] = next(
        (_FLOATS[d] for d in ("BF16", "F16") if d in stored), "float16" if stored - {*DTYPES} else "float32"
    )
    types = _types(entries, model)
    if types:
        said["quantization_config"] = {"quant_method": "gguf", "version": 1, "types": types}
    return View(headers, said, entries, _home(first, said))


def _check_blocks(header: Header, tensors: int) -> None:
    """Whether there can be as many blocks as a header says: a model of that many is built of it, whatever its tensors are."""
    blocks = header.value(f"{header.architecture}.block_count")
    if not isinstance(blocks, int) or not 0 <= blocks <= tensors:
        raise FileFormatError(
            f"{header.path}: gives {blocks!r} as its number of blocks, and holds {tensors} tensors. Download it again."
        )


def _types(entries: dict[str, Entry], model: Any) -> dict[str, Any]:
    """What the layout of blocks says in a config: the type of every tensor, and how the model holds it where that is not usual."""
    found: dict[str, Any] = {}
    for name, entry in entries.items():
        if entry.dtype in DTYPES:
            continue
        path = name.rpartition(".")[0]
        kind = _class_of(model, path)
        facts: dict[str, Any] = {"type": entry.dtype, **({"kind": kind} if kind in _KINDS else {})}
        if kind == "Conv1D":
            facts["transposed"] = True
        found[name] = facts if len(facts) > 1 else entry.dtype
    return found


def _class_of(model: Any, path: str) -> str:
    """Name of the class of a module; "" where the model has none of this path."""
    try:
        return type(model.get_submodule(path)).__name__
    except AttributeError:
        return ""


def _built(header: Header, config: dict[str, Any]) -> tuple[Any, Any]:
    """The config as transformers has it, and the model on the meta device."""
    import transformers

    kind = config.get("model_type")
    try:
        parsed = transformers.CONFIG_MAPPING[kind](**{k: v for k, v in config.items() if k != "model_type"})
        named = [getattr(transformers, n, None) for n in config.get("architectures") or []]
        table: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        cls = next((c for c in named if c is not None), None) or (
            table[type(parsed)] if type(parsed) in table else transformers.MODEL_MAPPING[type(parsed)]
        )
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return parsed, cls._from_config(parsed)
    except ArrondiError:
        raise
    except Exception as error:  # as above
        raise FileFormatError(
            f"{header.path}: its header does not give a {kind} model: {type(error).__name__}: {error}"
        ) from error


_FOLDERS: Final[list[tempfile.TemporaryDirectory[str]]] = []
"""The folders of this process; they go when it ends."""


def _home(header: Header, config: dict[str, Any]) -> Path:
    """A folder with the config and, where transformers can make one of the header, the tokenizer."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(
        prefix="arrondi-", ignore_cleanup_errors=True
    )
    _FOLDERS.append(folder)
    home = Path(folder.name)
    write_json(home / "config.json", config)
    if header.value("tokenizer.ggml.model") is not None:
        try:
            tokenizer_of_header(header).save_pretrained(home)
        except Exception as error:  # a vocabulary that transformers cannot turn: the model is read, its text is not
            reraise_exhaustion(error)
    return home
