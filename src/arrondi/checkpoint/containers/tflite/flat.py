"""Tables of FlatBuffers as they lie in a file: `Flat`. What a field holds is left to whoever asks.

Every place is checked against the end of the file before it is read; nothing but what is asked for is read.

Source: the binary format of FlatBuffers (flatbuffers.dev, "Internals").
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, Final

from arrondi.errors import FileFormatError

_WINDOW: Final = 1 << 14
_AGAIN: Final = "Convert it again."


class Flat:
    """The tables of one open file.

    Attributes:
        size: of the file.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.size = path, os.fstat(file.fileno()).st_size
        self._file, self._at, self._held = file, 0, b""

    def root(self) -> int:
        """Where the first table is."""
        return self.place(self.number(0, "<I"))

    def place(self, at: int, length: int = 4) -> int:
        """A place that the file has.

        Raises:
            FileFormatError: it reaches beyond the end.
        """
        if not 0 <= at <= self.size - length:
            raise FileFormatError(f"{self.path}: points to byte {at} of {self.size}. It is truncated or no TFLite file. {_AGAIN}")  # fmt: skip
        return at

    def number(self, at: int, form: str) -> int:
        """A whole number of `struct`'s form."""
        length = struct.calcsize(form)
        self.place(at, length)
        if not self._at <= at <= self._at + len(self._held) - length:
            self._file.seek(at)
            self._at, self._held = at, self._file.read(max(_WINDOW, length))
            if len(self._held) < length:
                raise FileFormatError(f"{self.path}: became shorter while it was read. {_AGAIN}")
        return int(struct.unpack_from(form, self._held, at - self._at)[0])

    def field(self, table: int, slot: int) -> int:
        """Where a field of a table is; 0: it is not there."""
        vtable = table - self.number(table, "<i")
        self.place(vtable, 4)
        if slot >= self.number(vtable, "<H"):
            return 0
        offset = self.number(vtable + slot, "<H")
        return table + offset if offset else 0

    def scalar(self, table: int, slot: int, form: str, usual: int = 0) -> int:
        """A number of a table."""
        at = self.field(table, slot)
        return self.number(at, form) if at else usual

    def table(self, table: int, slot: int) -> int:
        """Where a table inside of a table is; 0: it is not there."""
        at = self.field(table, slot)
        return self.place(at + self.number(at, "<I")) if at else 0

    def vector(self, table: int, slot: int, width: int) -> tuple[int, int]:
        """Where the items of a list begin, and how many there are."""
        at = self.table(table, slot)
        if not at:
            return 0, 0
        count = self.number(at, "<I")
        if count * width > self.size - at - 4:
            raise FileFormatError(f"{self.path}: a list of {count} at byte {at} reaches beyond the end. {_AGAIN}")
        return at + 4, count

    def tables(self, table: int, slot: int) -> list[int]:
        """Where the tables of a list are."""
        start, count = self.vector(table, slot, 4)
        places = range(start, start + 4 * count, 4)
        return [self.place(at + self.number(at, "<I")) for at in places]

    def numbers(self, table: int, slot: int, form: str) -> list[int]:
        """Whole numbers of a list."""
        width = struct.calcsize(form)
        start, count = self.vector(table, slot, width)
        return [self.number(start + width * i, form) for i in range(count)]

    def text(self, table: int, slot: int) -> str:
        """A text; bytes that are none are kept as half characters."""
        start, count = self.vector(table, slot, 1)
        self._file.seek(start)
        return self._file.read(count).decode("utf-8", errors="surrogateescape") if count else ""
