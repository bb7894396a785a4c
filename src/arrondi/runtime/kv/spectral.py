"""Keys or values of one layer along their principal directions, in a buffer that grows: `SpectralStore`."""

from __future__ import annotations

import functools

import torch

from arrondi.kernels.directions import SPARE, Prepared
from arrondi.tensor.spectrum import Basis, decode, encode

LOT = 32
"""Tokens that are rounded at once, and for which room is made at least."""


class SpectralStore:
    """Tokens `first` … `stop` of one layer's keys or values; does what `arrondi.runtime.kv.store.Store` does.

    Args:
        basis: their directions.
        like: states (batch, heads, tokens, width) whose batch, heads, type and device count.
        exact: tokens at the beginning of the text that are kept as they are.
    """

    def __init__(self, basis: Basis, like: torch.Tensor, exact: int) -> None:
        self.basis = basis
        self.first = self.stop = self.begin = 0
        self.codes = like.new_zeros((*like.shape[:2], 0, basis.bytes), dtype=torch.uint8)
        self.exact = like.new_zeros((*like.shape[:2], 0, like.shape[-1]))
        self._kept = exact

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The directions as the kernel wants them."""
        return Prepared.of(self.basis)

    def append(self, x: torch.Tensor) -> None:
        """Round (batch, heads, tokens, width) and keep it behind what is there."""
        count, at = x.shape[2], self.stop - self.begin
        if not count:
            return
        missing = self._kept - self.stop
        if missing > 0:
            self.exact = torch.cat([self.exact, x[:, :, :missing]], dim=2)
        spare = -(-SPARE // self.basis.bytes)
        if at + count + spare > self.codes.shape[2]:
            room = -(-((at + count) * 9 // 8 + spare) // LOT) * LOT
            larger = self.codes.new_zeros((*self.codes.shape[:2], room, self.basis.bytes))
            larger[:, :, :at] = self.codes[:, :, :at]
            self.codes = larger
        self.codes[:, :, at : at + count] = encode(x, self.basis, self.stop)
        self.stop += count

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Tokens start … stop as numbers, float32."""
        states = decode(self.codes[:, :, start - self.begin : stop - self.begin], self.basis, start)
        kept = self.exact[:, :, start:stop]
        states[:, :, : kept.shape[2]] = kept
        return states

    def cut(self, stop: int) -> None:
        """Forget tokens from `stop` on."""
        self.stop = max(min(self.stop, stop), self.first)
        self.exact = self.exact[:, :, : self.stop]

    def forget(self, first: int) -> None:
        """Forget tokens before `first`; their room is given back when they fill a quarter of it."""
        self.first = max(self.first, min(first, self.stop))
        gone = self.first - self.begin
        if gone > max(self.codes.shape[2] // 4, LOT):
            self.codes = self.codes[:, :, gone:].clone()
            self.begin = self.first

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.codes, self.exact = (x.index_select(0, rows.to(x.device)) for x in (self.codes, self.exact))

    def bytes_used(self) -> int:
        """Bytes of the tokens that are kept, without the room that is still empty; the directions are the model's."""
        batch, heads = self.codes.shape[:2]
        return batch * heads * (self.stop - self.begin) * self.basis.bytes + self.exact.nbytes

    def bytes_reserved(self) -> int:
        return self.codes.nbytes + self.exact.nbytes
