"""One safetensors file, read lazily and written in place.

Owns: `is_safetensors`, `read_header`, `read_metadata`, `Entry` (where a tensor lies), `read_tensor`, and `encode_header` for the writer. The format
is an 8-byte little-endian length, a JSON header, then one byte buffer (the specification of safetensors 0.x).

Why not the safetensors package here: a map of the whole file counts towards the resident set and its writer wants every
tensor at once, while we read and write one tensor at a time in files larger than memory. What we write, that package reads
(tested), and what it refuses we refuse, with the file and the tensor named.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from arrondi.checkpoint.containers.descriptors import reraise_exhaustion
from arrondi.checkpoint.containers.json_file import parse_json
from arrondi.checkpoint.containers.numbers import Numbers
from arrondi.checkpoint.containers.turn import Turn
from arrondi.errors import FileFormatError

DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""safetensors' names of the element types that we read and write."""

DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000
"""The package's own limit: a longer header is hostile."""

_LFS_POINTER: Final = b"version "
"""How a clone without Git LFS begins every large file: `version https://git-lfs…`."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file, and how the model's own tensor is made of it.

    Attributes:
        name: of the model's tensor.
        path, start, stop: the file, and the bytes in it.
        dtype: element type of the model's tensor; blocks of ggml are bytes, and have the name of their type.
        shape: of the model's tensor.
        turn: what is stored instead, and how the model's tensor is made of it; None: it is stored as the model has it.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    turn: Turn | Numbers | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES.get(self.dtype, torch.uint8)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def lattice(self) -> str:
        """The type of the stored blocks whose values are on no grid, so that they are read as numbers; "" for all others."""
        return self.turn.dtype if isinstance(self.turn, Turn) and self.turn.decoded else ""

    def made(self, stored: torch.Tensor) -> torch.Tensor:
        """The model's tensor of the stored one; of blocks of ggml, rows of bytes in the model's order."""
        if self.turn is None:
            return stored
        try:
            return self.turn.apply(stored, self.shape)
        except FileFormatError as error:
            raise FileFormatError(f"{self.path}: {self.name}: {error}") from error


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is called as one of this format is."""
    return Path(path).suffix.lower() == ".safetensors" and Path(path).is_file()


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        FileFormatError: truncated, not JSON, overlapping or missing bytes, sizes that contradict shapes, unknown types.
    """
    return _parsed(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The words that the header of a file has beside its tensors.

    Raises:
        FileFormatError: as `read_header`.
    """
    return _parsed(path)[1]


def _parsed(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if head == _LFS_POINTER:
                raise FileFormatError(f"{path}: a pointer of Git LFS, not the file itself. Fetch it: git lfs pull.")
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
                raise FileFormatError(
                    f"{path}: the header declares {length} bytes, but the file has {size}. It is truncated or not a safetensors file; download it again."
                )
            text = file.read(length)
    except OSError as error:
        reraise_exhaustion(error)
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). Give a safetensors file.") from error
    try:
        table = parse_json(text.decode("utf-8"))  # of bytes, Python would guess the encoding
        if not isinstance(table, dict):
            raise TypeError("it is not a JSON object")
        metadata = table.pop("__metadata__", None)
        named = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        if metadata is not None and not named:
            raise TypeError("__metadata__ does not map names to words")
        entries = [_entry(path, name, facts, 8 + length) for name, facts in table.items()]
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path}: the header cannot be read ({error}). Is this a safetensors file?") from error
    entries.sort(key=lambda e: (e.start, e.stop))
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            raise FileFormatError(
                f"{path}: tensor {entry.name!r} starts at byte {entry.start}, expected {position}. The header lies; download it again."
            )
        position = entry.stop
        if position > size:
            raise FileFormatError(
                f"{path}: tensor {entry.name!r} ends at byte {position}, but the file ends at {size}. It is truncated; download it again."
            )
    if position != size:
        raise FileFormatError(
            f"{path}: {size - position} bytes after the last tensor belong to none. The header lies; download it again."
        )
    return {e.name: e for e in entries}, metadata or {}


def _entry(path: Path, name: str, facts: object, base: int) -> Entry:
    if not isinstance(facts, dict) or not {"dtype", "shape", "data_offsets"} <= facts.keys():
        raise FileFormatError(
            f"{path}: tensor {name!r} lacks dtype, shape or data_offsets. The header lies; download it again."
        )
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise FileFormatError(f"{path}: the name {name!r} holds half a character. The header lies; download it again.")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(f"{path}: tensor {name!r} has the element type {dtype!r}. Known: {', '.join(DTYPES)}.")
    if not _sizes(shape) or math.prod(max(n, 1) for n in shape) >= 2**59:  # torch multiplies sizes in 64 bits
        raise FileFormatError(
            f"{path}: tensor {name!r} has the shape {shape!r}; sizes are whole numbers from 0. The header lies."
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise FileFormatError(
            f"{path}: tensor {name!r} has the byte range {offsets!r}; it should be two whole numbers. The header lies."
        )
    start, stop = offsets
    wanted = math.prod(shape) * DTYPES[str(dtype)].itemsize
    if stop - start != wanted:
        raise FileFormatError(
            f"{path}: tensor {name!r} has {stop - start} bytes, but {dtype} of shape {shape} needs {wanted}. The header lies."
        )
    return Entry(name, path, str(dtype), tuple(shape), base + start, base + stop)


def _sizes(values: object) -> bool:
    """Whether this is a list of whole numbers that a tensor's size can be; JSON's true is no number."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def read_tensor(entry: Entry) -> torch.Tensor:
    """The whole tensor as it is stored."""
    dtype, shape = (entry.dtype, entry.shape) if entry.turn is None else (entry.turn.dtype, entry.turn.shape)
    return _read(entry, entry.start, entry.nbytes).view(DTYPES.get(dtype, torch.uint8)).reshape(shape)


def read_bytes(entry: Entry, offset: int, nbytes: int) -> torch.Tensor:
    """Some of a tensor's raw bytes, uint8; the rest of the tensor is not touched."""
    return _read(entry, entry.start + offset, nbytes)


def _read(entry: Entry, offset: int, nbytes: int) -> torch.Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = as_memory(buffer)
    with entry.path.open("rb", buffering=0) as file:
        while view:
            got = os.preadv(file.fileno(), [view], offset)
            if got == 0:
                raise FileFormatError(
                    f"{entry.path}: tensor {entry.name!r} is cut off: the file became shorter while it was read."
                )
            view, offset = view[got:], offset + got
    return buffer


def as_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return raw.data


def encode_header(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes in front of the buffer, with words beside the tensors, and each tensor's byte range from the start of the file.

    The header is padded with spaces so that the buffer starts at a multiple of 8, as the package does.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    ranges, offset = {}, 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        ranges[name] = (offset, offset + nbytes)
        offset += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: (base + a, base + b) for n, (a, b) in ranges.items()}
