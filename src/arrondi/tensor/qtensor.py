"""The quantized tensor: the one value that crosses every wall.

Owns: `QTensor`, `quantize_tensor`, `quantize_with` (codes for a given grid), `store_grid` (scales and offsets that are quantized in
turn), `dequantize`, `fake_quantize`. Uses `ranges` for the grid, `encoding` for the codes and `tiling` for the granularity.

The rule is `x ≈ scale · (value(code) - zero_point)`, or `scale · value(code) + offset` with a float zero point; each scale
covers one tile of codes. Values of look-up formats are in the tensor's own tables, and what is kept apart takes the place of what the
codes mean there. Products and sums are computed in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from arrondi.arguments import said
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import Scheme, scale_shape, tile_shape
from arrondi.tensor.apart import Kept, complaint_of
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.encoding import code_dtype, decode, encode
from arrondi.tensor.packing import packed_width
from arrondi.tensor.quantizers import restore, round_groups, round_on
from arrondi.tensor.ranges.fits import check_rule, fit
from arrondi.tensor.ranges.grid import Grid, cat_grids
from arrondi.tensor.tables import looked_up, table_bits
from arrondi.tensor.tiling import from_tiles, to_tiles

_CHUNK = 1 << 18
"""Elements handled at a time: a float32 chunk of this size and its temporaries stay in the core's own cache."""


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
    """

    codes: torch.Tensor
    scale: torch.Tensor | QTensor
    zero_point: torch.Tensor | None
    offset: torch.Tensor | QTensor | None
    scheme: Scheme
    group_index: torch.Tensor | None = None
    table: torch.Tensor | None = None
    apart: Kept | None = None

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
        *rows, columns = self.shape or (1,)
        count = 1
        for n in rows:
            count *= n
        bits = count * packed_width(columns, self.scheme.format.bits) * 8
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
        return replace(self, codes=self.codes.to(device), apart=apart, **moved)

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
        fast = restore(self.codes, self.scheme, self.grid, dtype)
        if fast is not None:
            return fast
        tile = tile_shape(self.scheme.granularity, self.shape)
        values = (
            to_tiles(self.units(), tile)
            if self.table is not None
            else decode(to_tiles(self.codes, tile), self.scheme.format)
        )
        if self.zero_point is not None:
            values -= self.zero_point.reshape(-1, 1)
        values *= self.real_scale.reshape(-1, 1)
        if (offset := self.real_offset) is not None:
            values += offset.reshape(-1, 1)
        return from_tiles(values.to(dtype), tile, self.shape)

    def units(self) -> torch.Tensor:
        """The value of every code, float32 in the shape of the codes, before zero point, scale and offset."""
        if self.table is None or self.scheme.table is None:
            return decode(self.codes, self.scheme.format)
        return looked_up(self.codes, self.table, self.scheme.table)

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


def quantize_tensor(
    x: torch.Tensor, scheme: SchemeLike, *, rule: str = "auto", name: str = "tensor", shrink: torch.Tensor | float = 1.0
) -> QTensor:
    """Round to nearest on the grid that the data's own range gives.

    Args:
        x: any shape, any float dtype, finite; computed in float32.
        scheme: what the tensor becomes: a Scheme, a LayerScheme (its weights are used) or a word ("W4A16", the grammar).
        rule: how the scales are fitted, a name of `arrondi.tensor.ranges.fits.FITS`.
        name: the tensor's name, for messages.
        shrink: factor on the range of each tile: a number, or a tensor of the scale's shape.

    Raises:
        DataError: `x` is no floating-point tensor, or holds NaN or infinity; the message has `name`.
        SchemeError: `scheme` is none.
        ShapeError: the granularity does not fit the shape.

    Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2; after the scale is rounded to its storage type, codes are
    chosen with the stored value.
    """
    with named(name):
        scheme = scheme_of(scheme)
        x = check_tensor(x, name).detach()
        check_rule(rule)
        if scheme.format.learned or scheme.apart is not None:
            raise SchemeError(own_numbers(scheme))
        shape = tuple(x.shape)
        tile = tile_shape(scheme.granularity, shape)
        if x.numel() == 0:
            return _empty(x, scheme)
        factor = _factor(shrink, scale_shape(scheme.granularity, shape))
        if isinstance(scheme.scale, Scheme) or isinstance(scheme.offset, Scheme):
            grid = fit(to_tiles(x, tile).float(), scheme, rule, factor)
            return quantize_with(x, scheme, store_grid(grid, scheme, shape, name=name), name=name)
        if isinstance(shrink, float) and shrink == 1.0 and (done := round_groups(x, scheme, rule)) is not None:
            return _assemble(done[0], done[1], scheme)
        tiles = to_tiles(x, tile)
        codes = torch.empty(tiles.shape, dtype=code_dtype(scheme.format), device=x.device)
        grids = []
        step = max(_CHUNK // tiles.shape[1], 1)
        for start in range(0, tiles.shape[0], step):
            part = tiles[start : start + step].float()
            grid = fit(part, scheme, rule, factor[start : start + step] if isinstance(factor, torch.Tensor) else factor)
            codes[start : start + step] = _encode_tiles(part, scheme, grid)
            grids.append(grid)
        return _assemble(from_tiles(codes, tile, shape), cat_grids(grids), scheme)


def own_numbers(scheme: Scheme) -> str:
    """Why rounding to nearest alone cannot make a scheme that has tables or keeps numbers apart."""
    what = (
        f"the values of {scheme.format} are learned from a tensor"
        if scheme.format.learned
        else f"{scheme.apart} is kept apart"
    )
    return f"Rounding to nearest does not make {scheme}: {what}. Use a method that does (kmeans, any4, gobo, llm-int8)."


def _factor(shrink: torch.Tensor | float, wanted: tuple[int, ...]) -> torch.Tensor | float:
    """A factor on every range, or one for each tile."""
    if isinstance(shrink, float | int) and math.isfinite(shrink) and shrink > 0:
        return float(shrink)
    if not isinstance(shrink, torch.Tensor) or tuple(shrink.shape) != wanted or not shrink.is_floating_point():
        raise ShapeError(f"shrink is a positive number or a tensor of shape {wanted}, got {said(shrink)}.")
    return shrink.reshape(-1, 1)


def quantize_with(x: torch.Tensor, scheme: Scheme, grid: Grid | Parts, *, name: str = "tensor") -> QTensor:
    """Round to nearest on a given grid; scales and offsets must already have been rounded to storage.

    Args:
        x: any shape, any float dtype, finite.
        grid: one entry for every tile, in the scale's shape or another one.

    Raises:
        DataError: NaN or infinity in `x`.
        ShapeError: the grid has another number of tiles.
    """
    x = x.detach()
    shape = tuple(x.shape)
    if scheme.format.learned or scheme.apart is not None:
        raise SchemeError(f"{name}: {own_numbers(scheme)}")
    with named(name):
        wanted = scale_shape(scheme.granularity, shape)
        tile = tile_shape(scheme.granularity, shape)
    real = grid.grid if isinstance(grid, Parts) else grid
    if any(part is not None and part.numel() != torch.Size(wanted).numel() for part in real):
        raise ShapeError(
            f"{name}: {scheme} needs a grid of shape {wanted} for values {shape}, got {tuple(real.scale.shape)}."
        )
    codes = round_on(x, scheme, real)
    if codes is None:
        tiles = to_tiles(x, tile).float()
        if not bool(torch.isfinite(tiles).all()):
            raise DataError(f"{name}: the values hold NaN or infinity. Repair or exclude the tensor.")
        codes = from_tiles(_encode_tiles(tiles, scheme, real.reshape(-1, 1)), tile, shape)
    return _assemble(codes, grid, scheme)


def fake_quantize(
    x: torch.Tensor, scheme: SchemeLike, grid: Grid | None = None, *, rule: str = "auto", name: str = "tensor"
) -> torch.Tensor:
    """`x` as it reads back after quantization, in its own dtype; no codes are kept.

    Args:
        grid: stored (static) scales; None: the data's own range gives them. Where the scheme's scales are quantized in
            turn (NVFP4), this is the grid of the scales: it holds the outer scale, and the inner ones follow `x`.
    """
    scheme = scheme_of(scheme)
    if grid is not None and not isinstance(grid, Grid):
        raise DataError(f"{name}: the stored scales are a Grid, got {said(grid)}.")
    if grid is None or x.numel() == 0:
        return quantize_tensor(x, scheme, rule=rule, name=name).dequantize(x.dtype)
    check_tensor(x, name)
    if not isinstance(scheme.scale, Scheme):
        return quantize_with(x, scheme, grid, name=name).dequantize(x.dtype)
    with named(name):
        inner = fit(to_tiles(x.detach(), tile_shape(scheme.granularity, tuple(x.shape))).float(), scheme, rule)
        parts = store_grid(inner, scheme, tuple(x.shape), outer=grid, name=name)
    return quantize_with(x, scheme, parts, name=name).dequantize(x.dtype)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The function form of `QTensor.dequantize`."""
    return q.dequantize(dtype)


