"""The header of a GGUF file: what it says of the model, and where each tensor lies. Nothing of a tensor is read.

Owns: `read_header`, `Header`, `Field` and `Stored`. Everything is checked before it is believed: no length is trusted beyond the end
of the file, tensors lie apart from each other, and their sizes are those of their types.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.gguf.ik import IK_TYPES, NAMED
from arrondi.checkpoint.containers.tensor_file import DTYPES, Entry, read_tensor
from arrondi.errors import FileFormatError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT: Final = 32

STRING: Final = 8
ARRAY: Final = 9
NUMBERS: Final[Mapping[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""Number of a value's type → how it is stored."""

_MOST: Final = 1 << 24
"""Keys, tensors, or items of an array: no real file has as many."""
_DEEPEST: Final = 4
"""Arrays inside arrays."""
_MOST_AXES: Final = 4
_LONGEST_NAME: Final = 1024
_SPLIT: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
_AGAIN: Final = "Download it again."


class Field(NamedTuple):
    """A value of the header: the number of its type, that of its items (of an array), and the value."""

    kind: int
    item: int | None
    value: Any


class Stored(NamedTuple):
    """A tensor: its type as ggml calls it, its shape with the rows first, and its bytes counted from the start of the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of what is stored: that of the tensor, or (…, bytes of a row) where rows are made of blocks."""
        if self.type in DTYPES:
            return self.shape
        rows = math.prod(self.shape[:-1])
        return (*self.shape[:-1], (self.stop - self.start) // max(rows, 1))


_OF_IK: Final = {kind.number: name for name, kind in IK_TYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a file says.

    Attributes:
        path: the file.
        version: of the format.
        fields: by key, in the order of the file.
        tensors: by name, in the order of the file.
    """

    path: Path
    version: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, Stored]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        return self.fields[key].value if key in self.fields else default

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored: numbers, or rows of bytes where rows are made of blocks."""
        stored = self.tensors[name]
        return read_tensor(Entry(name, self.path, stored.type, stored.raw_shape, stored.start, stored.stop))

    @property
    def architecture(self) -> str:
        """Name of the architecture.

        Raises:
            FileFormatError: there is none.
        """
        found = self.value("general.architecture")
        if not isinstance(found, str):
            raise FileFormatError(f"{self.path}: does not say its architecture, so it is no model. {_AGAIN}")
        return found


def split_files(path: Path) -> list[Path]:
    """All files of a model that is split into several, in order; of a whole one itself.

    Raises:
        FileFormatError: a part is missing.
    """
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    parts = [path.with_name(f"{found['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = next((p for p in parts if not p.is_file()), None)
    if missing is not None:
        raise FileFormatError(f"{missing}: this part of the model is not there. Download it.")
    return parts


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of one file.

    Raises:
        FileFormatError: truncated, of another version or byte order, a key or a tensor twice, an unknown type, or tensors that
            overlap or reach beyond the end.
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). Give a GGUF file.") from error


class _Parser:
    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise FileFormatError(f"{self.path}: does not begin as a GGUF file does. {_AGAIN}")
        version = self.number(4)
        if version not in VERSIONS:
            what = "has the byte order of other machines" if version & 0xFFFF == 0 else f"is of version {version}"
            raise FileFormatError(f"{self.path}: {what}; versions 2 and 3, little-endian, are read. Convert it again.")
        tensors, keys = self.count("tensors"), self.count("keys")
        fields: dict[str, Field] = {}
        for _ in range(keys):
            key = self.text("a key")
            if key in fields:
                raise FileFormatError(f"{self.path}: has the key {key!r} twice. {_AGAIN}")
            kind = self.number(4)
            fields[key] = self.field(key, kind)
        described = [self.described() for _ in range(tensors)]
        return Header(self.path, version, fields, self.placed(described, fields))

    def take(self, length: int) -> bytes:
        if length > self.size - self.at:
            raise FileFormatError(
                f"{self.path}: ends at byte {self.size}, in the middle of its header (byte {self.at}). {_AGAIN}"
            )
        found: bytes = self.file.read(length)
        self.at += length
        if len(found) != length:
            raise FileFormatError(f"{self.path}: became shorter while it was read. {_AGAIN}")
        return found

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def count(self, what: str) -> int:
        found = self.number(8)
        if found > min(_MOST, self.size):
            raise FileFormatError(f"{self.path}: declares {found} {what}. {_AGAIN}")
        return found

    def text(self, what: str) -> str:
        length = self.number(8)
        if length > self.size - self.at:
            raise FileFormatError(f"{self.path}: {what} of {length} bytes reaches beyond the end. {_AGAIN}")
        return self.take(length).decode("utf-8", errors="surrogateescape")

    def field(self, key: str, kind: int, depth: int = 0) -> Field:
        if kind in NUMBERS:
            return Field(kind, None, self.scalar(kind))
        if kind == STRING:
            return Field(kind, None, self.text(f"the value of {key!r}"))
        if kind != ARRAY or depth >= _DEEPEST:
            raise FileFormatError(f"{self.path}: the key {key!r} has a value of the type {kind}. {_AGAIN}")
        item, length = self.number(4), self.number(8)
        if item in NUMBERS:
            width = struct.calcsize(NUMBERS[item])
            if length * width > self.size - self.at:
                raise FileFormatError(f"{self.path}: the array {key!r} reaches beyond the end. {_AGAIN}")
            return Field(kind, item, list(struct.unpack(f"<{length}{NUMBERS[item][1]}", self.take(length * width))))
        if length > (self.size - self.at) // 8:
            raise FileFormatError(f"{self.path}: the array {key!r} reaches beyond the end. {_AGAIN}")
        return Field(kind, item, [self.field(key, item, depth + 1).value for _ in range(length)])

    def scalar(self, kind: int) -> Any:
        return struct.unpack(NUMBERS[kind], self.take(struct.calcsize(NUMBERS[kind])))[0]

    def described(self) -> tuple[str, str, tuple[int, ...], int]:
        """Name, type, shape and offset of a tensor."""
        name = self.text("the name of a tensor")
        if not name or len(name) > _LONGEST_NAME:
            raise FileFormatError(f"{self.path}: a tensor has a name of {len(name)} characters. {_AGAIN}")
        axes = self.number(4)
        if axes > _MOST_AXES:
            raise FileFormatError(f"{self.path}: tensor {name!r} has {axes} axes. {_AGAIN}")
        shape = tuple(self.number(8) for _ in range(axes))[::-1]
        # An empty tensor takes no bytes, whatever its other axes claim.
        longest = self.size if 0 in shape else 2**40
        if any(n >= longest for n in shape) or math.prod(max(n, 1) for n in shape) >= 2**59:
            raise FileFormatError(f"{self.path}: tensor {name!r} has the shape {shape}. {_AGAIN}")
        return name, self.type_of(name, self.number(4)), shape, self.number(8)

    def type_of(self, name: str, number: int) -> str:
        from gguf import GGMLQuantizationType

        try:
            return str(GGMLQuantizationType(number).name)
        except ValueError:
            if number in _OF_IK:
                return _OF_IK[number]
            if number in NAMED:
                raise FileFormatError(
                    f"{self.path}: tensor {name!r} is of the type {NAMED[number]} of ik_llama.cpp, which is not read here. Take a file from before its rows were repacked, or in another type."
                ) from None
            raise FileFormatError(
                f"{self.path}: tensor {name!r} is of ggml's type {number}, which is not known here. Update the package gguf, or take a file of another type."
            ) from None

    def placed(
        self, described: list[tuple[str, str, tuple[int, ...], int]], fields: Mapping[str, Field]
    ) -> dict[str, Stored]:
        alignment = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise FileFormatError(f"{self.path}: aligns its tensors to {alignment!r} bytes. {_AGAIN}")
        base = -(-self.at // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, kind, shape, offset in described:
            if name in found:
                raise FileFormatError(f"{self.path}: has the tensor {name!r} twice. {_AGAIN}")
            start = base + offset
            stop = start + self.bytes_of(name, kind, shape)
            if offset % alignment or stop > self.size:
                raise FileFormatError(
                    f"{self.path}: tensor {name!r} lies at the bytes {start} to {stop} of {self.size}. It is truncated; download it again."
                )
            found[name] = Stored(kind, shape, start, stop)
        ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
        for (one, a), (two, b) in itertools.pairwise(ordered):
            if b.start < a.stop:
                raise FileFormatError(f"{self.path}: the tensors {one!r} and {two!r} overlap. {_AGAIN}")
        return found

    def bytes_of(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        own = IK_TYPES.get(kind)
        elements, nbytes = (own.elements, own.size) if own else GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        columns = shape[-1] if shape else 1
        if columns % elements:
            raise FileFormatError(
                f"{self.path}: tensor {name!r} has rows of {columns} numbers, which blocks of {elements} ({kind}) do not divide. {_AGAIN}"
            )
        heads = own.head * math.prod(shape[:-1]) if own else 0
        return heads + math.prod(shape) // elements * nbytes
