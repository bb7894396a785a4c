"""What one rank sends to another: coded numbers and plain ones in one message.

Owns: `Parcel`, and `Layout`, which sorts the numbers of a flat buffer into those that are coded and those that are not. Vectors (biases,
norms) and small tensors stay plain: they are few, and a block across two of them would mix their magnitudes. Coded tensors begin
at the border of a block each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch.nn.functional import pad

from arrondi.tensor.blocks import BlockCodec

_LONG: Final = 1 << 16
"""Coded numbers of a row from which on a copy costs more than a call."""


@dataclass(frozen=True)
class Parcel:
    """A row of `coded` numbers that go through the codec and `plain` numbers behind them that stay as they are, in `dtype`."""

    codec: BlockCodec
    coded: int
    plain: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.coded + self.plain

    @property
    def nbytes(self) -> int:
        return self.codec.nbytes(self.coded) + self.plain * self.dtype.itemsize

    def encode(self, rows: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(..., width) → (..., nbytes) uint8."""
        if rows.ndim > 1 and self.plain and self.coded >= _LONG:
            # Row by row, the coded numbers lie next to each other and need not be copied.
            long = [self.encode(row, generator) for row in rows.reshape(-1, self.width)]
            return torch.stack(long).view(*rows.shape[:-1], self.nbytes)
        message = self.codec.encode(rows[..., : self.coded], generator)
        if not self.plain:
            return message
        plain = rows[..., self.coded :].to(self.dtype).contiguous().view(torch.uint8)
        return torch.cat((message, plain), dim=-1)

    def decode(self, messages: torch.Tensor) -> torch.Tensor:
        """(..., nbytes) → (..., width) float32."""
        size = self.codec.nbytes(self.coded)
        values = self.codec.decode(messages[..., :size], self.coded)
        if not self.plain:
            return values
        plain = messages[..., size:].clone(memory_format=torch.contiguous_format).view(self.dtype)
        return torch.cat((values, plain.float()), dim=-1)


class Piece(NamedTuple):
    """Some consecutive numbers of a buffer."""

    size: int
    coded: bool


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a flat buffer go: those to be coded first, each piece padded to whole blocks, then the plain ones."""

    pieces: tuple[Piece, ...]
    block: int

    @classmethod
    def of(cls, pieces: Iterable[Piece], block: int) -> Layout:
        """Neighbours that stay plain become one piece."""
        merged: list[Piece] = []
        for piece in pieces:
            if merged and not piece.coded and not merged[-1].coded:
                merged[-1] = Piece(merged[-1].size + piece.size, False)
            elif piece.size:
                merged.append(piece)
        return cls(tuple(merged), block)

    @property
    def count(self) -> int:
        """Numbers of the buffer."""
        return sum(piece.size for piece in self.pieces)

    @property
    def coded(self) -> int:
        """Numbers that go through the codec, whole blocks."""
        return sum(-(-piece.size // self.block) * self.block for piece in self.pieces if piece.coded)

    @property
    def plain(self) -> int:
        return sum(piece.size for piece in self.pieces if not piece.coded)

    def sort(self, flat: torch.Tensor) -> torch.Tensor:
        """(..., count) → (..., coded + plain)."""
        if len(self.pieces) == 1 and self.coded in (0, self.count):
            return flat
        parts = flat.split([piece.size for piece in self.pieces], dim=-1)
        sorted_ = [
            pad(p, (0, -p.shape[-1] % self.block)) for p, piece in zip(parts, self.pieces, strict=True) if piece.coded
        ]
        sorted_ += [p for p, piece in zip(parts, self.pieces, strict=True) if not piece.coded]
        return torch.cat(sorted_, dim=-1)

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., coded + plain) → (..., count), the inverse of `sort`."""
        if len(self.pieces) == 1 and self.coded in (0, self.count):
            return rows
        parts, coded, plain = [], 0, self.coded
        for piece in self.pieces:
            start = coded if piece.coded else plain
            parts.append(rows[..., start : start + piece.size])
            if piece.coded:
                coded += -(-piece.size // self.block) * self.block
            else:
                plain += piece.size
        return torch.cat(parts, dim=-1)

    def share(self, flat: torch.Tensor, ranks: int) -> torch.Tensor:
        """(count,) → (ranks, width): a share of the coded and of the plain numbers for every rank, zeros where there are none."""
        rows = flat.new_zeros((ranks, sum(self.shares(ranks))))
        for rank, column, start, size in _spans(self, ranks):
            rows[rank, column : column + size] = flat[start : start + size]
        return rows

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """(ranks, width) → (count,), the inverse of `share`."""
        flat = rows.new_empty(self.count)
        for rank, column, start, size in _spans(self, len(rows)):
            flat[start : start + size] = rows[rank, column : column + size]
        return flat

    def shares(self, ranks: int) -> tuple[int, int]:
        """Coded and plain numbers of one rank's share."""
        return -(-self.coded // (ranks * self.block)) * self.block, -(-self.plain // ranks)


@functools.lru_cache(maxsize=1024)
def _spans(layout: Layout, ranks: int) -> tuple[tuple[int, int, int, int], ...]:
    """(rank, column, place in the buffer, how many) of all runs of numbers that `share` moves, each once."""
    spans, start, at = [], 0, {True: 0, False: 0}
    widths = dict(zip((True, False), layout.shares(ranks), strict=True))
    for size, coded in layout.pieces:
        width, left, place = widths[coded], size, at[coded]
        while left:
            rank, column = divmod(place, width)
            some = min(left, width - column)
            spans.append((rank, column + (0 if coded else widths[True]), start, some))
            start, place, left = start + some, place + some, left - some
        at[coded] += -(-size // layout.block) * layout.block if coded else size
    return tuple(spans)


def whole(count: int, block: int) -> Layout:
    """A buffer of which nothing is known: all of it is coded."""
    return Layout((Piece(count, True),), block)


def pieces_of(shapes: Sequence[torch.Size], counts: Sequence[int], least: int) -> list[Piece]:
    """Tensors of two or more axes with at least so many numbers are coded."""
    return [Piece(n, len(shape) > 1 and n >= least) for shape, n in zip(shapes, counts, strict=True)]