def store_grid(
    grid: Grid, scheme: Scheme, shape: tuple[int, ...], *, outer: Grid | None = None, name: str = "tensor"
) -> Parts:
    """A fitted grid as it is kept: in the scale's shape, scales and offsets quantized where the scheme says so.

    Args:
        grid: one entry for every tile; float32 where the scheme quantizes them in turn.
        shape: of the tensor that the grid is for.
        outer: the grid of the scales, where it is given; None: their own range gives it.
    """
    grid = grid.reshape(*scale_shape(scheme.granularity, shape))
    scale: torch.Tensor | QTensor = grid.scale
    offset: torch.Tensor | QTensor | None = grid.offset
    if isinstance(scheme.scale, Scheme):
        scale = quantize_scales(grid.scale, scheme.scale, signed=scheme.signed_scales, outer=outer, name=name)
    if isinstance(scheme.offset, Scheme) and grid.offset is not None:
        one_sign = scheme.offset.symmetric and scheme.offset.format.qmin == 0 and scheme.offset.signed_scales
        rule = "extreme" if one_sign and scheme.offset.format.kind == "integer" else "auto"
        offset = quantize_tensor(grid.offset, scheme.offset, rule=rule, name=f"{name}: offset")
    return Parts(scale, grid.zero_point, offset)


