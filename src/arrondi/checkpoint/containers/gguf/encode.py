"""A GGUF file that is laid out before a number of it is written.

Owns: `GGUFPlan` (which tensor lies at which byte) and `GGUFWriter`, which takes tensors in any order. Stacks are declared once and filled
one matrix at a time.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from arrondi.checkpoint.containers.disk import guard_disk, sync_folder
from arrondi.checkpoint.containers.gguf.header import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING, Field
from arrondi.checkpoint.containers.tensor_file import as_memory

_VERSION: Final = 3


@dataclass(frozen=True)
class GGUFPlan:
    """What a file will hold.

    Attributes:
        fields: the keys of its header.
        tensors: name → (type as ggml calls it, shape with the rows first), in order.
    """

    fields: Mapping[str, Field]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def header(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The bytes in front of the tensors, and the bytes of each tensor counted from the start of the file."""
        from gguf import GGMLQuantizationType

        head = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(self.tensors), len(self.fields)))
        for key, field in self.fields.items():
            head += _text(key) + struct.pack("<I", field.kind) + _value(field)
        offset, places = 0, dict[str, tuple[int, int]]()
        for name, (kind, shape) in self.tensors.items():
            sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
            number = GGMLQuantizationType[kind].value
            head += _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", number, offset)
            places[name] = (offset, offset + nbytes_of(kind, shape))
            offset = _aligned(places[name][1])
        head += bytes(_aligned(len(head)) - len(head))
        return bytes(head), {name: (len(head) + a, len(head) + b) for name, (a, b) in places.items()}

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        head, places = self.header()
        return _aligned(max((stop for _, stop in places.values()), default=len(head)))


class GGUFWriter:
    """Fills the file of a plan, which lies under another name until `publish`.

    Args:
        path: the file that `publish` makes.
        plan: what it will hold.

    Raises:
        OutputError: the disk is full.
    """

    def __init__(self, path: Path, plan: GGUFPlan) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        head, self._places = plan.header()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part.unlink(missing_ok=True)
        with guard_disk(path.parent):
            self._file = os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            os.pwrite(self._file, head, 0)
            os.ftruncate(self._file, plan.nbytes)

    def put(self, name: str, tensor: torch.Tensor, index: int = 0, count: int = 1) -> None:
        """Write a tensor, or matrix `index` of a stack of `count`."""
        start, stop = self._places[name]
        data = as_memory(tensor.contiguous())
        size = (stop - start) // count
        assert data.nbytes == size, f"{name}: {data.nbytes} bytes do not fill {size}"
        at = start + index * size
        with guard_disk(self.path.parent):
            while data:
                done = os.pwrite(self._file, data, at)
                data, at = data[done:], at + done

    def publish(self) -> None:
        """Give the finished file its name, and let it last."""
        with guard_disk(self.path.parent):
            os.fdatasync(self._file)
            os.close(self._file)
            self._file = -1
            os.replace(self.part, self.path)
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Remove what was not published."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.part.unlink(missing_ok=True)


def nbytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a type; its rows are whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // elements * nbytes


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(field: Field) -> bytes:
    if field.kind == STRING:
        return _text(field.value)
    if field.kind != ARRAY:
        return struct.pack(NUMBERS[field.kind], field.value)
    assert field.item is not None
    head = struct.pack("<IQ", field.item, len(field.value))
    if field.item in NUMBERS:
        return head + struct.pack(f"<{len(field.value)}{NUMBERS[field.item][1]}", *field.value)
    return head + b"".join(_text(text) for text in field.value)
