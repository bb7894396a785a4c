"""Importance matrices in llama.cpp's two file formats: Σ x² of every input column, with how many rows were summed.

Owns: `Importance`, `ImportanceMatrix`, `read_imatrix` and `write_imatrix`. Names are those of GGUF tensors (`blk.0.attn_q.weight`); which
weight of a model they mean is said by `gguf_names`.

    GGUF      general.type = imatrix; for every weight `NAME.in_sum2`, float32 (matrices, n), and `NAME.counts`, float32 (matrices, 1),
              and perhaps `NAME.in_sum`; imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size.
    legacy    int32 entries; of each: int32 length, name, int32 calls, int32 values, float32 values (means of x² times calls); then
              int32 chunks, int32 length, name of the data. All little-endian.

Source: llama.cpp, tools/imatrix (MIT); the GGUF specification.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from arrondi.checkpoint.containers.gguf.header import is_gguf, read_header
from arrondi.errors import DataError, FileFormatError, OutputError

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_BESIDE: Final = (".in_sum", ".stats")
"""Tensors of newer files that say nothing of x²."""
_DATASETS: Final = "imatrix.datasets"
_CHUNKS: Final = "imatrix.chunk_count"
_CHUNK_SIZE: Final = "imatrix.chunk_size"
_LONGEST_NAME: Final = 4096


@dataclass(frozen=True)
class Importance:
    """What is known of one weight's inputs.

    Attributes:
        sums: Σ x², float32 (matrices, n); the matrices of a stack one after another.
        counts: rows that were summed, float32 (matrices,) or (1,) for all.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    def mean(self, columns: int, index: int | None = None, matrices: int = 1) -> torch.Tensor | None:
        """Mean x² of every column, float32 (columns,); ones where no row was summed, None if the lengths do not fit.

        Args:
            columns: inputs of the weight.
            index, matrices: which matrix of a stack of so many.
        """
        rows = 1 if index is None else matrices
        if self.sums.numel() != rows * columns or len(self.counts) not in (1, rows):
            return None
        row = index or 0
        count = float(self.counts[min(row, len(self.counts) - 1)])
        return self.sums.reshape(rows, columns)[row] / count if count > 0 else torch.ones(columns)

    def count(self, index: int | None = None) -> int:
        """Rows that were summed of one matrix."""
        return int(self.counts[min(index or 0, len(self.counts) - 1)])


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole file.

    Attributes:
        entries: GGUF name of a weight → its importance.
        datasets: what was read, by name.
        chunks, chunk_size: how many windows, of how many tokens (0 where a file does not say).
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0


def read_imatrix(path: Path) -> ImportanceMatrix:
    """An importance matrix in either format, told apart by the file's first bytes.

    Raises:
        FileFormatError: missing, truncated, or no importance matrix.
        DataError: a number in it is negative, NaN or infinite; the weight is named.
    """
    try:
        found = _read_gguf(path) if is_gguf(path) else _read_legacy(path, path.read_bytes())
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise FileFormatError(
            f"{path}: {reason}. Give an importance matrix: a .gguf or .dat file of llama.cpp."
        ) from error
    for name, entry in found.entries.items():
        numbers = torch.cat([entry.sums.flatten(), entry.counts])
        if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
            raise DataError(
                f"{path}: {name} holds numbers below 0, NaN or infinity. Compute the importance matrix again."
            )
    return found


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a file that llama.cpp's tools read: the legacy format under the ending `.dat`, GGUF under all others.

    Raises:
        OutputError: the file cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix.lower() == ".dat":
            part.write_bytes(_legacy(matrix))
        else:
            _write_gguf(part, matrix)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error


