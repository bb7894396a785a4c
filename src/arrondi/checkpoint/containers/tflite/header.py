"""What a TFLite file says: tensors with numbers, the grids of quantized ones, and which operator reads them. No weight is read.

Owns: `read_model`, `Model`, `Tensor` and `is_tflite`.

Source: schema.fbs of LiteRT 2.1, version 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.tensor_file import DTYPES
from arrondi.checkpoint.containers.tflite.flat import Flat
from arrondi.errors import FileFormatError

MAGIC: Final = b"TFL3"
TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "I32", 3: "U8", 4: "I64", 6: "BOOL", 7: "I16", 8: "C64", 9: "I8", 10: "F64", 12: "U64", 15: "U32", 16: "U16",
    17: "INT4", 18: "BF16", 19: "INT2", 20: "UINT4", 21: "F8_E4M3", 22: "F8_E5M2",
}  # fmt: skip
"""Number of an element type → its name; types of texts, resources and variants have no numbers."""
BITS: Final[Mapping[str, int]] = {"INT4": 4, "INT2": 2, "UINT4": 4}
READERS: Final[Mapping[tuple[int, int], str]] = {
    (3, 1): "CONV_2D", (4, 1): "DEPTHWISE_CONV_2D", (9, 1): "FULLY_CONNECTED", (7, 1): "EMBEDDING_LOOKUP", (36, 0): "GATHER", (67, 1): "TRANSPOSE_CONV",
}  # fmt: skip
"""Number of an operator, and which of its inputs → its name, where that is a weight."""
_MOST: Final = 1 << 20
_BLOCKWISE: Final = 2
_AGAIN: Final = "Convert it again."


@dataclass(frozen=True)
class Tensor:
    """A tensor with numbers.

    Attributes:
        start, stop: its bytes.
        scales, zeros: where float32 scales and int64 zero points lie, and how many; none: (0, 0).
        axis: which index has a scale of its own, where there are several.
        block: numbers under a scale of blocks, whose scales are another tensor (`grid`), and their zero points one (`grid_zero`), by position.
        reader: name of the operator that it is a weight of; "" of none that is known here.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scales: tuple[int, int] = (0, 0)
    zeros: tuple[int, int] = (0, 0)
    axis: int = 0
    block: int = 0
    grid: int = -1
    grid_zero: int = -1
    reader: str = ""


@dataclass
class Model:
    """What a file says.

    Attributes:
        description: its makers' words.
        tensors: (graph, position) → tensor with numbers.
        operators: number of an operator → how many there are.
    """

    path: Path
    description: str = ""
    tensors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    operators: dict[int, int] = field(default_factory=dict)


def is_tflite(path: Path) -> bool:
    """Whether a file says that it is a TFLite file."""
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == MAGIC
    except OSError:
        return False


def read_model(path: Path) -> Model:
    """The header of a TFLite file.

    Raises:
        FileFormatError: truncated, an unknown type, or a shape that contradicts its bytes.
    """
    try:
        with path.open("rb") as file:
            return _read(Flat(path, file), path)
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). Give a TFLite file.") from error


def _read(flat: Flat, path: Path) -> Model:
    root, found = flat.root(), Model(path)
    if (version := flat.scalar(root, 4, "<I")) != 3:
        raise FileFormatError(f"{path}: is of version {version}; version 3 is read. {_AGAIN}")
    found.description = flat.text(root, 10)
    codes = [max(flat.scalar(c, 4, "<b"), flat.scalar(c, 10, "<i")) for c in flat.tables(root, 6)]
    buffers = flat.tables(root, 12)
    for number, graph in enumerate(flat.tables(root, 8)):
        readers: dict[int, str] = {}
        for operator in flat.tables(graph, 10):
            index = flat.scalar(operator, 4, "<I")
            if index >= len(codes):
                raise FileFormatError(f"{path}: an operator is number {index} of {len(codes)}. {_AGAIN}")
            found.operators[codes[index]] = found.operators.get(codes[index], 0) + 1
            for place, tensor in enumerate(flat.numbers(operator, 6, "<i")):
                if (codes[index], place) in READERS:
                    readers.setdefault(tensor, READERS[codes[index], place])
        for position, described in enumerate(flat.tables(graph, 4)):
            if len(found.tensors) > _MOST:
                raise FileFormatError(f"{path}: has more tensors than any network. {_AGAIN}")
            held = _tensor(flat, described, buffers, readers.get(position, ""))
            if held is not None:
                found.tensors[number, position] = held
    return found


def _tensor(flat: Flat, table: int, buffers: list[int], reader: str) -> Tensor | None:
    name, path = flat.text(table, 10), flat.path
    index = flat.scalar(table, 8, "<I")
    if index >= len(buffers):
        raise FileFormatError(f"{path}: the tensor {name!r} is in buffer {index} of {len(buffers)}. {_AGAIN}")
    start, length = flat.vector(buffers[index], 4, 1)
    if not length and (start := flat.scalar(buffers[index], 6, "<Q")) > 1:  # behind the tables, in large files
        length = flat.scalar(buffers[index], 8, "<Q")
        flat.place(start, length)
    if not length:
        return None  # what flows through the network
    kind = flat.scalar(table, 6, "<b")
    if kind not in TYPES:
        return None
    dtype, shape = TYPES[kind], tuple(flat.numbers(table, 4, "<i"))
    count = math.prod(shape)
    need = -(-count * BITS[dtype] // 8) if dtype in BITS else count * DTYPES[dtype].itemsize
    if any(n < 0 for n in shape) or need != length:
        raise FileFormatError(f"{path}: the tensor {name!r} at byte {start} has {length} bytes, but {dtype} of shape {list(shape)} needs {need}. {_AGAIN}")  # fmt: skip
    if flat.table(table, 16):
        raise FileFormatError(f"{path}: the tensor {name!r} is sparse, which is not read here. Convert it without sparsity.")  # fmt: skip
    grid = flat.table(table, 12)
    if not grid:
        return Tensor(name, dtype, shape, start, start + length, reader=reader)
    scales, zeros = flat.vector(grid, 8, 4), flat.vector(grid, 10, 8)
    details, inner = flat.scalar(grid, 12, "<B"), flat.table(grid, 14)
    block, of_scales, of_zeros = 0, -1, -1
    if details and (details != _BLOCKWISE or not inner):
        raise FileFormatError(f"{path}: the tensor {name!r} has a grid of the kind {details}, which is not read here. Convert it with scales of channels.")  # fmt: skip
    if details:
        block, of_scales, of_zeros = (
            flat.scalar(inner, slot, "<i", usual) for slot, usual in ((8, 0), (4, -1), (6, -1))
        )
    return Tensor(
        name, dtype, shape, start, start + length, scales, zeros, flat.scalar(grid, 16, "<i"), block, of_scales, of_zeros, reader
    )  # fmt: skip
