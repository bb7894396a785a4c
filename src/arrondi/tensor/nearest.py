"""Round to nearest, and what a tensor on a grid is made from.

Owns: `quantize_tensor` (the data's own range), `quantize_with` (a given grid), `fake_quantize`, `store_grid` and `quantize_scales`
(scales and offsets that are quantized in turn). Uses `ranges` for the grid, `encoding` for the codes and `tiling` for the granularity.
"""

from __future__ import annotations

import math

import torch

from arrondi.arguments import said
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import PerFlat, Scheme, scale_shape, tile_shape
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.encoding import code_dtype, encode
from arrondi.tensor.qtensor import Parts, QTensor
from arrondi.tensor.quantizers import round_groups, round_on
from arrondi.tensor.ranges.fits import check_rule, fit
from arrondi.tensor.ranges.grid import Grid, cat_grids
from arrondi.tensor.ranges.superblocks import is_superblock, superblock_parts
from arrondi.tensor.tiling import from_tiles, to_tiles

_CHUNK = 1 << 18
"""Elements handled at a time: a float32 chunk of this size and its temporaries stay in the core's own cache."""


def quantize_tensor(
    x: torch.Tensor, scheme: SchemeLike, *, rule: str = "auto", name: str = "tensor", shrink: torch.Tensor | float = 1.0
) -> QTensor:
    """Round to nearest on the grid that the data's own range gives.

    Args:
        x: any shape, any float dtype, finite; computed in float32.
        scheme: what the tensor becomes: a Scheme, a LayerScheme (its weights are used) or a word ("W4A16", the grammar).
        rule: how the scales are fitted, a name of `arrondi.tensor.ranges.fits.FITS`; "auto" searches those of super-blocks, which have few
            codes and one unit.
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
        if not scheme.nearest:
            raise SchemeError(own_numbers(scheme))
        shape = tuple(x.shape)
        tile = tile_shape(scheme.granularity, shape)
        if x.numel() == 0:
            return _empty(x, scheme)
        factor = _factor(shrink, scale_shape(scheme.granularity, shape))
        if rule == "auto" and isinstance(factor, float) and factor == 1.0 and is_superblock(scheme):
            return quantize_with(x, scheme, superblock_parts(x, scheme), name=name)
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
    """Why rounding to nearest alone cannot make a scheme that has tables or rings, or keeps numbers apart."""
    if scheme.format.trellis is not None:
        return f"The codes of {scheme.format} are searched along rings, not one by one. Use the method trellis, or rtn without data."
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
    if not scheme.nearest:
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
            count = scale.numel() if isinstance(scheme.granularity, PerFlat) else None
            found = fit(to_tiles(scale, tile_shape(scheme.granularity, tuple(scale.shape))), scheme, count=count)
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
