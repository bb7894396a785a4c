"""The files of a model directory that are not weights and that a copy of the model needs.

Owns: `side_files` and `copy_side_files`. The rule:

* by suffix, in capitals or not: `.json .jinja .model .txt .tiktoken .spm .bpe .codes .vocab .tokenizer .tsv .yaml .yml .py`, every version of
  `tokenizer.model`, and any LICENSE, NOTICE, COPYING or USE_POLICY;
* also in subfolders (`1_Pooling/config.json`, `additional_chat_templates/*.jinja`), unless the folder holds weights of another
  form of the model (`onnx/`, `original/`, a training checkpoint); a folder that `modules.json` of sentence-transformers names is
  part of the model, its weights come along, and it may be a link;
* never hidden files, images, weights, indexes of weights, config.json (it is written anew) or what this program itself wrote.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import parse_json

_SUFFIXES: Final = frozenset({
    ".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".tokenizer", ".tsv", ".yaml", ".yml", ".py",
})  # fmt: skip
_LEGAL: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_OF_PARTS: Final = frozenset({".safetensors", ".bin"})
_WRITTEN_ANEW: Final = frozenset({"config.json", "report.json", "manifest.json"})
_OF_QUANTIZERS: Final = frozenset({
    "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
})  # fmt: skip
_WEIGHTS: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tflite", ".mlmodel"}
)


def side_files(folder: Path) -> list[Path]:
    """The paths, relative to the folder, in order.

    Raises:
        OSError: a folder in it cannot be read.
    """
    parts = _sentence_transformer_parts(folder)
    found: list[Path] = []
    for here, directories, files in os.walk(folder, onerror=_raise, followlinks=True):
        where = Path(here).relative_to(folder)
        part = any(where == p or p in where.parents for p in parts)
        linked = [d for d in directories if (Path(here) / d).is_symlink() and where / d not in parts]
        directories[:] = sorted(d for d in directories if not d.startswith(".") and d not in linked)
        if where != Path() and not part and any(Path(f).suffix.lower() in _WEIGHTS for f in files):
            directories.clear()
            continue
        found += [where / f for f in files if _taken(f, where == Path(), part) and (Path(here) / f).is_file()]
    return sorted(found)


def copy_side_files(folder: Path, out: Path) -> list[Path]:
    """Copy them into another directory, at the same places; the paths as `side_files` gives them."""
    found = side_files(folder)
    for path in found:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, out / path)
    return found


def _raise(error: OSError) -> None:
    raise error


def _taken(name: str, top: bool, part: bool) -> bool:
    if name.startswith(".") or name.endswith((".index.json", ".partial")):
        return False
    if top and name in _WRITTEN_ANEW | _OF_QUANTIZERS:
        return False
    suffix = Path(name).suffix.lower()
    named = name.upper().startswith(_LEGAL) or name.startswith("tokenizer.model.")
    return suffix in _SUFFIXES or (named and suffix not in _WEIGHTS) or (part and suffix in _OF_PARTS)


def _sentence_transformer_parts(folder: Path) -> list[Path]:
    """The subfolders that a sentence-transformers pipeline is made of, as its modules.json lists them."""
    try:
        listed: Any = parse_json((folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    paths = [m.get("path") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    named = [Path(p) for p in paths if isinstance(p, str) and "\0" not in p]
    return [p for p in named if p.parts and ".." not in p.parts]  # "" and "." are the model itself
