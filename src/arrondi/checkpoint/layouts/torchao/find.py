"""The quantized layers of a torchao file.

Owns: `find`. A layer is found by its tensors; the metadata of the files says what they mean, and must fit them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import parse_json
from arrondi.checkpoint.layouts.beside import FLOATS, check_beside, shape_of
from arrondi.checkpoint.layouts.classes import module_classes
from arrondi.checkpoint.layouts.layout import Names, Placed, Reader
from arrondi.checkpoint.layouts.torchao.config import NAMES, read_config
from arrondi.checkpoint.layouts.torchao.notes import FLOAT8, INT8, INTX, Note, read_note
from arrondi.checkpoint.layouts.torchao.storage import granularity_of, specs, usual
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, Scheme
from arrondi.formats.scheme import ScaleType

_PARTS: Final = (
    "qdata",
    "scale",
    "zero_point",
    "scale_and_zero",
    "per_tensor_scale",
    "act_pre_scale",
    "act_quant_scale",
    "act_quant_zero_point",
)
"""Ends of the names of tensors of its classes; not all of these are read."""
_F8: Final = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}


def find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    """Every quantized layer of a checkpoint.

    Args:
        config: config.json; "metadata" in its `quantization_config` is that of the files.
        names: every stored tensor.
        read: gives a stored tensor; only zero points are read.

    Raises:
        FileFormatError: the metadata and the files contradict each other, or say what is not known here.
    """
    metadata, embeddings = read_config(config["quantization_config"])
    classes = module_classes(config) if embeddings else {}
    placed = []
    for name in _listed(metadata):
        path, _, leaf = name.rpartition(".")
        note = read_note(name, metadata[name])
        if note is None:
            continue
        if leaf != "weight":
            raise FileFormatError(f"{name} is quantized by torchao, and only tensors called weight are read here.")
        kind = "Embedding" if "Embedding" in classes.get(path, []) else "Linear"
        placed.append(_place(path, note, kind, names, read))
    check_beside(placed, consumed := [s for p in placed for s in specs(p)], names)
    known = {name for name, _, _ in consumed}
    stray = next(
        (n for n in names if n not in known and n.rpartition(".")[2].startswith("_") and n.endswith(_PARTS)), None
    )
    if stray is not None:
        raise FileFormatError(f"{stray} is stored, and no metadata says what it is a part of. Is it damaged?")
    return placed


def _listed(metadata: Mapping[str, Any]) -> list[str]:
    """The names of tensors that have notes."""
    try:
        listed = parse_json(str(metadata.get(NAMES)))
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(n, str) and isinstance(metadata.get(n), str) for n in listed):
        raise FileFormatError(f"the metadata of the safetensors files has no list {NAMES} of tensors with notes. Save the model again with transformers 5.")  # fmt: skip
    more = sorted(metadata.keys() - set(listed) - {NAMES, "format"})
    if more or len(set(listed)) != len(listed):
        raise FileFormatError(f"the metadata of the safetensors files says {more[0]!r} of a tensor that {NAMES} lacks." if more else f"{NAMES} names a tensor twice.")  # fmt: skip
    return listed


def _place(path: str, note: Note, kind: str, names: Names, read: Reader) -> Placed:
    stem = f"{path}._weight_"
    rows, columns = shape_of(names, f"{stem}qdata", 2)
    stored, scales = names[f"{stem}qdata"][0], names.get(f"{stem}scale", ("nothing", ()))[0]
    if any(n % size for n, size in zip((rows, columns), note.block, strict=True)):
        raise FileFormatError(
            f"{stem}qdata: blocks of {note.block[0]} × {note.block[1]} do not divide {(rows, columns)}."
        )
    if scales not in FLOATS or (note.kind != INTX and scales != "F32"):
        raise FileFormatError(
            f"{stem}scale should hold {'float32' if note.kind != INTX else 'floating-point'} numbers, found {scales}."
        )
    if (note.kind == FLOAT8) != (stored in _F8):
        raise FileFormatError(f"{stem}qdata is {stored}, which is no type of the codes of a {note.kind}.")
    zeros = "zero_point" in note.parts
    if zeros != (f"{stem}zero_point" in names):
        raise FileFormatError(
            f"{stem}zero_point is {'missing' if zeros else 'stored'}, though its metadata says otherwise."
        )
    scale: ScaleType = FLOATS[scales]
    format = FORMATS[_F8.get(stored, "int8") if note.kind in (INT8, FLOAT8) else note.target]
    some = zeros and names[f"{stem}zero_point"][0] == "I8" and bool(read(f"{stem}zero_point").any())
    weights = Scheme(format, granularity_of(note.block, (rows, columns)), "integer" if some else "none", scale=scale)
    found = Placed(f"{path}.weight", (rows, columns), LayerScheme(weights, note.inputs), kind=kind)
    return usual(found, note.kind, zeros)
