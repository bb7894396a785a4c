"""Ends a run from inside, as a kill would, but in this process; and damage to files, as a bad disk does it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arrondi.pipeline.journal import Journal


class Stop(Exception):
    """Raised where the run is to end."""


@contextlib.contextmanager
def stopped_after(step: str | None = None) -> Iterator[None]:
    """Inside, a run ends as soon as it has recorded this step (None: its first one)."""
    record = Journal.record

    def once(self: Journal, name: str, data: Any, **claims: Any) -> None:
        record(self, name, data, **claims)
        if step in (None, name):
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Journal, "record", once)
        yield


def flip(path: Path) -> None:
    """Change one bit near the end."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip,
    "another header": lambda path: path.write_bytes(b"\x08" + path.read_bytes()[1:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}
"""What can happen to a file between two runs."""
