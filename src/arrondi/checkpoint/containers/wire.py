"""Messages of Protocol Buffers as they lie in a file: `Wire`. What a field holds is left to whoever asks.

Nothing is read that nobody looks at: bytes of weights are passed over. No length is trusted beyond the end of its message.

Source: the encoding of Protocol Buffers (protobuf.dev, "Encoding").
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

from arrondi.errors import FileFormatError

VARINT: Final = 0
BYTES: Final = 2
_FIXED: Final = {1: 8, 5: 4}
_WINDOW: Final = 1 << 16
_LONGEST: Final = 10
"""Bytes of a varint."""


class Field(NamedTuple):
    """A field of a message: its number, how it is encoded, its value (of a varint) and where its bytes lie."""

    number: int
    kind: int
    value: int
    start: int
    stop: int


class Wire:
    """The messages of one open file.

    Args:
        path: names the file.
        file: is open for reading.
        wanted: what kind of file it should be, in a refusal.
        advice: ends a refusal.

    Attributes:
        size: of the file.
    """

    def __init__(
        self, path: Path, file: IO[bytes], wanted: str = "ONNX file", advice: str = "Export it again."
    ) -> None:
        self.path, self.size = path, os.fstat(file.fileno()).st_size
        self._wanted, self._advice = wanted, advice
        self._file, self._at, self._held = file, 0, b""

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message in these bytes.

        Raises:
            FileFormatError: a field that reaches beyond them, or that no message has.
        """
        at = start
        while at < stop:
            tag, at = self.varint(at, stop)
            number, kind = tag >> 3, tag & 7
            if not number or kind not in (VARINT, BYTES, *_FIXED):
                raise self.wrong(at, f"a field of the number {number} and the kind {kind}")
            if kind == VARINT:
                begin = at
                value, at = self.varint(at, stop)
                yield Field(number, kind, value, begin, at)
                continue
            length = _FIXED.get(kind, 0)
            if kind == BYTES:
                length, at = self.varint(at, stop)
            if length > stop - at:
                raise self.wrong(at, f"a field of {length} bytes, of which {stop - at} are there")
            yield Field(number, kind, 0, at, at + length)
            at += length

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """A number and where it ends."""
        value = 0
        for i in range(min(_LONGEST, stop - at)):
            byte = self._byte(at + i)
            value |= (byte & 127) << (7 * i)
            if byte < 128:
                return value % 2**64, at + i + 1
        raise self.wrong(at, "a number that does not end")

    def numbers(self, field: Field) -> list[int]:
        """Whole numbers of a repeated field, packed or one at a time."""
        if field.kind == VARINT:
            return [signed(field.value)]
        found, at = [], field.start
        while at < field.stop:
            value, at = self.varint(at, field.stop)
            found.append(signed(value))
        return found

    def real(self, field: Field) -> float:
        """A float32."""
        if field.stop - field.start != 4:
            raise self.wrong(field.start, "a number that is not of four bytes")
        return float(struct.unpack("<f", self.bytes(field))[0])

    def text(self, field: Field) -> str:
        """A text; bytes that are none are kept as half characters."""
        return self.bytes(field).decode("utf-8", errors="surrogateescape")

    def bytes(self, field: Field) -> bytes:
        """What a field holds."""
        length = field.stop - field.start
        self._file.seek(field.start)
        found = self._file.read(length)
        if len(found) != length:
            raise FileFormatError(f"{self.path}: became shorter while it was read. {self._advice}")
        return found

    def wrong(self, at: int, what: str) -> FileFormatError:
        """The error for bytes that no message has."""
        return FileFormatError(
            f"{self.path}: has {what} at byte {at}. It is truncated or no {self._wanted}. {self._advice}"
        )

    def _byte(self, at: int) -> int:
        if not 0 <= at - self._at < len(self._held):
            self._file.seek(at)
            self._at, self._held = at, self._file.read(_WINDOW)
            if not self._held:
                raise FileFormatError(f"{self.path}: became shorter while it was read. {self._advice}")
        return self._held[at - self._at]


def signed(value: int) -> int:
    """A varint as a signed number of 64 bits."""
    return value - 2**64 if value >= 2**63 else value
