"""What is in a checkpoint, the numbers of its quantized layers checked: `inspect_model`; and which scales can be folded: `inspect_folds`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from arrondi.arguments import check_arguments
from arrondi.checkpoint import Checkpoint, Entry, readers_of
from arrondi.checkpoint.containers.gguf import header as gguf
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.onnx.view import is_onnx
from arrondi.checkpoint.containers.onnx.view import view_of as onnx_view
from arrondi.checkpoint.containers.tensor_file import is_safetensors, read_header, read_metadata
from arrondi.checkpoint.containers.tflite.header import is_tflite, read_model
from arrondi.checkpoint.method import method_of
from arrondi.errors import SchemeError
from arrondi.graph import is_graph_file, read_graph
from arrondi.graph.contents import contents
from arrondi.graph.read import file_bytes
from arrondi.model import Fold, OnDisk, find_folds
from arrondi.model.fold import channels_in_words

_LARGE: Final = 1 << 30
"""Bytes of weights from which on an ONNX file is not read as a network."""


def inspect_model(path: str | Path) -> dict[str, Any]:
    """Tensors, formats and sizes; every stored bit is counted.

    Returns:
        `container` and `layout` of the files and `readers` of the two; `metadata` of a single file; `bits_per_weight` of the quantized tensors (None if there
        are none) and `model_bits_per_weight` of everything; `bytes` of all tensors, which is what the files hold besides
        their headers, `file_bytes`, `parameters`; and `tensors` with name, shape, format, bytes and bits per weight of each.

        Of one safetensors file: its tensors as they are stored, and the words of its header as `metadata`; `layout` is what a config.json beside it says.

        Of a network of ONNX operators: see `arrondi.graph.contents`, and `path` and `file_bytes`. An ONNX file whose weights have a form of
        com.microsoft's, or that is large, is not read as a network: of it there are tensors, and `inputs`, `outputs`, `opset` and `operators`.

    Raises:
        FileFormatError: not a model directory, or a layout that is not known.
    """
    check_arguments(inspect_model, locals())
    if is_graph_file(path) and not _is_container(Path(path)):
        held = contents(read_graph(path))
        return {
            "path": str(path),
            "file_bytes": file_bytes(path) if Path(path).suffix == ".onnx" else Path(path).stat().st_size,
            **held,
        }
    if is_safetensors(path):
        return _shard(Path(path))
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    parts = _stored_parts(checkpoint)
    tensors = [_row(checkpoint, name, found) for name, found in parts.items()]
    return {
        "path": str(checkpoint.folder.path),
        "architecture": (checkpoint.folder.config.get("architectures") or [None])[0],
        **_container(checkpoint.folder.path),
        "layout": checkpoint.layout.name if checkpoint.layout else None,
        "readers": _readers(checkpoint),
        **_totals(tensors, checkpoint.folder.entries.values()),
    }


def _shard(path: Path) -> dict[str, Any]:
    """One file of a model, as it is stored: of a quantized layer it may hold a part."""
    entries, beside = read_header(path), path.parent / "config.json"
    config = read_json(beside, "Download it again.") if beside.is_file() else {}
    method = method_of(config, entries)
    tensors = [_entry_row(name, entry.shape, entry.dtype, [entry]) for name, entry in entries.items()]
    return {
        "path": str(path),
        "architecture": (config.get("architectures") or [None])[0],
        "container": "safetensors",
        "metadata": read_metadata(path),
        "layout": method if isinstance(method, str) else None,
        "readers": [],
        **_totals(tensors, entries.values()),
    }


def _totals(tensors: list[dict[str, Any]], entries: Collection[Entry]) -> dict[str, Any]:
    """Tensors and their sums."""
    weights = sum(math.prod(t["shape"]) for t in tensors)
    packed = [t for t in tensors if t["quantized"]]
    packed_weights = sum(math.prod(t["shape"]) for t in packed)
    total = sum(t["bytes"] for t in tensors)
    return {
        "parameters": weights,
        "quantized_parameters": packed_weights,
        "bytes": total,
        "file_bytes": sum(p.stat().st_size for p in {e.path for e in entries}),
        "bits_per_weight": round(8 * sum(t["bytes"] for t in packed) / packed_weights, 4) if packed_weights else None,
        "model_bits_per_weight": round(8 * total / max(weights, 1), 4),
        "tensors": tensors,
    }


def _is_container(path: Path) -> bool:
    """Whether an ONNX file is inspected as weights and not as a network: by what its operators hold, or by its size."""
    if not is_onnx(path):
        return False
    view = onnx_view(path)
    held = sum(e.nbytes for e in view.entries.values())
    return held > _LARGE or any(p.facts["form"] != "linear" for p in view.found.packed)


def _container(path: Path) -> dict[str, Any]:
    """What kind of files these are, and what the header of a single file says, but for its lists."""
    if gguf.is_gguf(path):
        fields = gguf.read_header(path).fields.items()
        said = {key: field.value for key, field in fields if not isinstance(field.value, list)}
        return {"container": "gguf", "metadata": said}
    if is_onnx(path):
        model = onnx_view(path).model
        ends = {
            word: [{"name": n, "type": kind, "shape": list(shape)} for n, (kind, shape) in values.items()]
            for word, values in (("inputs", model.inputs), ("outputs", model.outputs))
        }
        operators = dict(Counter(node.op for node in model.nodes).most_common())
        return {"container": "onnx", "metadata": model.metadata, "opset": model.opsets.get("", 0), **ends, "operators": operators}  # fmt: skip
    if is_tflite(path):
        return {"container": "tflite", "metadata": {"description": read_model(path).description}}
    return {"container": "safetensors"}


def inspect_folds(path: str | Path) -> dict[str, Any]:
    """Every activation that linear layers read, and whether a scale can be moved from what makes it into them. No weight is read.

    Returns:
        `folds`, each with `unit` (None outside of the blocks), `consumers`, `producer` (None, or `kind`, `param`, `offset`, `bias`,
        `index` and `rows`), `channels` and `reason` (None if scales can be folded); `foldable` and `not_foldable`, how many of both.

    Raises:
        FileFormatError: not a model directory.
        SchemeError: the model is quantized, or does not run.
    """
    check_arguments(inspect_folds, locals())
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantized:
        raise SchemeError(
            f"{path} is already quantized, and its scales stay where they are. Inspect the original model."
        )
    source = OnDisk(checkpoint)
    folds = find_folds(source)
    foldable = sum(fold.reason is None for fold in folds)
    return {
        "path": str(checkpoint.folder.path),
        "units": source.units,
        "folds": [_fold(fold) for fold in folds],
        "foldable": foldable,
        "not_foldable": len(folds) - foldable,
    }


def _fold(fold: Fold) -> dict[str, Any]:
    made = fold.producer
    producer = None
    if made is not None:
        rows = None if made.rows is None else [made.rows.start, made.rows.stop]
        producer = {
            "kind": made.kind,
            "param": made.param,
            "offset": made.offset,
            "bias": made.bias,
            "index": made.index,
            "rows": rows,
        }
    return {
        "unit": fold.unit,
        "consumers": list(fold.consumers),
        "producer": producer,
        "channels": channels_in_words(fold.channels) if fold.reason is None else None,
        "reason": fold.reason,
    }


def _readers(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Who reads the quantized layers, as far as the files tell."""
    if checkpoint.layout is None:
        return [{"reader": "whatever reads safetensors", "ok": True, "sentence": ""}]
    return [asdict(v) for v in readers_of(list(checkpoint.placed.values()), checkpoint.layout)]


