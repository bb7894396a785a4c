"""Writing a checkpoint tensor by tensor, in any order, into files whose layout is known beforehand.

Owns: `ShardPlan` (which tensor goes to which byte of which file) and `ShardWriter`. Because the plan fixes every byte's
place, a run that was killed writes the same tensors to the same places again and ends with the same files. Files carry the
suffix `.partial` until `publish` renames them. Every write gives a digest, and `digest` reads the bytes back, so that a run
that goes on can tell what is there from what was claimed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from arrondi.checkpoint.containers.disk import digest_of, digest_pieces, guard_disk, sync_folder
from arrondi.checkpoint.containers.json_file import write_json
from arrondi.checkpoint.containers.tensor_file import (
    DTYPE_NAMES,
    Entry,
    as_memory,
    encode_header,
    read_bytes,
    read_header,
    read_tensor,
)
from arrondi.errors import FileFormatError, OutputError

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, element type and shape of a tensor to be written."""

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """The files of a checkpoint.

    Attributes:
        files: file name → tensors in order.
        metadata: words that every file has beside its tensors.
    """

    files: dict[str, list[TensorSpec]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def split(
        cls, tensors: list[TensorSpec], shard_bytes: int, metadata: Mapping[str, str] = MappingProxyType({})
    ) -> ShardPlan:
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
            return cls({"model.safetensors": shards[0]}, metadata)
        n = len(shards)
        return cls({f"model-{i + 1:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards)}, metadata)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for specs in self.files.values() for _, dtype, shape in specs)

    @property
    def names(self) -> list[str]:
        """Every file that `publish` makes: the shards, and the index if there are several."""
        return [*self.files, *([INDEX] if len(self.files) > 1 else [])]

    def index(self) -> dict[str, object] | None:
        """The `model.safetensors.index.json` of a sharded checkpoint, else None."""
        if len(self.files) == 1:
            return None
        weight_map = {name: file for file, specs in self.files.items() for name, _, _ in specs}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter:
    """`.partial` files in `folder`: `put` tensors in any order, and `publish` into `target` when every one is there.

    Files are opened for each tensor and closed again: a checkpoint may have more shards than a process may open files.
    """

    def __init__(self, folder: Path, plan: ShardPlan, target: Path | None = None) -> None:
        """Make the files, or take those of a run that was killed, also where it had begun to publish them.

        Raises:
            OutputError: the disk is full.
        """
        self.folder, self.plan, self.target = folder, plan, target or folder
        self._place: dict[str, tuple[str, int, int]] = {}
        self._headers: dict[str, bytes] = {}
        self._specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._fresh: dict[str, str] = {}
        self._dirty: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for file, specs in plan.files.items():
            header, ranges = encode_header(specs, plan.metadata)
            self._place |= {name: (file, *span) for name, span in ranges.items()}
            self._specs |= {name: (dtype, shape) for name, dtype, shape in specs}
            self._headers[file] = header
            self._prepare(file, header, max((stop for _, stop in ranges.values()), default=len(header)))

    def _prepare(self, file: str, header: bytes, size: int) -> None:
        with guard_disk(self.folder), self._open(file, os.O_CREAT) as handle:
            if os.pread(handle, len(header), 0) != header:
                self._dirty.add(file)
                _pwrite(handle, header, 0)
            if os.fstat(handle).st_size != size:
                self._dirty.add(file)
                os.ftruncate(handle, size)

    def path(self, file: str) -> Path:
        """Where a file lies: beside its final name until it is published."""
        partial, final = self.folder / f"{file}.partial", self.target / file
        return final if not partial.exists() and final.exists() and not final.is_symlink() else partial

    @contextmanager
    def _open(self, file: str, flags: int = 0) -> Iterator[int]:
        handle = os.open(self.path(file), os.O_RDWR | os.O_NOFOLLOW | flags, 0o644)  # never what a link leads to
        try:
            yield handle
        finally:
            os.close(handle)

    def put(self, name: str, tensor: torch.Tensor) -> str:
        """Write a tensor to its place and give the digest of its bytes.

        Raises:
            OutputError: the disk is full; what was finished before stays valid.
        """
        file, start, stop = self._place[name]
        data = as_memory(tensor.contiguous())
        assert data.nbytes == stop - start, f"{name}: {data.nbytes} bytes do not fit its place"
        self._dirty.add(file)
        with guard_disk(self.folder), self._open(file) as handle:

            def piece(offset: int, length: int) -> memoryview:
                part = data[offset : offset + length]
                _pwrite(handle, part, start + offset)
                return part

            self._fresh[name] = digest_pieces(data.nbytes, piece)
        return self._fresh[name]

    def copy(self, entry: Entry) -> str:
        """Copy a stored tensor as the model has it, a piece at a time, and give the digest of the bytes that are stored."""
        if entry.turn is not None:
            stored = read_tensor(entry)
            self.put(entry.name, entry.made(stored))
            return digest_of(as_memory(stored))
        file, start, _ = self._place[entry.name]
        self._dirty.add(file)
        with guard_disk(self.folder), self._open(file) as handle:

            def piece(offset: int, length: int) -> memoryview:
                part = as_memory(read_bytes(entry, offset, length))
                _pwrite(handle, part, start + offset)
                return part

            self._fresh[entry.name] = digest_pieces(entry.nbytes, piece)
        return self._fresh[entry.name]

    def sync(self) -> dict[str, str]:
        """Everything put so far survives a power cut. Gives the digest of each tensor put since the last call."""
        with guard_disk(self.folder):
            for file in sorted(self._dirty):
                with self._open(file) as handle:
                    os.fdatasync(handle)
        self._dirty.clear()
        fresh, self._fresh = self._fresh, {}
        return fresh

    def get(self, name: str) -> torch.Tensor:
        """Read back a tensor that was put, in this run or in one that was killed."""
        return read_tensor(self._entry(name))

    def digest(self, name: str) -> str | None:
        """The digest of what lies in a tensor's place now; None for a name that the plan does not have."""
        if name not in self._place:
            return None
        return _digest_there(self._entry(name))

    def described(self, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """`bytes` and `digest` of every shard, from the digests of all its tensors: nothing is read again."""
        found = {}
        for file, specs in self.plan.files.items():
            missing = [name for name, _, _ in specs if name not in digests]
            assert not missing, f"{missing[0]} was never written"
            size = max((self._place[name][2] for name, _, _ in specs), default=len(self._headers[file]))
            digest = _shard_digest(self._headers[file], [digests[name] for name, _, _ in specs])
            found[file] = {"bytes": size, "digest": digest}
        return found

    def _entry(self, name: str) -> Entry:
        file, start, stop = self._place[name]
        dtype, shape = self._specs[name]
        return Entry(name, self.path(file), DTYPE_NAMES[dtype], shape, start, stop)

    def publish(self) -> None:
        """Give the finished files their names, write the index of a sharded checkpoint, and let all of that last."""
        self.sync()
        with guard_disk(self.target):
            for file in self.plan.files:
                partial = self.folder / f"{file}.partial"
                if partial.exists():
                    os.replace(partial, self.target / file)
                elif not (self.target / file).exists():  # a publish that was interrupted had moved it
                    raise OutputError(
                        f"{self.target / file}: gone, though it was written. Remove {self.target} and start again."
                    )
            sync_folder(self.target)
        index = self.plan.index()
        if index is not None:
            write_json(self.target / INDEX, index)


def shard_digest(path: Path) -> str | None:
    """The digest of a file of tensors as it lies there, equal to that of `ShardWriter.described`; None if it is none."""
    try:
        entries = read_header(path)
    except FileFormatError:
        return None
    with path.open("rb") as file:
        header = file.read(min((e.start for e in entries.values()), default=path.stat().st_size))
    return _shard_digest(header, [_digest_there(e) for e in entries.values()])


def _shard_digest(header: bytes, tensors: list[str]) -> str:
    """Of the header and of the digests of the tensors, in the order of their bytes."""
    return digest_of(header + "".join(tensors).encode())


def _digest_there(entry: Entry) -> str:
    return digest_pieces(entry.nbytes, lambda offset, length: as_memory(read_bytes(entry, offset, length)))


def _pwrite(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
