"""The block codec: flat numbers in 1, 2, 4 or 8 bits with a scale for every block, as one message of bytes.

Owns: `BlockCodec`. Gradients and weights that travel between machines, and activations that wait for the backward pass, are
stored this way: what is written is read back once and thrown away. A message has a length that a formula gives, holds no
header (both sides have the codec), and is laid out as all codes, then all side numbers. Rounding and packing are those of
`quantizers` and `packing`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import torch

from arrondi.arguments import Between, check_fields, said
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import Format, PerGroup, Scheme, get_format
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.quantizers import restore, round_on
from arrondi.tensor.ranges.grid import STORED, Grid

Bits = Literal[1, 2, 4, 8, 32]
Rounding = Literal["nearest", "stochastic"]
SideType = Literal["float32", "bfloat16", "float16"]

_CHUNK: Final = 1 << 18
"""Elements that get their noise at a time: the noise and the sum stay in the core's own cache."""
_NOISE_BITS: Final = 16
"""Random bits of an element: the rounding is unbiased to 2^-17 of a step, and costs a quarter of a float's randomness."""


@dataclass(frozen=True)
class BlockCodec:
    """How flat numbers become bytes.

    Every block of `block` consecutive numbers has its own scale, the last block may be shorter. Symmetric codes are
    -q … q with q = 2^(bits-1) - 1 and x ≈ code · scale, the scale being the largest magnitude over q; asymmetric ones are
    0 … 2^bits - 1 and x ≈ code · step + low. Scales are rounded up to their type and `low` down, so that no number is clipped:
    the error is at most half a scale with nearest rounding, and below a scale with stochastic rounding, whose mean is x.
    One bit keeps the sign, and its scale is the mean magnitude of the block, which is the least-squares one.

    Attributes:
        bits: 1, 2, 4 or 8; 32 passes float32 through, to the last bit.
        block: numbers under one scale.
        symmetric: a scale for each block, or (False) a step and the lowest number.
        rounding: "nearest" (ties to even) or "stochastic", which takes a generator.
        side: type of scales, steps and lowest numbers. float16 cannot hold scales above 65504, and its small ones are coarse.
        propagate: a block with NaN or infinity reads back as NaN, all of it; without, encoding such a block is an error.

    Sources: Wang et al. 2023, arXiv:2306.10209 (blocks); Chen et al. 2021, arXiv:2104.14129 (asymmetric, stochastic, bfloat16);
    Tang et al. 2021, arXiv:2102.02888 (one bit).

    >>> codec = BlockCodec(bits=4, block=256, side="float16")
    >>> codec.nbytes(1024), codec.bits_per_element
    (520, 4.0625)
    """

    bits: Bits = 8
    block: Annotated[int, Between(1, 1 << 24)] = 256
    symmetric: bool = True
    rounding: Rounding = "nearest"
    side: SideType = "float32"
    propagate: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits == 1 and (not self.symmetric or self.rounding != "nearest"):
            raise SchemeError(
                "One bit keeps signs: it is symmetric and rounds to nearest. Use 2 bits or more otherwise."
            )

    @property
    def bits_per_element(self) -> float:
        """Bits of a number, its share of the side numbers included, in whole blocks."""
        return 32.0 if self.bits == 32 else self.bits + 8 * self._side_bytes / self.block

    def nbytes(self, count: int) -> int:
        """Bytes of the message of `count` numbers."""
        return (
            4 * count
            if self.bits == 32
            else packed_width(count, self.bits) + -(-count // self.block) * self._side_bytes
        )

    def encode(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Numbers → messages, one for each row.

        Args:
            x: (..., n), any float type; computed in float32.
            generator: on the device of `x`; stochastic rounding only.

        Returns:
            (..., nbytes(n)) uint8.

        Raises:
            DataError: NaN or infinity without `propagate`, or a scale too large for its type; no floating-point tensor.
            SchemeError: stochastic rounding without a generator.
            ShapeError: a scalar.
        """
        self._check(x, generator)
        lead, n = x.shape[:-1], x.shape[-1]
        rows = x.detach().reshape(math.prod(lead), n)
        if self.bits == 32 or not x.numel():
            return rows.to(torch.float32, copy=True).contiguous().view(torch.uint8).reshape(*lead, self.nbytes(n))
        padded = self._pad(rows)
        grid = self._grid(padded, n)
        # Extremes of a block carry its NaN and its infinities, so the side numbers tell.
        lost = ~torch.isfinite(torch.stack([part for part in grid if part is not None])).all(dim=0)
        if bool(lost.any()):
            padded, grid = self._spare(padded, grid, lost)
        codes = self._codes(padded.reshape(len(lost), self.block), grid, generator)
        message = torch.empty((len(rows), self.nbytes(n)), dtype=torch.uint8, device=x.device)
        width = packed_width(n, self.bits)
        message[:, :width] = pack(codes.reshape(padded.shape)[:, :n], self.bits, lowest=self._format.qmin)
        stored = [grid.scale] if self.symmetric or grid.offset is None else [grid.scale, grid.offset]
        for part in stored:
            side = torch.where(lost, torch.nan, part).to(STORED[self.side]).reshape(len(rows), -1).view(torch.uint8)
            message[:, width : width + side.shape[1]] = side
            width += side.shape[1]
        return message.reshape(*lead, -1)

    def decode(self, message: torch.Tensor, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Messages → numbers.

        Args:
            message: (..., nbytes(count)) uint8.
            count: numbers of a message.
            dtype: of the result; the arithmetic is in float32.

        Returns:
            (..., count).

        Raises:
            ShapeError: not uint8, or of another length.
        """
        if not isinstance(message, torch.Tensor) or message.dtype != torch.uint8 or not message.ndim:
            raise ShapeError(f"A message is a tensor of bytes (uint8) with at least one axis, got {said(message)}.")
        if count < 0 or message.shape[-1] != self.nbytes(count):
            raise ShapeError(
                f"A message of {count} numbers has {self.nbytes(max(count, 0))} bytes, got {message.shape[-1]}. "
                "Do both sides use the same codec?"
            )
        lead = message.shape[:-1]
        rows = message.reshape(math.prod(lead), message.shape[-1])
        if not message.numel():
            return torch.empty((*lead, count), dtype=dtype, device=message.device)
        if self.bits == 32:
            return rows.clone(memory_format=torch.contiguous_format).view(torch.float32).to(dtype).reshape(*lead, count)
        width = packed_width(count, self.bits)
        codes = unpack(rows[:, :width], self.bits, count, lowest=self._format.qmin)
        sides = rows[:, width:].clone(memory_format=torch.contiguous_format).view(STORED[self.side]).float()
        values = self._restore(codes, sides, count, dtype)
        return values.reshape(*lead, count)

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def _side_bytes(self) -> int:
        return STORED[self.side].itemsize * (1 if self.symmetric else 2)

    @property
    def _format(self) -> Format:
        if self.bits == 1:
            return _SIGNS
        return _BALANCED[self.bits] if self.symmetric else get_format(f"uint{self.bits}")

    @property
    def _scheme(self) -> Scheme:
        return _scheme(self._format, self.block, self.bits == 1 or not self.symmetric)

    def _check(self, x: torch.Tensor, generator: torch.Generator | None) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise DataError(f"Messages are made of floating-point tensors, got {said(x)}.")
        if not x.ndim:
            raise ShapeError("Messages are made of the last axis, got a scalar. Reshape it to (1,).")
        if self.rounding == "stochastic" and generator is None and self.bits != 32:
            raise SchemeError("Stochastic rounding takes a torch.Generator. Pass one, seeded for this rank and step.")

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole blocks: the last number repeats, which moves no extreme; after signs there are zeros, which add nothing."""
        more = -rows.shape[1] % self.block
        if not more:
            return rows
        end = rows[:, -1:] if self.bits > 1 else rows.new_zeros(1, 1)
        return torch.cat((rows, end.expand(len(rows), more)), dim=1)

    def _grid(self, padded: torch.Tensor, n: int) -> Grid:
        """Scales and offsets of all blocks as they read back, not finite where they cannot be stored."""
        blocks = padded.reshape(-1, self.block)
        side = STORED[self.side]
        if self.bits == 1:
            counts = torch.full((len(blocks),), float(self.block), device=blocks.device)
            of_a_row = padded.shape[1] // self.block
            counts[of_a_row - 1 :: of_a_row] = n - (of_a_row - 1) * self.block
            size = (blocks.abs().sum(dim=1, dtype=torch.float32) / counts).to(side).float()
            return Grid(2 * size, None, -size)
        low, high = blocks.amin(dim=1).float(), blocks.amax(dim=1).float()
        if self.symmetric:
            return Grid(_above(torch.maximum(-low, high) / self._format.qmax, side))
        low = -_above(-low, side)
        return Grid(_above((high - low).clamp_min(0) / self._format.qmax, side), None, low)

    def _spare(self, padded: torch.Tensor, grid: Grid, lost: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Zeros for the blocks that cannot be coded."""
        if not self.propagate:
            if bool(torch.isfinite(padded).all()):
                raise DataError(f"Scales do not fit {self.side}. Use bfloat16 or float32 for them.")
            raise DataError("The values hold NaN or infinity. Repair them, or let the codec propagate them.")
        blocks = torch.where(lost[:, None], 0.0, padded.reshape(len(lost), -1))
        return blocks.reshape(padded.shape), grid.map(lambda part: torch.where(lost, 0.0, part))

    def _codes(self, blocks: torch.Tensor, grid: Grid, generator: torch.Generator | None) -> torch.Tensor:
        """(blocks, block) codes. Only a block of zeros, or of one number, has no scale; any divisor does then."""
        grid = grid._replace(scale=torch.where(grid.scale == 0, 1.0, grid.scale))
        if self.bits == 1:
            return (blocks >= 0).view(torch.uint8)
        if self.rounding == "nearest":
            return self._round(blocks, grid)
        codes = torch.empty(blocks.shape, dtype=torch.int8 if self.symmetric else torch.uint8, device=blocks.device)
        step = max(_CHUNK // self.block, 1)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            low = None if grid.offset is None else grid.offset[start : start + step]
            some = Grid(grid.scale[start : start + step], None, low)
            noisy = torch.addcmul(part.float(), _noise(part, generator), some.scale[:, None])
            codes[start : start + step] = self._round(noisy, some)
        return codes

    def _round(self, blocks: torch.Tensor, grid: Grid) -> torch.Tensor:
        codes = round_on(blocks, self._scheme, grid)
        if codes is not None:
            return codes
        values = blocks.float() if grid.offset is None else blocks.float() - grid.offset[:, None]
        format = self._format
        return (
            (values / grid.scale[:, None])
            .round_()
            .clamp_(format.qmin, format.qmax)
            .to(torch.int8 if self.symmetric else torch.uint8)
        )

    def _restore(self, codes: torch.Tensor, sides: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
        blocks = -(-count // self.block)
        scale = sides[:, :blocks].contiguous()
        grid = Grid(scale)
        if self.bits == 1:
            grid = Grid(scale, None, scale / -2)
        elif not self.symmetric:
            grid = Grid(scale, None, sides[:, blocks:].contiguous())
        values = restore(codes, self._scheme, grid, dtype)
        if values is not None:
            return values
        wide = [p.repeat_interleave(self.block, dim=1)[:, :count] for p in grid if p is not None]
        values = codes.float() * wide[0]
        return (values if len(wide) == 1 else values + wide[1]).to(dtype)


_BALANCED: Final = {
    bits: Format(f"int{bits}_balanced", "integer", bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) for bits in (2, 4, 8)
}
"""Without the most negative code, so that the negative of every message is a message."""
_SIGNS: Final = Format("sign", "integer", 1, 0, 1)


@functools.lru_cache(maxsize=64)
def _scheme(format: Format, block: int, offset: bool) -> Scheme:
    return Scheme(format, PerGroup(block), zero_point="float" if offset else "none")


def _above(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number of a type that is not below `x`, as float32."""
    if dtype == torch.float32:
        return x
    near = x.to(dtype)
    bits = near.view(torch.int16)
    # The next number towards +inf has the next bit pattern, or the one before if it is negative; -0 steps to the least.
    next_up = torch.where(near > 0, bits + 1, torch.where(near < 0, bits - 1, torch.ones_like(bits))).view(dtype)
    return torch.where(near.float() < x, next_up, near).float()


def _noise(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform on (-½, ½), symmetric, of the shape of a matrix."""
    count = like.numel()
    lanes = torch.empty(-(-count * _NOISE_BITS // 64), dtype=torch.int64, device=like.device)
    whole = lanes.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    return whole.float().add_(0.5).mul_(2.0**-_NOISE_BITS).reshape(like.shape)