def quantize_scales(
    scale: torch.Tensor, scheme: Scheme, *, signed: bool = False, outer: Grid | None = None, name: str = "scale"
) -> QTensor:
    """Scales as a QTensor that has no zeros and, unless `signed`, nothing negative: a code that would mean zero becomes the
    one next to it with the sign of its scale."""
    with named(f"{name}: scale"):
        if scale.numel() == 0:
            return quantize_tensor(scale, scheme)
        parts: Grid | Parts
        if outer is not None:
            parts = outer
        else:
            found = fit(to_tiles(scale, tile_shape(scheme.granularity, tuple(scale.shape))), scheme)
            if scheme.symmetric and scheme.scale == "float32":
                # Some layouts store the reciprocal: make the outer scale a number that survives 1/(1/s).
                found = Grid(1 / (1 / found.scale.clamp(min=torch.finfo(torch.float32).tiny)))
            parts = store_grid(found, scheme, tuple(scale.shape), name=f"{name}: scale")
        q = quantize_with(scale, scheme, parts)
    if signed:
        zero = q.dequantize() == 0
        q.codes[zero] += 1
        if scheme.format.kind == "integer":  # the code of a float has its sign already
            q.codes[zero & (q.dequantize() * scale < 0)] -= 2
        return q
    while bool((low := q.dequantize() <= 0).any()):
        q.codes[low] += 1  # codes of numbers that are not negative ascend with what they mean, in every format
    return q


def _empty(x: torch.Tensor, scheme: Scheme) -> QTensor:
    shape = tuple(x.shape)
    ones = torch.ones(scale_shape(scheme.granularity, shape), dtype=torch.float32, device=x.device)
    zero = ones.int() if scheme.zero_point == "integer" else None
    grid = Grid(ones, zero, ones if scheme.zero_point == "float" else None)
    return _assemble(x.to(code_dtype(scheme.format)), store_grid(grid, scheme, shape), scheme)


def _encode_tiles(tiles: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor:
    if grid.offset is not None:
        return encode((tiles - grid.offset) / grid.scale, scheme.format)
    return encode(tiles / grid.scale, scheme.format, grid.zero_point)


def _assemble(codes: torch.Tensor, grid: Grid | Parts, scheme: Scheme) -> QTensor:
    """Codes and their grid → a QTensor of the tensor's own shape."""
    if isinstance(grid, Grid):
        grid = Parts(*grid.reshape(*scale_shape(scheme.granularity, tuple(codes.shape))))
    return QTensor(codes, grid.scale, grid.zero_point, grid.offset, scheme)
