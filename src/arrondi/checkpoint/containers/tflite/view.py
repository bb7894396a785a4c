"""A TFLite file as a model directory: its weights under the names that the converter gave them, in the shapes that the file has.

Owns: `view_of`. Kernels of convolutions are (out, height, width, in), of depthwise ones (1, height, width, channels). A tensor whose grid no scheme says
becomes the numbers that it means; so do biases, which are whole numbers under a scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.graph_weights import CODES, SCALE, ZERO, Packed, directory_of
from arrondi.checkpoint.containers.numbers import Numbers
from arrondi.checkpoint.containers.tensor_file import Entry, read_tensor
from arrondi.checkpoint.containers.tflite.header import BITS, Model, Tensor, read_model
from arrondi.errors import FileFormatError

_FORMATS: Final[Mapping[str, str]] = {"I8": "int8", "U8": "uint8", "INT4": "int4", "UINT4": "uint4", "INT2": "int2"}
_FLOATS: Final = ("F32", "F16", "BF16", "F64")
_KINDS: Final[Mapping[str, str]] = {
    "CONV_2D": "Conv2d", "TRANSPOSE_CONV": "Conv2d", "FULLY_CONNECTED": "Linear", "EMBEDDING_LOOKUP": "Embedding", "GATHER": "Embedding",
}  # fmt: skip
"""Operator → class of a layer whose rows are outputs."""


@dataclass(frozen=True)
class View:
    """What a model directory would hold; see the view of ONNX files."""

    model: Model
    config: dict[str, Any]
    entries: dict[str, Entry]
    home: Path


def view_of(path: Path) -> View:
    """What a TFLite file would be as a directory.

    Raises:
        FileFormatError: a file that lies, or a grid that contradicts its tensor.
    """
    model = read_model(path)
    packed: list[Packed] = []
    plain: dict[str, Entry] = {}
    grids = {(graph, n) for (graph, _), t in model.tensors.items() for n in (t.grid, t.grid_zero)}
    seen: set[tuple[int, int]] = set()
    names: set[str] = set()
    for (graph, position), tensor in model.tensors.items():
        if (graph, position) in grids or (tensor.start, tensor.stop) in seen:
            continue
        seen.add((tensor.start, tensor.stop))
        name = _fresh(tensor.name or f"tensor_{position}", names)
        scale, zero = _scale(model, graph, tensor), _zero(model, graph, tensor)
        if scale is None:
            if tensor.dtype in _FLOATS:
                plain[name] = _entry(path, name, tensor)
            continue
        _check(path, name, tensor, scale)
        facts = _facts(tensor, scale, zero)
        if facts is None:
            plain[name] = _meant(path, name, tensor, scale, zero)
            continue
        parts = {CODES: _entry(path, name + CODES, tensor), SCALE: _named(scale, name + SCALE)}
        if zero is not None:
            parts[ZERO] = _cast(zero, name + ZERO, tensor.dtype)
        packed.append(Packed(name, facts, parts))
    said, entries = directory_of("tflite", packed, plain)
    if not entries:
        raise FileFormatError(f"{path}: holds no weight. Give the file of a network.")
    return View(model, {"quantization_config": said} if said else {}, entries, path.parent)


def _fresh(name: str, taken: set[str]) -> str:
    found, number = name, 2
    while found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def _entry(path: Path, name: str, tensor: Tensor) -> Entry:
    narrow = tensor.dtype in BITS
    shape = (tensor.stop - tensor.start,) if narrow else tensor.shape
    return Entry(name, path, "U8" if narrow else tensor.dtype, shape, tensor.start, tensor.stop)


def _scale(model: Model, graph: int, tensor: Tensor) -> Entry | None:
    if tensor.block:
        held = model.tensors.get((graph, tensor.grid))
        if held is None or held.dtype not in _FLOATS:
            raise FileFormatError(f"{model.path}: the scales of {tensor.name!r} are not there. Convert it again.")
        return _entry(model.path, "", held)
    start, count = tensor.scales
    if not count or tensor.dtype in _FLOATS:
        return None
    return Entry("", model.path, "F32", (count,), start, start + 4 * count)


def _zero(model: Model, graph: int, tensor: Tensor) -> Entry | None:
    """Zero points, where one is not zero."""
    if tensor.block:
        held = model.tensors.get((graph, tensor.grid_zero)) if tensor.grid_zero >= 0 else None
        entry = _entry(model.path, "", held) if held is not None and held.dtype not in BITS else None
    else:
        start, count = tensor.zeros
        entry = Entry("", model.path, "I64", (count,), start, start + 8 * count) if count else None
    return entry if entry is not None and bool((read_tensor(entry) != 0).any()) else None


def _check(path: Path, name: str, tensor: Tensor, scale: Entry) -> None:
    along = tensor.shape[tensor.axis] if 0 <= tensor.axis < len(tensor.shape) else None
    if not tensor.block and scale.numel not in (1, along):
        raise FileFormatError(f"{path}: the tensor {name!r} of shape {list(tensor.shape)} has {scale.numel} scales on axis {tensor.axis}. Convert it again.")  # fmt: skip
    if tensor.block and _axis(tensor, scale.shape) is None:
        raise FileFormatError(f"{path}: the tensor {name!r} of shape {list(tensor.shape)} has scales of shape {list(scale.shape)} for blocks of {tensor.block}. Convert it again.")  # fmt: skip
    if not tensor.block and tensor.zeros[1] not in (0, 1, scale.numel):
        raise FileFormatError(f"{path}: the tensor {name!r} has {tensor.zeros[1]} zero points for {scale.numel} scales. Convert it again.")  # fmt: skip


def _axis(tensor: Tensor, grid: tuple[int, ...]) -> int | None:
    """The axis along which blocks lie: the one in which the shapes differ."""
    if tensor.block < 1 or len(grid) != len(tensor.shape):
        return None
    fits = [
        axis for axis in range(len(grid))
        if all((-(-n // tensor.block) if i == axis else n) == grid[i] for i, n in enumerate(tensor.shape))
    ]  # fmt: skip
    return fits[-1] if fits else None


def _facts(tensor: Tensor, scale: Entry, zero: Entry | None) -> dict[str, Any] | None:
    """What the layout is to know of a packed weight; None where no scheme says its grid."""
    rank, one = len(tensor.shape), scale.numel == 1 and not tensor.block
    if tensor.dtype not in _FORMATS or rank < 2 or 0 in tensor.shape or scale.dtype == "F64":
        return None
    if zero is not None and (tensor.dtype in BITS or zero.numel != scale.numel or tensor.block):
        return None
    if tensor.block and rank != 2:
        return None
    kind = _KINDS.get(tensor.reader, "Tensor")
    rows = one or tensor.axis == 0
    kind = kind if (kind == "Conv2d" and rank == 4 and rows) or (kind != "Conv2d" and rank == 2) else "Tensor"
    axis = {} if one else {"axis": _axis(tensor, scale.shape) if tensor.block else tensor.axis}
    block = {"block": tensor.block} if tensor.block else {}
    return {
        "form": "linear",
        "type": _FORMATS[tensor.dtype],
        "shape": list(tensor.shape),
        **axis,
        **block,
        "kind": kind,
    }


def _named(entry: Entry, name: str) -> Entry:
    return Entry(name, entry.path, entry.dtype, entry.shape, entry.start, entry.stop)


def _cast(zero: Entry, name: str, dtype: str) -> Entry:
    """Zero points in the type of the codes."""
    kind = torch.uint8 if dtype == "U8" else torch.int8
    return Entry(name, zero.path, dtype, zero.shape, zero.start, zero.stop, Numbers(zero.dtype, zero.shape, cast=kind))


def _meant(path: Path, name: str, tensor: Tensor, scale: Entry, zero: Entry | None) -> Entry:
    """The numbers that codes mean."""
    axis = (_axis(tensor, scale.shape) or 0) if tensor.block else tensor.axis
    stored = _entry(path, name, tensor)
    turn = Numbers(
        stored.dtype, stored.shape, scales=(partial(read_tensor, scale),), zero=None if zero is None else partial(read_tensor, zero),
        axis=axis, bits=BITS.get(tensor.dtype, 8), signed=not tensor.dtype.startswith("U"), unpacked=tensor.shape or (1,),
    )  # fmt: skip
    return Entry(name, path, "F32", tensor.shape, tensor.start, tensor.stop, turn)