def _stored_parts(checkpoint: Checkpoint) -> dict[str, list[Entry]]:
    """Original name → the stored tensors that hold it. Each stored tensor is counted once: the first that needs it has it."""
    left = dict(checkpoint.folder.entries)
    parts: dict[str, list[Entry]] = {}
    for name in checkpoint.names:
        placed = checkpoint.placed.get(name)
        wanted = [name]
        if placed is not None and checkpoint.layout is not None:
            wanted = [stored for stored, _, _ in checkpoint.layout.specs(placed)]
        parts[name] = [left.pop(n) for n in wanted if n in left]
    return parts | {name: [entry] for name, entry in left.items()}


def _row(checkpoint: Checkpoint, name: str, parts: list[Entry]) -> dict[str, Any]:
    placed = checkpoint.placed.get(name)
    shape = checkpoint.names.get(name, parts[0].shape if parts else ())
    lattice = parts[0].lattice if parts else ""
    format = str(placed.scheme) if placed else lattice or (parts[0].dtype if parts else "shared")
    return _entry_row(name, shape, format, parts, placed is not None or bool(lattice))


def _entry_row(
    name: str, shape: tuple[int, ...], format: str, parts: list[Entry], quantized: bool = False
) -> dict[str, Any]:
    nbytes = sum(e.nbytes for e in parts)
    return {
        "name": name,
        "shape": list(shape),
        "format": format,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / max(math.prod(shape), 1), 4),
        "quantized": quantized,
    }
