"""What every writer and every check of files shares: a full disk as a sentence, digests of bytes, renames that last.

Owns: `guard_disk`, `sync_folder`, `digest_pieces` (the digest of a tensor's bytes, computed on all cores) and `file_sha256`, and `WORK`.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import torch

from arrondi.errors import OutputError

PIECE: Final = 4 << 20
"""Bytes that are hashed, read or written at a time. A digest depends on it: changing it changes every digest."""

WORK: Final = ".arrondi"
"""The folder of a run that is going on, inside its output."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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


def sync_folder(folder: Path) -> None:
    """Names in a directory (new files, renames) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_pieces(nbytes: int, piece: Callable[[int, int], memoryview | bytes]) -> str:
    """The digest of so many bytes: SHA-256 over the SHA-256 of each piece of 4 MiB, its first 128 bits in hexadecimal.

    Args:
        nbytes: how many bytes there are.
        piece: (offset, length) → those bytes. It may read or write them on the way, and is called from several threads,
            each time for other bytes, if PyTorch has several.
    """

    def hashed(offset: int) -> bytes:
        return hashlib.sha256(piece(offset, min(PIECE, nbytes - offset))).digest()

    return hashlib.sha256(b"".join(side_by_side(hashed, range(0, nbytes, PIECE)))).hexdigest()[:32]


def digest_of(data: memoryview | bytes) -> str:
    """The same digest of bytes in memory."""
    return digest_pieces(len(data), lambda offset, length: data[offset : offset + length])


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(PIECE):
            found.update(part)
    return found.hexdigest()


def side_by_side(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map`, on as many threads as PyTorch has. The first error is raised here, where the results are taken."""
    items = list(items)
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)
