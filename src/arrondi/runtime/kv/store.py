"""Rounded keys or values of one layer, in buffers that grow: `Store`."""

from __future__ import annotations

from typing import Final

import torch

from arrondi.formats import ActivationScheme
from arrondi.kernels.packed_states import append_token
from arrondi.tensor.states import Lanes, real_states, round_states

_LEAST: Final = 8
"""Blocks for which room is made at first; later an eighth more than is needed."""


class Store:
    """Tokens `first` … `stop` of one layer's keys or values.

    Args:
        how: what they become.
        like: states (batch, heads, tokens, width) whose batch, heads, width and device count.
        keys: whether they are keys.
        clip: of a stored scale.
    """

    def __init__(self, how: ActivationScheme, like: torch.Tensor, *, keys: bool, clip: float | None) -> None:
        self.how, self.clip = how, clip
        self.lanes = Lanes.of(how, like.shape[-1], keys=keys)
        self.first = self.stop = 0
        self.begin = 0
        """The token at which the buffers begin: that of the block in which `first` lies, or an earlier one."""
        self.unit = 1.0 if clip is None else clip / how.scheme.format.qmax
        """What a code is multiplied by where no scales are kept."""
        self.codes = self._room(like, self.lanes.codes_shape(0), torch.uint8)
        scales = self.lanes.scale_shape(0)
        self.scale = None if scales is None else self._room(like, scales, self.lanes.stored)
        self.offset = self._room(like, scales, self.lanes.stored) if scales and self.lanes.offsets else None

    @staticmethod
    def _room(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return like.new_zeros((*like.shape[:2], *shape), dtype=dtype)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        found = {"codes": self.codes, "scale": self.scale, "offset": self.offset}
        return {name: buffer for name, buffer in found.items() if buffer is not None}

    @property
    def blocks(self) -> int:
        """Blocks for which there is room."""
        rows = self.codes.shape[2]
        return rows if self.lanes.keys else rows * self.lanes.per_byte // self.lanes.block

    def append(self, x: torch.Tensor) -> None:
        """Round (batch, heads, tokens, width) and keep it behind what is there."""
        count = x.shape[2]
        if not count:
            return
        at = self.stop - self.begin
        self._make_room(at + count)
        buffers = self.codes, self.scale, self.offset
        if count == 1 and append_token(x, self.how, self.lanes, buffers, at, self.clip):
            self.stop += 1
            return
        rounded = round_states(x, self.how, self.clip)
        self.lanes.write(self.codes, rounded.codes, at)
        for buffer, part in ((self.scale, rounded.scale), (self.offset, rounded.offset)):
            if buffer is not None and part is not None:
                self.lanes.write_scale(buffer, part, at)
        self.stop += count

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Tokens start … stop as numbers, float32."""
        low, high = start - self.begin, stop - self.begin
        scale = self.unit if self.scale is None else self.lanes.read_scale(self.scale, low, high)
        offset = None if self.offset is None else self.lanes.read_scale(self.offset, low, high)
        return real_states(self.lanes.read(self.codes, low, high), self.lanes.lowest, scale, offset)

    def cut(self, stop: int) -> None:
        """Forget tokens from `stop` on; a block that is left half is for the caller to read before."""
        self.stop = max(min(self.stop, stop), self.first)

    def forget(self, first: int) -> None:
        """Forget tokens before `first`; their room is given back when they fill a quarter of it."""
        self.first = max(self.first, min(first, self.stop))
        gone = (self.first - self.begin) // self.lanes.block
        if gone >= max(self.blocks // 4, 1):
            self._replace(gone, max(-(-(self.stop - self.begin) // self.lanes.block) - gone, 0))
            self.begin += gone * self.lanes.block

    def _make_room(self, tokens: int) -> None:
        need = -(-tokens // self.lanes.block)
        if need > self.blocks:
            self._replace(0, max(need + need // 8, _LEAST))

    def _replace(self, skip: int, blocks: int) -> None:
        """Buffers of so many blocks, filled from block `skip` on."""
        shapes = {"codes": self.lanes.codes_shape, "scale": self.lanes.scale_shape, "offset": self.lanes.scale_shape}
        for name, old in self.buffers.items():
            skipped, new = (shapes[name](n) for n in (skip, blocks))
            assert skipped is not None and new is not None
            larger = old.new_zeros((*old.shape[:2], *new))
            kept = old[:, :, skipped[0] :]
            count = min(kept.shape[2], larger.shape[2])
            larger[:, :, :count] = kept[:, :, :count]
            setattr(self, name, larger)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for name, buffer in self.buffers.items():
            setattr(self, name, buffer.index_select(0, rows.to(buffer.device)))

    def bytes_used(self) -> int:
        """Bytes of the tokens that are kept, without the room that is still empty."""
        blocks = -(-(self.stop - self.begin) // self.lanes.block)
        share = blocks / self.blocks if self.blocks else 0
        return round(sum(b.nbytes for b in self.buffers.values()) * share)

    def bytes_reserved(self) -> int:
        return sum(b.nbytes for b in self.buffers.values())


class Window:
    """The newest tokens (batch, heads, tokens, width), as they are; room for those to come lies behind them."""

    def __init__(self, like: torch.Tensor) -> None:
        self.buffer = like.new_empty((*like.shape[:2], 0, like.shape[-1]))
        self.first = self.stop = 0

    @property
    def states(self) -> torch.Tensor:
        return self.buffer[:, :, self.first : self.stop]

    def __len__(self) -> int:
        return self.stop - self.first

    def append(self, x: torch.Tensor) -> None:
        count = x.shape[2]
        if self.stop + count > self.buffer.shape[2]:
            kept = self.states
            room = -(-(len(self) + count + 1) * 5 // 4 // 16) * 16
            larger = x.new_empty((*x.shape[:2], room, x.shape[-1]))
            larger[:, :, : len(self)] = kept
            self.buffer, self.first, self.stop = larger, 0, len(self)
        self.buffer[:, :, self.stop : self.stop + count] = x
        self.stop += count

    def take(self, count: int) -> torch.Tensor:
        """The oldest tokens, which leave."""
        taken = self.buffer[:, :, self.first : self.first + count]
        self.first += count
        return taken

    def shrink(self) -> None:
        """Give back room that a long prompt took."""
        if self.buffer.shape[2] > 2 * len(self) + 64:
            self.buffer, self.first, self.stop = self.states.clone(), 0, len(self)

    def put_before(self, x: torch.Tensor) -> None:
        """Tokens that come back from the store."""
        states = torch.cat([x.to(self.buffer.dtype), self.states], dim=2)
        self.buffer, self.first, self.stop = states, 0, states.shape[2]

    def cut(self, count: int) -> None:
        """Forget the newest tokens."""
        self.stop -= count

    def select(self, rows: torch.Tensor) -> None:
        self.buffer = self.states.index_select(0, rows.to(self.buffer.device))
        self.first, self.stop = 0, self.buffer.shape[2]
