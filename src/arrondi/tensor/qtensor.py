"""The quantized tensor: the one value that crosses every wall.

Owns: `QTensor`, `Parts` (its grid as it is kept) and `dequantize`. `nearest` makes them from numbers.

The rule is `x ≈ scale · (value(code) - zero_point)`, or `scale · value(code) + offset` with a float zero point; each scale
covers one tile of codes. Values of look-up formats are in the tensor's own tables, those of a trellis come of the codes along a ring; a
turned tensor is all that in another basis. What is kept apart takes the place of what the codes mean there. Products and sums are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch

from arrondi.arguments import said
from arrondi.errors import ShapeError
from arrondi.formats import Scheme, scale_shape, tile_shape
from arrondi.tensor.apart import Kept, complaint_of
from arrondi.tensor.encoding import code_dtype, decode
from arrondi.tensor.quantizers import restore
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.storage import code_bits
from arrondi.tensor.tables import looked_up, table_bits
from arrondi.tensor.tiling import from_tiles, to_tiles
from arrondi.tensor.trellis import check_shape, ring_values
from arrondi.tensor.turned import Sides, sides_of, unturn

_CHUNK: Final = 1 << 18
"""Numbers decoded at a time: with their temporaries they stay in the core's own cache."""


@dataclass(frozen=True, slots=True)
class QTensor:
    """A tensor in few bits: codes, the scale of each tile, and the scheme that gives them meaning.

    Invariant, checked: `scale` (and `zero_point` or `offset`, whichever the scheme asks for) has the shape that the
    scheme's granularity gives for `codes.shape`.

    Attributes:
        codes: int8 (signed formats) or uint8, unpacked, shaped like the tensor; the bit pattern for float formats.
        scale: float32 values, exactly as stored (bfloat16 scales are rounded to bfloat16), or a QTensor.
        zero_point: int32 codes, or None.
        offset: float32, exactly as stored, or a QTensor, or None.
        scheme: format, granularity, zero point and scale storage.
        group_index: int32 (K,), the group of every column where groups are not contiguous (GPTQ's dynamic act-order);
            None everywhere else.
        table: of a look-up format, the values of every code: (tables, levels) float32, exactly as stored, ascending; else None.
        apart: numbers that the codes do not hold, where the scheme keeps some apart; else None.
        sides: of a turned tensor whose signs are not those of a seed, what rows and columns are multiplied by; else None.
    """

    codes: torch.Tensor
    scale: torch.Tensor | QTensor
    zero_point: torch.Tensor | None
    offset: torch.Tensor | QTensor | None
    scheme: Scheme
    group_index: torch.Tensor | None = None
    table: torch.Tensor | None = None
    apart: Kept | None = None
    sides: Sides | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.codes, torch.Tensor) or not isinstance(self.scheme, Scheme):
            raise ShapeError(
                f"Codes are a tensor and go with a Scheme, got {said(self.codes)} and {said(self.scheme)}."
            )
        wanted = scale_shape(self.scheme.granularity, tuple(self.codes.shape))
        parts = {"scale": self.scale, "zero_point": self.zero_point, "offset": self.offset}
        for name, part in parts.items():
            if not isinstance(part, torch.Tensor | QTensor | None):
                raise ShapeError(f"{name} of {self.scheme} is a tensor or a QTensor, got {said(part)}.")
            if part is not None and tuple(part.shape) != wanted:
                raise ShapeError(
                    f"{name} of {self.scheme} must have shape {wanted} for codes {self.shape}, got {tuple(part.shape)}."
                )
        present = (self.zero_point is not None, self.offset is not None)
        if present != (self.scheme.zero_point == "integer", self.scheme.zero_point == "float"):
            raise ShapeError(
                f"{self.scheme} asks for zero_point={self.scheme.zero_point!r}; zero_point and offset given: {present}."
            )
        if self.codes.dtype != code_dtype(self.scheme.format):
            raise ShapeError(
                f"Codes of {self.scheme.format} are {code_dtype(self.scheme.format)}, got {self.codes.dtype}."
            )
        self._check_table()
        self._check_turned()
        if (reason := complaint_of(self.apart, self.scheme.apart, self.shape)) is not None:
            raise ShapeError(f"{self.scheme}: {reason}.")

    def _check_table(self) -> None:
        own, values = self.scheme.table, self.table
        if (own is None) is not (values is None):
            raise ShapeError(
                f"A tensor has tables if and only if its format is a look-up one, got {said(values)} for {self.scheme}."
            )
        if own is None or values is None:
            return
        wanted = (own.count(self.shape[0]), self.scheme.format.levels) if len(self.shape) == 2 else ()
        if tuple(values.shape) != wanted or values.dtype != torch.float32:
            raise ShapeError(
                f"Tables of {self.scheme} for a matrix {self.shape} are float32 {wanted}, got {values.dtype} {tuple(values.shape)}."
            )

    def _check_turned(self) -> None:
        if self.scheme.format.trellis is not None:
            check_shape(self.shape, self.scheme.format.trellis)
        stored = self.scheme.turned is not None and self.scheme.turned.seed is None
        if not isinstance(self.sides, Sides | None):
            raise ShapeError(f"sides of {self.scheme} are Sides or None, got {said(self.sides)}.")
        found = None if self.sides is None else tuple(tuple(side.shape) for side in self.sides)
        if found != (tuple((n,) for n in self.shape) if stored else None):
            raise ShapeError(f"{self.scheme} of shape {self.shape} has numbers for its sides of shapes {found}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.codes.shape)

    @property
    def real_scale(self) -> torch.Tensor:
        """The scales as float32, quantized scales decoded."""
        return self.scale.dequantize() if isinstance(self.scale, QTensor) else self.scale

    @property
    def real_offset(self) -> torch.Tensor | None:
        """The offsets as float32, quantized offsets decoded."""
        return self.offset.dequantize() if isinstance(self.offset, QTensor) else self.offset

    @property
    def grid(self) -> Grid:
        """Scales, zero points and offsets as numbers."""
        return Grid(self.real_scale, self.zero_point, self.real_offset)

    @property
    def stored_bits(self) -> int:
        """All bits that a file needs: packed codes, scales, zero points, offsets, tables, what is kept apart."""
        bits = code_bits(self.shape, self.scheme.format)
        bits += _part_bits(self.scale, self.scheme.scale)
        if self.zero_point is not None:
            bits += self.zero_point.numel() * self.scheme.format.bits
        if self.offset is not None:
            bits += _part_bits(self.offset, self.scheme.offset)
        if self.group_index is not None:
            bits += self.group_index.numel() * 32
        if self.scheme.table is not None:
            bits += table_bits(self.scheme.table, self.shape[0], self.scheme.format.levels)
        if self.apart is not None and self.scheme.apart is not None:
            bits += self.apart.bits(self.scheme.apart)
        if self.sides is not None:
            bits += 16 * sum(side.numel() for side in self.sides)
        return bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, over the number of elements."""
        return self.stored_bits / max(self.codes.numel(), 1)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on a device; itself where it is there."""
        if self.codes.device == torch.device(device):
            return self
        whole = {name: getattr(self, name) for name in ("scale", "zero_point", "offset", "group_index", "table")}
        moved: dict[str, Any] = {name: None if part is None else part.to(device) for name, part in whole.items()}
        apart = None if self.apart is None else Kept(self.apart.index.to(device), self.apart.values.to(device))
        sides = None if self.sides is None else self.sides.to(device)
        return replace(self, codes=self.codes.to(device), apart=apart, sides=sides, **moved)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Back to real numbers, computed in float32 and rounded once to `dtype`."""
        values = self._coded(dtype)
        return values if self.apart is None else self.apart.put(values)

    def _coded(self, dtype: torch.dtype) -> torch.Tensor:
        """What the codes mean, nothing kept apart."""
        if self.codes.numel() == 0:
            return self.codes.to(dtype)
        if self.group_index is not None:
            return self._gathered(dtype)
        if self.scheme.format.trellis is not None:
            return self.unturned(self.units().mul_(self.real_scale)).to(dtype)
        fast = restore(self.codes, self.scheme, self.grid, dtype)
        if fast is not None:
            return fast
        tile = tile_shape(self.scheme.granularity, self.shape)
        units = to_tiles(self.codes if self.table is None else self.units(), tile)
        grid = self.grid.reshape(-1, 1)
        values = units.new_empty(units.shape, dtype=dtype)
        step = max(_CHUNK // units.shape[1], 1)
        for start in range(0, len(units), step):
            some = slice(start, start + step)
            part = units[some] if self.table is not None else decode(units[some], self.scheme.format)
            zero, offset = grid.zero_point, grid.offset
            if zero is not None:
                part = part - zero[some]
            part = part * grid.scale[some]
            values[some] = part if offset is None else part.add_(offset[some])
        return from_tiles(values, tile, self.shape)

    def units(self) -> torch.Tensor:
        """The value of every code, float32 in the shape of the codes, before zero point, scale and offset."""
        if self.scheme.format.trellis is not None:
            return ring_values(self.codes, self.scheme.format.trellis)
        if self.table is None or self.scheme.table is None:
            return decode(self.codes, self.scheme.format)
        return looked_up(self.codes, self.table, self.scheme.table)

    def unturned(self, values: torch.Tensor) -> torch.Tensor:
        """Values (m, n) that are in the basis of the codes, in the tensor's own."""
        if self.scheme.turned is None:
            return values
        return unturn(values, self.sides or sides_of(self.shape, self.scheme.turned, values.device), self.scheme.turned)

    def _gathered(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize with groups that are not contiguous: every column looks its scale up."""
        assert self.group_index is not None
        values = self.units()
        if self.zero_point is not None:
            values -= self.zero_point[..., self.group_index]
        values *= self.real_scale[..., self.group_index]
        if (offset := self.real_offset) is not None:
            values += offset[..., self.group_index]
        return values.to(dtype)


def _part_bits(part: torch.Tensor | QTensor, storage: str | Scheme) -> int:
    """Bits of scales or offsets."""
    if isinstance(part, QTensor):
        return part.stored_bits
    assert isinstance(storage, str)
    return part.numel() * {"float32": 32, "bfloat16": 16, "float16": 16, "e8m0": 8}[storage]


class Parts(NamedTuple):
    """A grid as a QTensor keeps it: in the scale's shape, scales and offsets quantized where the scheme says so."""

    scale: torch.Tensor | QTensor
    zero_point: torch.Tensor | None = None
    offset: torch.Tensor | QTensor | None = None

    @property
    def grid(self) -> Grid:
        """The same as numbers."""
        scale, offset = (p.dequantize() if isinstance(p, QTensor) else p for p in (self.scale, self.offset))
        assert scale is not None
        return Grid(scale, self.zero_point, offset)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The function form of `QTensor.dequantize`."""
    return q.dequantize(dtype)
