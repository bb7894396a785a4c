"""Hidden states of many batches, in memory up to a limit and in a file beyond it.

Owns: `HiddenStore`, a list of tensors of which each is replaced in place as the batches pass through the blocks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from arrondi.checkpoint import guard_disk
from arrondi.checkpoint.containers.tensor_file import as_memory


class HiddenStore:
    """A fixed number of float32 tensors. What exceeds `limit` bytes lives in an unnamed file in `folder`."""

    def __init__(self, tensors: Iterable[torch.Tensor], limit: int, folder: Path | None = None) -> None:
        self._memory: list[torch.Tensor | None] = []
        self._place: list[tuple[int, torch.Size]] = []
        self._file: int | None = None
        self._folder = folder
        self._limit = limit
        used = end = 0
        for tensor in tensors:
            used += tensor.nbytes
            if used <= limit or folder is None:
                self._memory.append(tensor)
                self._place.append((-1, tensor.shape))
            else:
                self._memory.append(None)
                self._place.append((end, tensor.shape))
                end += tensor.nbytes
                self[len(self._memory) - 1] = tensor

    def __len__(self) -> int:
        return len(self._memory)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> torch.Tensor:
        held = self._memory[i]
        if held is not None:
            return held
        offset, shape = self._place[i]
        tensor = torch.empty(shape)
        view = as_memory(tensor)
        while view:
            done = os.preadv(self._handle(), [view], offset)
            assert done, "the file of hidden states was cut off"
            view, offset = view[done:], offset + done
        return tensor

    def __setitem__(self, i: int, tensor: torch.Tensor) -> None:
        offset, shape = self._place[i]
        assert tensor.shape == shape
        if offset < 0:
            self._memory[i] = tensor
            return
        view = as_memory(tensor.contiguous())
        assert self._folder is not None
        with guard_disk(self._folder):
            while view:
                done = os.pwrite(self._handle(), view, offset)
                view, offset = view[done:], offset + done

    def _handle(self) -> int:
        if self._file is None:
            handle, path = tempfile.mkstemp(dir=self._folder)
            os.unlink(path)
            self._file = handle
        return self._file

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
