"""Keys and values in packed form: real numbers (batch, heads, tokens, width) ↔ bytes.

Owns: `round_states`, `Lanes` (where a code lies) with `write`, `read` and their scales. Pure functions of tensors; who keeps the
buffers and lets them grow is `arrondi.runtime.kv`.

A byte holds 8 / bits codes, and sixteen bytes in a row belong to sixteen lanes of a register, so that one shift and one mask give
sixteen codes that are multiplied at once:

    keys    blocks of `block` tokens: (…, blocks, width · bits / 8, block). A byte holds neighbouring channels of one token; lanes are
            tokens, so the products of a query with sixteen keys need no sum across lanes.
    values  (…, tokens · bits / 8, width). A byte holds neighbouring tokens of one channel; lanes are channels.

Codes are stored from zero upwards (code - qmin). Scales follow tokens, (…, blocks, groups, block), or channels of a block,
(…, blocks, width).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from arrondi.formats import ActivationScheme, PerBlock, PerGroup, PerTensor
from arrondi.formats.kv import BLOCK
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.ranges.grid import STORED, Grid


class Rounded(NamedTuple):
    """Codes from zero upwards, (batch, heads, tokens, width) uint8, with their scales and offsets: (batch, heads, tokens, groups),
    (batch, heads, blocks, width) where they follow channels, or None where they are one stored number or none."""

    codes: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None


def round_states(x: torch.Tensor, how: ActivationScheme, clip: float | None = None) -> Rounded:
    """Round keys or values to nearest.

    Args:
        x: (batch, heads, tokens, width), any float dtype, finite; whole groups of tokens where scales follow channels.
        how: one side of a `CacheScheme`.
        clip: the largest magnitude that a stored scale is for.

    Raises:
        DataError: NaN, infinity, or a scale that its storage does not hold.

    Source: Liu et al. 2024, arXiv:2402.02750 (codes of (x - min) / s with s = (max - min) / (2^b - 1), s = 1 where all are equal);
    LightSeq, Wang et al. 2022, arXiv:2110.05722 (clip(round(127 x / c), -127, 127)).
    """
    scheme = how.scheme
    lowest = -scheme.format.qmin
    match scheme.granularity:
        case PerTensor():
            assert clip is not None
            grid = Grid(torch.full((1, 1, 1, 1), clip / scheme.format.qmax, dtype=torch.float32, device=x.device))
            codes = quantize_with(x.clamp(-clip, clip), scheme, grid, name="a key or value").codes
            return Rounded(codes.view(torch.uint8) + lowest, None, None)
        case PerBlock(rows, _):
            # Tokens as the last axis: the same groups, next to each other in memory.
            beside = replace(scheme, granularity=PerGroup(rows))
            q = quantize_tensor(x.transpose(-1, -2).contiguous(), beside, name="keys")
            codes = q.codes.transpose(-1, -2)
            parts = [None if p is None else p.transpose(-1, -2) for p in (q.grid.scale, q.grid.offset)]
        case _:
            q = quantize_tensor(x, scheme, name="a key or value")
            codes = q.codes
            parts = [q.grid.scale, q.grid.offset]
    return Rounded(codes.view(torch.uint8) + lowest, *parts)


@dataclass(frozen=True)
class Lanes:
    """Where codes and scales of keys or values lie.

    Attributes:
        bits: of a code.
        width: channels of a head.
        keys: whether lanes are tokens, as for keys, or channels.
        block: tokens of a block.
        groups: scales of a token; 0 where they follow the channels of a block; -1 where there is one for everything.
        lowest: what is subtracted from a stored code.
        stored: type of scales and offsets.
        offsets: whether there are offsets.
    """

    bits: int
    width: int
    keys: bool
    block: int
    groups: int
    lowest: int
    stored: torch.dtype
    offsets: bool

    @staticmethod
    def of(how: ActivationScheme, width: int, *, keys: bool) -> Lanes:
        scheme = how.scheme
        block, groups = BLOCK, 1
        match scheme.granularity:
            case PerBlock(rows, _):
                block, groups = rows, 0
            case PerGroup(size):
                groups = width // size
            case PerTensor():
                groups = -1
        assert isinstance(scheme.scale, str)
        stored = STORED[scheme.scale]
        return Lanes(scheme.format.bits, width, keys, block, groups, -scheme.format.qmin, stored, not scheme.symmetric)

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def code_bytes(self) -> int:
        """Of a block of one head."""
        return self.width * self.block // self.per_byte

    def codes_shape(self, blocks: int) -> tuple[int, ...]:
        """Of the codes of one head."""
        if self.keys:
            return blocks, self.width // self.per_byte, self.block
        return blocks * self.block // self.per_byte, self.width

    def scale_shape(self, blocks: int) -> tuple[int, ...] | None:
        """Of the scales of one head; None where there are none."""
        if self.groups < 0:
            return None
        return (blocks, self.groups, self.block) if self.groups else (blocks, self.width)

    def write(self, buffer: torch.Tensor, codes: torch.Tensor, at: int) -> None:
        """Put codes (batch, heads, tokens, width) at token `at` of a buffer (batch, heads, *codes_shape)."""
        if self.keys:
            packed = _joined(codes.unflatten(-1, (-1, self.per_byte)), self.bits, -1)
            _by_token(buffer, self.block)[_places(at, codes.shape[2], self.block)] = packed.permute(2, 0, 1, 3)
            return
        for j in range(self.per_byte):
            first = (j - at) % self.per_byte
            part = codes[:, :, first :: self.per_byte] << (self.bits * j)
            if part.shape[2]:
                start = (at + first) // self.per_byte
                rows = buffer[:, :, start : start + part.shape[2]]
                rows &= 255 ^ ((2**self.bits - 1) << (self.bits * j))
                rows |= part

    def read(self, buffer: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The codes of tokens start … stop, (batch, heads, tokens, width) uint8."""
        mask, shifts = 2**self.bits - 1, range(0, 8, self.bits)
        if self.keys:
            low, high = start // self.block, -(-stop // self.block)
            part = buffer[:, :, low:high]  # (…, blocks, width / per byte, block)
            codes = torch.stack([(part >> s) & mask for s in shifts], dim=4)
            codes = codes.permute(0, 1, 2, 5, 3, 4).reshape(*buffer.shape[:2], -1, self.width)
            return codes[:, :, start - low * self.block : stop - low * self.block]
        low, high = start // self.per_byte, -(-stop // self.per_byte)
        part = buffer[:, :, low:high]
        codes = torch.stack([(part >> s) & mask for s in shifts], dim=3).flatten(2, 3)
        return codes[:, :, start - low * self.per_byte : stop - low * self.per_byte]

    def write_scale(self, buffer: torch.Tensor, scale: torch.Tensor, at: int) -> None:
        """Put scales or offsets, as `round_states` gives them, at token `at`."""
        if self.groups:
            _by_token(buffer, self.block)[_places(at, scale.shape[2], self.block)] = scale.permute(2, 0, 1, 3).to(
                buffer.dtype
            )
        else:
            low = at // self.block
            buffer[:, :, low : low + scale.shape[2]] = scale

    def read_scale(self, buffer: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Scales or offsets of tokens start … stop, float32, one for every code."""
        low, high = start // self.block, -(-stop // self.block)
        part = buffer[:, :, low:high].float()
        if self.groups:
            part = part.transpose(-1, -2).flatten(2, 3)  # (batch, heads, tokens, groups)
            part = part.repeat_interleave(self.width // self.groups, dim=-1)
        else:
            part = part.repeat_interleave(self.block, dim=2)
        return part[:, :, start - low * self.block : stop - low * self.block]


def real_states(
    codes: torch.Tensor, lowest: int, scale: torch.Tensor | float, offset: torch.Tensor | None
) -> torch.Tensor:
    """(code - lowest) · scale + offset in float32, as a QTensor reads."""
    x = codes.float()
    if lowest:
        x -= lowest
    x *= scale
    if offset is not None:
        x += offset
    return x


def _joined(parts: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Bytes from the codes along an axis, the first one lowest."""
    found, *rest = parts.unbind(dim)
    for j, part in enumerate(rest, 1):
        found = found | (part << (bits * j))
    return found


def _by_token(buffer: torch.Tensor, block: int) -> torch.Tensor:
    """A view of (batch, heads, blocks, n, block) as (blocks, block, batch, heads, n)."""
    return buffer.permute(2, 4, 0, 1, 3)


def _places(at: int, count: int, block: int) -> tuple[torch.Tensor | int, torch.Tensor | int]:
    tokens = torch.arange(at, at + count)
    return tokens // block, tokens % block