# ── GGUF ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    if header.value("general.type") != "imatrix":
        raise FileFormatError(
            f"{path}: a GGUF file of the type {header.value('general.type', 'model')!r}, not an importance matrix. Make one with arrondi imatrix or llama-imatrix."
        )
    tensors = {name: header.read(name).float().numpy() for name in header.tensors}
    entries: dict[str, Importance] = {}
    for name, value in tensors.items():
        stem = name.removesuffix(_SUMS)
        if stem != name:
            if stem + _COUNTS not in tensors:
                raise FileFormatError(f"{path}: {stem} has sums and no counts. Compute the importance matrix again.")
            counts = tensors[stem + _COUNTS].reshape(-1)
            sums = value.reshape(value.shape[0] if value.ndim > 1 else 1, -1)
            entries[stem] = Importance(torch.from_numpy(sums.copy()), torch.from_numpy(counts.copy()))
        elif not name.endswith((_COUNTS, *_BESIDE)):
            raise FileFormatError(f"{path}: the tensor {name} is none of an importance matrix. Compute it again.")
    if not entries:
        raise FileFormatError(f"{path}: holds no weight. Compute the importance matrix again.")
    names = header.value(_DATASETS) or ()
    chunks, size = (int(header.value(key, 0)) for key in (_CHUNKS, _CHUNK_SIZE))
    return ImportanceMatrix(entries, (names,) if isinstance(names, str) else tuple(names), chunks, size)


def _write_gguf(path: Path, matrix: ImportanceMatrix) -> None:
    import gguf

    # An importance matrix is of no architecture, which the package would write into every file.
    plain: Any = type("Writer", (gguf.GGUFWriter,), {"add_architecture": lambda self: None})
    writer = plain(path, "")
    writer.add_type("imatrix")
    writer.add_array(_DATASETS, list(matrix.datasets))
    writer.add_uint32(_CHUNKS, matrix.chunks)
    writer.add_uint32(_CHUNK_SIZE, matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums.numpy(), dtype=np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts.numpy(), dtype=np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ── the legacy format ─────────────────────────────────────────────────────────────────────────────────────────────────


class _Bytes:
    """Little-endian numbers and texts, one after another."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self.raw, self.at = path, raw, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.raw):
            raise FileFormatError(f"{self.path}: ends early, or is no importance matrix. Compute it again.")
        self.at += size
        return self.raw[self.at - size : self.at]

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        length = self.number()
        if not 0 <= length <= _LONGEST_NAME:
            raise FileFormatError(
                f"{self.path}: is no importance matrix (a name of {length} bytes). Give a .gguf or .dat file of llama.cpp."
            )
        return self.take(length).decode("utf-8", errors="replace")

    @property
    def over(self) -> bool:
        return self.at == len(self.raw)


def _read_legacy(path: Path, raw: bytes) -> ImportanceMatrix:
    data = _Bytes(path, raw)
    count = data.number()
    if count < 1:
        raise FileFormatError(f"{path}: holds no weight. Give a .gguf or .dat file of llama.cpp.")
    entries: dict[str, Importance] = {}
    for _ in range(count):
        name, calls, size = data.text(), data.number(), data.number()
        if size < 1:
            raise FileFormatError(f"{path}: {name} holds no numbers. Compute the importance matrix again.")
        values = torch.from_numpy(np.frombuffer(data.take(4 * size), dtype="<f4").astype(np.float32))
        entries[name] = Importance(values.unsqueeze(0), torch.tensor([float(max(calls, 1))]))
    # Old files end here; others name their chunks and their data.
    chunks = 0 if data.over else data.number()
    datasets = () if data.over else (data.text(),)
    if not data.over:
        raise FileFormatError(f"{path}: goes on after its end, so it is no importance matrix. Compute it again.")
    return ImportanceMatrix(entries, datasets, chunks, 0)


def _legacy(matrix: ImportanceMatrix) -> bytes:
    """Means times calls; a matrix that no row reached gets ones, and a weight that none reached is left out, as in llama.cpp."""
    kept = {name: e for name, e in sorted(matrix.entries.items()) if bool((e.counts > 0).any())}
    parts = [struct.pack("<i", len(kept))]
    for name, entry in kept.items():
        calls = max(-(-int(entry.counts.max()) // max(matrix.chunk_size, 1)), 1)
        counts = entry.counts.unsqueeze(1)
        means = torch.where(counts > 0, entry.sums / counts.clamp(min=1), torch.ones(()))
        values = (means * calls).flatten().numpy().astype("<f4").tobytes()
        parts += [*_text(name), struct.pack("<ii", calls, entry.sums.numel()), values]
    parts += [struct.pack("<i", matrix.chunks), *_text(matrix.datasets[-1] if matrix.datasets else "")]
    return b"".join(parts)


def _text(text: str) -> tuple[bytes, bytes]:
    raw = text.encode()
    return struct.pack("<i", len(raw)), raw
