"""Writing a checkpoint tensor by tensor, in any order, into files whose layout is known beforehand.

Owns: `ShardPlan` (which tensor goes to which byte of which file) and `ShardWriter`. Because the plan fixes every byte's
place, a run that was killed writes the same tensors to the same places again and ends with the same files. Files carry the
suffix `.partial` until `publish` renames them.
"""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from arrondi.checkpoint.containers.tensor_file import (
    DTYPE_NAMES,
    Entry,
    as_memory,
    encode_header,
    read_bytes,
    read_tensor,
)
from arrondi.errors import OutputError

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, element type and shape of a tensor to be written."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ShardPlan:
    """The files of a checkpoint: file name → tensors in order."""

    files: dict[str, list[TensorSpec]]

    @classmethod
    def split(cls, tensors: list[TensorSpec], shard_bytes: int) -> ShardPlan:
        """Fill shards in order, each up to `shard_bytes` (a larger tensor gets one for itself); names as Hugging Face's."""
        shards: list[list[TensorSpec]] = [[]]
        used = 0
        for spec in tensors:
            size = math.prod(spec[2]) * spec[1].itemsize
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(spec)
            used += size
        if len(shards) == 1:
            return cls({"model.safetensors": shards[0]})
        n = len(shards)
        return cls({f"model-{i + 1:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards)})

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for specs in self.files.values() for _, dtype, shape in specs)

    def index(self) -> dict[str, object] | None:
        """The `model.safetensors.index.json` of a sharded checkpoint, else None."""
        if len(self.files) == 1:
            return None
        weight_map = {name: file for file, specs in self.files.items() for name, _, _ in specs}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter:
    """Open `.partial` files in `folder`; `put` tensors in any order; `publish` when every one is there."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.folder, self.plan = folder, plan
        self._files: dict[str, int] = {}
        self._place: dict[str, tuple[str, int, int]] = {}
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._dirty: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for file, specs in plan.files.items():
            header, ranges = encode_header(specs)
            self._place |= {name: (file, *span) for name, span in ranges.items()}
            self._specs |= {name: (dtype, shape) for name, dtype, shape in specs}
            handle = os.open(self.path(file), os.O_RDWR | os.O_CREAT, 0o644)
            self._files[file] = handle
            with guard_disk(folder):
                _pwrite(handle, header, 0)
                os.ftruncate(handle, max((stop for _, stop in ranges.values()), default=len(header)))

    def path(self, file: str) -> Path:
        """Where a file lies until it is published."""
        return self.folder / f"{file}.partial"

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place.

        Raises:
            OutputError: the disk is full; what was finished before stays valid.
        """
        file, start, stop = self._place[name]
        data = as_memory(tensor.contiguous())
        assert data.nbytes == stop - start, f"{name}: {data.nbytes} bytes do not fit its place"
        self._dirty.add(file)
        with guard_disk(self.folder):
            _pwrite(self._files[file], data, start)

    def sync(self) -> None:
        """Everything put so far survives a power cut."""
        with guard_disk(self.folder):
            for file in self._dirty:
                os.fdatasync(self._files[file])
        self._dirty.clear()

    def copy(self, entry: Entry, chunk_bytes: int) -> None:
        """Copy a stored tensor as it is, a piece at a time."""
        file, start, _ = self._place[entry.name]
        self._dirty.add(file)
        with guard_disk(self.folder):
            for offset in range(0, entry.nbytes, chunk_bytes):
                piece = read_bytes(entry, offset, min(chunk_bytes, entry.nbytes - offset))
                _pwrite(self._files[file], as_memory(piece), start + offset)

    def get(self, name: str) -> torch.Tensor:
        """Read back a tensor that was put, in this run or in one that was killed."""
        file, start, stop = self._place[name]
        dtype, shape = self._specs[name]
        return read_tensor(Entry(name, self.path(file), DTYPE_NAMES[dtype], shape, start, stop))

    @staticmethod
    def publish(folder: Path, plan: ShardPlan, target: Path) -> None:
        """Give the finished files of `folder` their names in `target` and write the index of a sharded checkpoint."""
        for file in plan.files:
            partial = folder / f"{file}.partial"
            if partial.exists():
                os.replace(partial, target / file)
            elif not (target / file).exists():  # it was moved when an earlier publish was interrupted
                raise OutputError(f"{target / file}: gone, though it was written. Remove {target} and start again.")
        index = plan.index()
        if index is not None:
            write_json(target / "model.safetensors.index.json", index)

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()


def write_json(path: Path, document: object) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a half."""
    temporary = path.with_name(path.name + ".partial")
    with guard_disk(path.parent):
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class guard_disk:
    """Turns "no space left" into a sentence; everything else passes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise OutputError(
                f"{self.folder}: the disk is full ({error.strerror}). What was finished is kept: free some space and run the same command again to continue."
            ) from error


def _pwrite(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
