"""Rooms for bytes: in memory while a budget lasts, in an unnamed file beyond it.

Owns: `Budget`, the bytes of memory that several stores share, and `Rooms`, which hands rooms out, writes them, reads them and
gives all of them back for sure: a file that nobody closed is closed when its owner is collected.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arrondi.checkpoint import guard_disk
from arrondi.checkpoint.containers.tensor_file import as_memory


class Budget:
    """Bytes of memory, shared by the stores that are given it. `used` may exceed `limit` only where there is no file."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0


@dataclass(eq=False, slots=True)
class Room:
    """So many bytes in memory (uint8) or, if that is None, from `offset` on in the file."""

    nbytes: int
    memory: torch.Tensor | None
    offset: int = 0


class Rooms:
    """All rooms of one store. Without a folder everything stays in memory."""

    def __init__(self, budget: Budget, folder: Path | None) -> None:
        self._budget, self._folder = budget, folder
        self._held = self._end = 0
        self._free: dict[int, list[Room]] = {}
        self._file: int | None = None
        self._closer: weakref.finalize[Any, Any] | None = None

    def take(self, nbytes: int) -> Room:
        """A room of this size: one that was released, or a new one."""
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        if self._folder is None or self._budget.used + nbytes <= self._budget.limit:
            self._budget.used += nbytes
            self._held += nbytes
            return Room(nbytes, torch.empty(nbytes, dtype=torch.uint8))
        self._end += nbytes
        return Room(nbytes, None, self._end - nbytes)

    def release(self, room: Room) -> None:
        """Memory goes back to the budget; a piece of the file waits for the next of its size."""
        if room.memory is None:
            self._free.setdefault(room.nbytes, []).append(room)
        else:
            self._budget.used -= room.nbytes
            self._held -= room.nbytes

    def write(self, room: Room, content: torch.Tensor) -> None:
        """Fill a room with the bytes (uint8) of a tensor.

        Raises:
            OutputError: the disk is full.
        """
        if room.memory is not None:
            room.memory.copy_(content)
            return
        view, offset = as_memory(content), room.offset
        assert self._folder is not None
        with guard_disk(self._folder):
            while view:
                done = os.pwrite(self._handle(self._folder), view, offset)
                view, offset = view[done:], offset + done

    def read(self, room: Room) -> torch.Tensor:
        """The bytes of a room, as the caller's own tensor of uint8."""
        if room.memory is not None:
            return room.memory.clone()
        content = torch.empty(room.nbytes, dtype=torch.uint8)
        view, offset = as_memory(content), room.offset
        while view:
            assert self._file is not None
            done = os.preadv(self._file, [view], offset)
            assert done, "the file of hidden states was cut off"
            view, offset = view[done:], offset + done
        return content

    def holds(self, room: Room, content: torch.Tensor) -> bool:
        """Whether a room holds these bytes."""
        return torch.equal(self.read(room) if room.memory is None else room.memory, content)

    def _handle(self, folder: Path) -> int:
        if self._file is None:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                self._file = os.dup(file.fileno())
            self._closer = weakref.finalize(self, os.close, self._file)
        return self._file

    def close(self) -> None:
        """Give everything back: memory to the budget, the file and its descriptor to the system."""
        self._budget.used -= self._held
        self._held = self._end = 0
        self._free.clear()
        self._file = None
        if self._closer is not None:
            self._closer()
            self._closer = None
