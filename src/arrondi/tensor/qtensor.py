"""The quantized tensor: the one value that crosses every wall.

Owns: `QTensor`, `quantize_tensor`, `quantize_with` (codes for a given grid), `dequantize`, `fake_quantize`. Uses `fitting` for the
scales, `encoding` for the codes and `tiling` for the granularity.

The rule is `x ≈ scale · (value(code) - zero_point)`, or `scale · code + offset` with a float zero point; each scale covers
one tile of codes. Products and sums are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from arrondi.errors import ArrondiError, DataError, SchemeError, ShapeError
from arrondi.formats import LayerScheme, Scheme, parse_scheme, scale_shape, tile_shape
from arrondi.tensor.encoding import code_dtype, decode, encode
from arrondi.tensor.fitting import Grid, fit, round_scale
from arrondi.tensor.packing import packed_width
from arrondi.tensor.quantizers import restore, round_groups, round_on
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
        offset: float32, or None.
        scheme: format, granularity, zero point and scale storage.
        group_index: int32 (K,), the group of every column where groups are not contiguous (GPTQ's dynamic act-order);
            None everywhere else.
    """

    codes: torch.Tensor
    scale: torch.Tensor | QTensor
    zero_point: torch.Tensor | None
    offset: torch.Tensor | None
    scheme: Scheme
    group_index: torch.Tensor | None = None

    def __post_init__(self) -> None:
        wanted = scale_shape(self.scheme.granularity, tuple(self.codes.shape))
        parts = {"scale": self.scale, "zero_point": self.zero_point, "offset": self.offset}
        for name, part in parts.items():
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.codes.shape)

    @property
    def real_scale(self) -> torch.Tensor:
        """The scales as float32, quantized scales decoded."""
        return self.scale.dequantize() if isinstance(self.scale, QTensor) else self.scale

    @property
    def stored_bits(self) -> int:
        """All bits that a file needs: packed codes, scales, zero points, offsets."""
        *rows, columns = self.shape or (1,)
        count = 1
        for n in rows:
            count *= n
        bits = count * packed_width(columns, self.scheme.format.bits) * 8
        if isinstance(self.scale, QTensor):
            bits += self.scale.stored_bits
        else:
            assert isinstance(self.scheme.scale, str)
            bits += self.scale.numel() * {"float32": 32, "bfloat16": 16, "float16": 16, "e8m0": 8}[self.scheme.scale]
        if self.zero_point is not None:
            bits += self.zero_point.numel() * self.scheme.format.bits
        if self.offset is not None:
            bits += self.offset.numel() * 32
        if self.group_index is not None:
            bits += self.group_index.numel() * 32
        return bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included, over the number of elements."""
        return self.stored_bits / max(self.codes.numel(), 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Back to real numbers, computed in float32 and rounded once to `dtype`."""
        if self.codes.numel() == 0:
            return self.codes.to(dtype)
        if self.group_index is not None:
            return self._gathered(dtype)
        fast = restore(self.codes, self.scheme, Grid(self.real_scale, self.zero_point, self.offset), dtype)
        if fast is not None:
            return fast
        tile = tile_shape(self.scheme.granularity, self.shape)
        values = decode(to_tiles(self.codes, tile), self.scheme.format)
        if self.zero_point is not None:
            values -= self.zero_point.reshape(-1, 1)
        values *= self.real_scale.reshape(-1, 1)
        if self.offset is not None:
            values += self.offset.reshape(-1, 1)
        return from_tiles(values.to(dtype), tile, self.shape)

    def _gathered(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantize with groups that are not contiguous: every column looks its scale up."""
        assert self.group_index is not None
        values = decode(self.codes, self.scheme.format)
        if self.zero_point is not None:
            values -= self.zero_point[..., self.group_index]
        values *= self.real_scale[..., self.group_index]
        if self.offset is not None:
            values += self.offset[..., self.group_index]
        return values.to(dtype)


def weight_scheme(scheme: Scheme | LayerScheme | str) -> Scheme:
    """What a weight becomes by this scheme, layer's scheme (its weights) or word ("W4A16", the grammar).

    Raises:
        SchemeError: something else, or a word that is no scheme.
    """
    if isinstance(scheme, str):
        scheme = parse_scheme(scheme)
    if isinstance(scheme, LayerScheme):
        return scheme.weights
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"A scheme is a word such as 'W4A16', a Scheme or a LayerScheme, got {type(scheme).__name__} {scheme!r}."
        )
    return scheme


def _check_tensor(x: object, name: str) -> None:
    if not isinstance(x, torch.Tensor):
        kind = type(x)
        hint = {
            "ndarray": "Use torch.from_numpy(…) first",
            "QTensor": "It is quantized already; use .dequantize() first",
        }.get(
            kind.__name__,
            "Quantize a model with arrondi.quantize, or pass the weight of one layer"
            if isinstance(x, torch.nn.Module)
            else "Use torch.tensor(…) first",
        )
        raise DataError(f"{name}: quantize_tensor takes a torch.Tensor, got {kind.__module__}.{kind.__name__}. {hint}.")
    if not x.dtype.is_floating_point:
        raise DataError(f"{name}: quantize_tensor takes floating-point numbers, got {x.dtype}. Use .float() first.")


def quantize_tensor(
    x: torch.Tensor,
    scheme: Scheme | LayerScheme | str,
    *,
    rule: str = "auto",
    name: str = "tensor",
    shrink: torch.Tensor | float = 1.0,
) -> QTensor:
    """Round to nearest on the grid that the data's own range gives.

    Args:
        x: any shape, any float dtype, finite; computed in float32.
        scheme: what the tensor becomes: a Scheme, a LayerScheme (its weights are used) or a word ("W4A16", the grammar).
        rule: how the scales are fitted, a name of `arrondi.tensor.fitting.FITS`.
        name: the tensor's name, for messages.
        shrink: factor on the range of each tile: a number, or a tensor of the scale's shape.

    Raises:
        DataError: `x` is no floating-point tensor, or holds NaN or infinity; the message has `name`.
        SchemeError: `scheme` is none.
        ShapeError: the granularity does not fit the shape.

    Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2; after the scale is rounded to its storage type, codes are
    chosen with the stored value.
    """
    scheme = weight_scheme(scheme)
    _check_tensor(x, name)
    x = x.detach()
    shape = tuple(x.shape)
    with named(name):
        tile = tile_shape(scheme.granularity, shape)
    if x.numel() == 0:
        return _empty(x, scheme)
    if isinstance(scheme.scale, Scheme):
        grid = _nested_grid(x, scheme, rule, name, shrink)
        return quantize_with(x, scheme, grid, name=name)
    if isinstance(shrink, float) and shrink == 1.0:
        done = round_groups(x, scheme, rule)
        if done is not None:
            return _assemble(*done, scheme, shape)
    tiles = to_tiles(x, tile)
    factor = shrink.reshape(-1, 1) if isinstance(shrink, torch.Tensor) else shrink
    codes = torch.empty(tiles.shape, dtype=code_dtype(scheme.format), device=x.device)
    grids = []
    step = max(_CHUNK // tiles.shape[1], 1)
    with named(name):
        for start in range(0, tiles.shape[0], step):
            part = tiles[start : start + step].float()
            some = factor[start : start + step] if isinstance(factor, torch.Tensor) else factor
            grid = fit(part, scheme, rule, some)
            codes[start : start + step] = _encode_tiles(part, scheme, grid)
            grids.append(grid)
    whole = from_tiles(codes, tile, shape)
    return _assemble(whole, _concatenate(grids), scheme, shape)


def quantize_with(x: torch.Tensor, scheme: Scheme, grid: Grid, *, name: str = "tensor") -> QTensor:
    """Round to nearest on a given grid; scales must already have been rounded to storage.

    Args:
        x: any shape, any float dtype, finite.
        grid: parts in the scale's shape or as (tiles, 1); a quantized scale is passed as `QTensor`.
    """
    shape = tuple(x.shape)
    if not isinstance(grid.scale, QTensor):
        found = round_on(x.detach(), scheme, grid)
        if found is not None:
            return _assemble(found, grid, scheme, shape)
    tile = tile_shape(scheme.granularity, shape)
    tiles = to_tiles(x.detach(), tile).float()
    if not bool(torch.isfinite(tiles).all()):
        raise DataError(f"{name}: the values hold NaN or infinity. Repair or exclude the tensor.")
    nested = grid.scale if isinstance(grid.scale, QTensor) else None
    real = nested.dequantize() if nested is not None else grid.scale
    flat = Grid(*(None if p is None else p.reshape(-1, 1) for p in (real, grid.zero_point, grid.offset)))  # type: ignore
    codes = from_tiles(_encode_tiles(tiles, scheme, flat), tile, shape)
    return _assemble(codes, flat, scheme, shape, nested)


def fake_quantize(
    x: torch.Tensor,
    scheme: Scheme | LayerScheme | str,
    grid: Grid | None = None,
    *,
    rule: str = "auto",
    name: str = "tensor",
) -> torch.Tensor:
    """`x` as it reads back after quantization, in its own dtype; no codes are kept.

    With a `grid` (static scales) that grid is used, else the one that the data's own range gives.
    """
    scheme = weight_scheme(scheme)
    if grid is None:
        return quantize_tensor(x, scheme, rule=rule, name=name).dequantize(x.dtype)
    _check_tensor(x, name)
    return quantize_with(x, scheme, grid, name=name).dequantize(x.dtype)


def _empty(x: torch.Tensor, scheme: Scheme) -> QTensor:
    ones = torch.ones(scale_shape(scheme.granularity, tuple(x.shape)), dtype=torch.float32, device=x.device)
    scale = quantize_tensor(ones, scheme.scale) if isinstance(scheme.scale, Scheme) else ones
    zero = ones.int() if scheme.zero_point == "integer" else None
    return QTensor(x.to(code_dtype(scheme.format)), scale, zero, ones if scheme.zero_point == "float" else None, scheme)


def _nested_grid(x: torch.Tensor, scheme: Scheme, rule: str, name: str, shrink: torch.Tensor | float) -> Grid:
    """Fit float32 scales first, then quantize all of them together by their own scheme."""
    assert isinstance(scheme.scale, Scheme)
    tiles = to_tiles(x, tile_shape(scheme.granularity, tuple(x.shape))).float()
    factor = shrink.reshape(-1, 1) if isinstance(shrink, torch.Tensor) else shrink
    with named(name):
        grid = fit(tiles, scheme, rule, factor)
        shape = scale_shape(scheme.granularity, tuple(x.shape))
        return Grid(quantize_scales(grid.scale.reshape(shape), scheme.scale, name), grid.zero_point, grid.offset)  # type: ignore[arg-type]


def quantize_scales(scale: torch.Tensor, scheme: Scheme, name: str = "scale") -> QTensor:
    """Scales as a QTensor whose every value is positive: a code that would mean zero becomes the smallest that does not."""
    with named(f"{name}: scale"):
        if isinstance(scheme.scale, Scheme):
            outer = _nested_grid(scale, scheme, "auto", f"{name}: scale", 1.0)
        else:
            outer = fit(to_tiles(scale, tile_shape(scheme.granularity, tuple(scale.shape))), scheme)
        # Some layouts store the reciprocal: make the outer scale a number that survives 1/(1/s).
        if scheme.symmetric and scheme.scale == "float32":
            outer = Grid(1 / (1 / outer.scale))
        q = quantize_with(scale, scheme, outer)
    while bool((low := q.dequantize() <= 0).any()):
        q.codes[low] += 1  # codes of numbers that are not negative ascend with what they mean, in every format
    return q


def _encode_tiles(tiles: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor:
    if grid.offset is not None:
        return encode((tiles - grid.offset) / grid.scale, scheme.format)
    return encode(tiles / grid.scale, scheme.format, grid.zero_point)


def _concatenate(grids: list[Grid]) -> Grid:
    if len(grids) == 1:
        return grids[0]
    parts: list[Callable[[Grid], torch.Tensor | None]] = [lambda g: g.scale, lambda g: g.zero_point, lambda g: g.offset]
    return Grid(*(None if part(grids[0]) is None else torch.cat([part(g) for g in grids]) for part in parts))  # type: ignore


def _assemble(
    codes: torch.Tensor, grid: Grid, scheme: Scheme, shape: tuple[int, ...], nested: QTensor | None = None
) -> QTensor:
    """Codes and flat grids → a QTensor of the tensor's own shape."""
    wanted = scale_shape(scheme.granularity, shape)
    scale, zero, offset = (None if p is None else p.reshape(wanted) for p in grid)
    assert scale is not None
    return QTensor(codes, scale if nested is None else nested, zero, offset, scheme)


class named:
    """Puts a tensor's name in front of the errors of inner code, which does not know it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArrondiError) and not str(error).startswith(self.name):
            raise type(error)(f"{self.name}: {error}") from error


__all__ = [
    "Grid",
    "QTensor",
    "dequantize",
    "fake_quantize",
    "fit",
    "quantize_scales",
    "quantize_tensor",
    "quantize_with",
    "round_scale",
]


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The function form of `QTensor.dequantize`."""
    return q.dequantize(dtype)
