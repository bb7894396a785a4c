"""The compiled quantizers: tensors in, tensors out, and None where PyTorch must do it.

Owns: which tensors and schemes the kernels take, and how they are handed over. Every function has its slow reference, named in
its docstring, with the same result: codes and scales to the last bit unless it says otherwise. None means that there is no
extension, that the kernels do not know this scheme, layout, type or device, or that a value is NaN or infinite or a scale
does not fit its storage; the reference then does the work or says what is wrong.

Kernels see a tensor as rows of groups: PerGroup, PerChannel, PerToken and PerTensor, everything whose scales cover consecutive
elements. Integer formats with plain scales only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import torch

from arrondi.errors import ShapeError
from arrondi.formats import Scheme, tile_shape
from arrondi.native import TYPES, native, operand, threads
from arrondi.tensor.packing import packed_width
from arrondi.tensor.ranges.grid import STORED, Grid

_GIVEN, _SYMMETRIC, _EXTREME, _AFFINE, _OFFSET = range(5)
"""Fits as the extension numbers them."""

_POWERS: Final = {2.0: 4, 2.5: 5, 4.0: 8}
"""Exponents of an error that are squares and square roots, doubled."""

_MOST_SPAN: Final = 64
"""Groups of a super-block at most."""

_CODES: Final = (torch.int8, torch.uint8)


class _Rows(NamedTuple):
    """A tensor as the kernels see it: rows of `columns` consecutive elements, `group` of them under one scale."""

    rows: int
    columns: int
    group: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)


def round_groups(x: torch.Tensor, scheme: Scheme, rule: str = "auto") -> tuple[torch.Tensor, Grid] | None:
    """Fit and round to nearest: codes like `x`, the grid as (tiles, 1). The reference is `arrondi.tensor.nearest.quantize_tensor`."""
    fit = _fit(scheme, rule)
    rows = _rows(x, scheme)
    if fit is None or rows is None:
        return None
    x = x.contiguous()
    grid = _empty_grid(rows, scheme)
    codes = torch.empty(x.shape, dtype=_code_dtype(scheme), device="cpu")
    parts, place = _groups(x, rows, scheme, fit, grid), operand("codes", codes, x.shape, _code_dtype(scheme))
    fine = _module().round_groups(*parts, place, threads())
    return (codes, grid) if fine else None


def round_packed(
    x: torch.Tensor, scheme: Scheme, rule: str = "auto", *, word_bytes: int = 1
) -> tuple[torch.Tensor, Grid] | None:
    """The same with codes as the bit stream of `arrondi.tensor.packing.pack`, codes counted from the smallest."""
    fit = _fit(scheme, rule)
    rows = _rows(x, scheme)
    if fit is None or rows is None or rows.columns != x.shape[-1]:
        return None
    x = x.contiguous()
    grid = _empty_grid(rows, scheme)
    width = packed_width(rows.columns, scheme.format.bits, word_bytes)
    packed = torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device="cpu")
    parts = _groups(x, rows, scheme, fit, grid)
    place = operand("packed codes", packed, packed.shape, torch.uint8)
    fine = _module().round_packed(*parts, place, width, scheme.format.bits, threads())
    return (packed, grid) if fine else None


def round_on(x: torch.Tensor, scheme: Scheme, grid: Grid) -> torch.Tensor | None:
    """Codes for a given grid. The reference is `arrondi.tensor.nearest.quantize_with`."""
    rows = _rows(x, scheme)
    if rows is None or not _fits_grid(grid, rows):
        return None
    x = x.contiguous()
    grid = _plain(grid)
    codes = torch.empty(x.shape, dtype=_code_dtype(scheme), device="cpu")
    parts = _groups(x, rows, scheme, (_GIVEN, 1.0), grid)
    place = operand("codes", codes, x.shape, _code_dtype(scheme))
    return codes if _module().round_groups(*parts, place, threads()) else None


def restore(codes: torch.Tensor, scheme: Scheme, grid: Grid, dtype: torch.dtype) -> torch.Tensor | None:
    """Codes back to numbers. The reference is `arrondi.tensor.qtensor.QTensor.dequantize`."""
    rows = _rows(codes, scheme, _CODES)
    if rows is None or dtype not in (torch.float32, torch.bfloat16) or not _fits_grid(grid, rows):
        return None
    y = torch.empty(codes.shape, dtype=dtype, device="cpu")
    codes, grid = codes.contiguous(), _plain(grid)
    facts, _, places = _groups(y, rows, scheme, (_GIVEN, 1.0), grid)
    place, is_signed = operand("codes", codes, y.shape, _CODES), codes.dtype == torch.int8
    _module().restore(facts, places, place, is_signed, operand("y", y, y.shape, dtype), TYPES[dtype], 0, threads())
    return y


def lost(x: torch.Tensor, codes: torch.Tensor, scheme: Scheme, grid: Grid) -> tuple[float, float] | None:
    """Σ (x - x̂)² and Σ x², float32 within a group and float64 beyond."""
    rows = _rows(x, scheme)
    if rows is None or not _fits_grid(grid, rows):
        return None
    x, codes, grid = x.contiguous(), codes.contiguous(), _plain(grid)
    sums = torch.empty((rows.rows, 2), dtype=torch.float64, device="cpu")
    facts, _, places = _groups(x, rows, scheme, (_GIVEN, 1.0), grid)
    place, is_signed = operand("codes", codes, x.shape, _CODES), codes.dtype == torch.int8
    sums_at = operand("sums", sums, (rows.rows, 2), torch.float64)
    _module().restore(facts, places, place, is_signed, 0, 0, sums_at, threads())
    noise, signal = sums.sum(dim=0).tolist()
    return noise, signal


def search(x: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float) -> Grid | None:
    """The grid of each group with the least error, as (tiles, 1).

    The reference is `arrondi.tensor.ranges.search.search_grid`; sums are added in another order, so of two candidates whose losses
    agree to some 1e-6 either may be taken.
    """
    fit = _fit(scheme, "auto")
    rows = _rows(x, scheme)
    if fit is None or rows is None or power not in _POWERS or (importance is not None and rows.columns != x.shape[-1]):
        return None
    x = x.contiguous()
    weights = None if importance is None else importance.float().contiguous()
    grid = _empty_grid(rows, scheme)
    mirrored = scheme.symmetric and scheme.signed_scales and not scheme.format.balanced
    parts = _groups(x, rows, scheme, fit, grid)
    place = operand("importance", weights, (rows.columns,), torch.float32)
    return grid if _module().search_grids(*parts, place, _POWERS[power], mirrored, threads()) else None


class GroupSearch(NamedTuple):
    """What the search for grids by least squares is told of codes.

    Attributes:
        qmin, qmax: of integer codes.
        offset: there is an offset.
        below: offsets are at most zero.
        signed: scales may be negative, where there is no offset.
        reaches: what the width of a group, or without offsets its extreme, is divided by at first.
        cells: of a codebook: where its range begins, cells for one, and the nearest value in every cell; empty for integers.
    """

    qmin: int
    qmax: int
    offset: bool
    below: bool
    signed: bool
    reaches: tuple[float, ...]
    cells: tuple[float, ...]


def search_groups(
    x: torch.Tensor, w: torch.Tensor | None, job: GroupSearch
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Scale and offset of every group. The reference is `arrondi.tensor.ranges.squares.best_grids_reference`.

    Args:
        x: (16 or 32 elements, runs, groups) float32.
        w: what the error of each weighs, of the same shape; None: all the same.
    """
    found = _search_squares(x, w, job, 0, (0, 0, True), "float32", ())
    return None if found is None else (found[0], found[1])


def search_superblocks(
    x: torch.Tensor,
    w: torch.Tensor | None,
    job: GroupSearch,
    of_scales: tuple[int, int, bool],
    unit: str,
    steps: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Units (runs, 1) and codes (runs, groups) as float32 of the scales, and of offsets. The reference is
    `arrondi.tensor.ranges.superblocks.search_reference`.

    Args:
        x, w, job: as for `search_groups`.
        of_scales: lowest and highest code of scales, and whether it may be zero.
        unit: type of units.
        steps: how far the largest scale lies beyond the largest code.
    """
    if not 0 < x.shape[2] <= _MOST_SPAN or unit not in STORED:
        return None
    found = _search_squares(x, w, job, x.shape[2], of_scales, unit, steps)
    return None if found is None else (found[2], found[0], found[3], found[1])


def _search_squares(
    x: torch.Tensor,
    w: torch.Tensor | None,
    job: GroupSearch,
    span: int,
    of_scales: tuple[int, int, bool],
    unit: str,
    steps: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None] | None:
    """Scales and offsets, or their codes, and the units of both."""
    elements, runs, each = x.shape
    if (
        native is None
        or elements not in (16, 32)
        or not runs
        or not each
        or not _in_lanes(x)
        or not (w is None or _in_lanes(w))
    ):
        return None
    scale, units = torch.empty((runs, each), device="cpu"), torch.empty((runs, 1), device="cpu")
    shift, shift_units = (torch.empty_like(scale), torch.empty_like(units)) if job.offset else (None, None)
    facts = [
        runs * each,
        elements,
        span,
        job.qmin,
        job.qmax,
        job.offset,
        job.below,
        job.signed,
        *of_scales,
        TYPES[STORED[unit]],
    ]
    parts = (scale, shift, units, shift_units)
    places = [x.data_ptr(), 0 if w is None else w.data_ptr(), *(0 if p is None else p.data_ptr() for p in parts)]
    strides = [x.stride(0), x.stride(2), *((0, 0) if w is None else (w.stride(0), w.stride(2)))]
    fine = _module().search_superblocks(facts, job.reaches, steps, job.cells, places, strides, threads())
    return (scale, shift, units, shift_units) if fine else None


def _in_lanes(x: torch.Tensor) -> bool:
    """Whether groups lie at equal distances."""
    return _plain_cpu(x) and x.dtype == torch.float32 and (len(x[0]) == 1 or x.stride(1) == x.shape[2] * x.stride(2))


def split(
    x: torch.Tensor, scheme: Scheme, *, p: float, beta: float, kappa: float, iterations: int, normalize: bool
) -> Grid | None:
    """The grid of each group by half-quadratic splitting, as (tiles, 1).

    The reference is `arrondi.rounding.hqq`; powers of the error are within some 1e-6 of its own, and a group whose error falls by
    less than that may stop at another iteration.
    """
    fit = _fit(scheme, "auto")
    rows = _rows(x, scheme)
    if fit is None or rows is None:
        return None
    x = x.contiguous()
    grid = _empty_grid(rows, scheme)
    parts = _groups(x, rows, scheme, fit, grid)
    return grid if _module().split_groups(*parts, p, beta, kappa, iterations, normalize, threads()) else None


def knows(x: torch.Tensor, scheme: Scheme) -> bool:
    """Whether the kernels fit and round this tensor without a float32 copy of it."""
    return _fit(scheme, "auto") is not None and _rows(x, scheme) is not None


def sweeps(work: torch.Tensor, scheme: Scheme) -> bool:
    """Whether `sweep` can take GPTQ's working copy of a weight."""
    return native is not None and _plain_cpu(work) and work.dtype == torch.float32 and scheme.format.kind == "integer"


def sweep(
    rows: torch.Tensor,
    owed: torch.Tensor,
    factor: torch.Tensor,
    codes: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    grid: Grid,
    columns: tuple[int, int, int],
    scheme: Scheme,
) -> None:
    """GPTQ's loop over some columns of a block. The reference is `_Columns` in `arrondi.rounding.gptq_sweep`.

    Args:
        rows: (n, m) float32, the weight's columns in the order of the visit; those visited become differences.
        owed: (end of the block - first, m) float32; those of the columns visited become residuals.
        factor: (n, n) float32, upper triangular.
        codes: (n, m) int8 or uint8.
        places: (n,) int64 each: the row of `codes` and the row of the grid's parts that belong to a column.
        grid: parts (groups, m) float32.
        columns: first, last, end of the block.

    Raises:
        ShapeError: they do not fit each other.
    """
    first, last, stop = columns
    if not rows.dim() == codes.dim() == owed.dim() == factor.dim() == grid.scale.dim() == 2:
        raise ShapeError("A sweep works on matrices: rows, owed, factor, codes and the parts of the grid.")
    n, m = rows.shape
    if not 0 <= first <= last <= stop <= n or owed.shape[0] < stop - first:
        raise ShapeError(
            f"Columns {first} … {last} of a block that ends at {stop} do not fit {n} columns and {tuple(owed.shape)} sums."
        )
    places_at = [operand("places", place, (n,), torch.int64) for place in places]
    for name, place, limit in zip(("codes", "the grid"), places, (codes.shape[0], grid.scale.shape[0]), strict=True):
        low, high = (int(v) for v in torch.aminmax(place)) if n else (0, -1)
        if low < 0 or high >= limit:
            raise ShapeError(f"Columns lie at rows {low} … {high} of {name}, which has {limit}.")
    float32 = torch.float32
    done = _module().sweep(
        m, first, last, stop, scheme.format.qmin, scheme.format.qmax, operand("rows", rows, (n, m), float32),
        operand("owed", owed, (owed.shape[0], m), float32), operand("factor", factor, (n, n), float32, "rows"), factor.stride(0),
        operand("codes", codes, (codes.shape[0], m), _CODES), *places_at,
        *(operand("grid", part, (len(grid.scale), m), float32) for part in grid), threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError("There is no memory for a block of GPTQ.")


def _module() -> Any:
    return native


def _plain_cpu(x: torch.Tensor) -> bool:
    """Real memory of the CPU: no subclass, whose numbers may be elsewhere or nowhere (fake tensors), and no tracing."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.layout == torch.strided and type(x) in (torch.Tensor, torch.nn.Parameter)


def _rows(x: torch.Tensor, scheme: Scheme, types: Collection[torch.dtype] = TYPES) -> _Rows | None:
    """How the kernels see `x`; None if they do not take it."""
    if native is None or not x.numel() or x.dtype not in types or not _plain_cpu(x) or scheme.format.kind != "integer":
        return None
    shape = tuple(x.shape) or (1,)
    tile = tile_shape(scheme.granularity, shape)
    if len(tile) < len(shape):
        return None
    for lead in range(len(shape)):
        if tile[lead:] == shape[lead:] and all(t == 1 for t in tile[:lead]):
            columns = math.prod(shape[lead:])
            return _Rows(math.prod(shape[:lead]), columns, columns)
    if all(t == 1 for t in tile[:-1]):
        return _Rows(math.prod(shape[:-1]), shape[-1], tile[-1])
    return None


def _fit(scheme: Scheme, rule: str) -> tuple[int, float] | None:
    """Number and divisor of a fit; None if the kernels do not have it."""
    format = scheme.format
    if format.kind != "integer" or scheme.scale not in STORED or scheme.offset != "float32":
        return None
    if not scheme.symmetric:
        fit = _AFFINE if scheme.zero_point == "integer" else _OFFSET
        return (fit, 1.0) if rule in ("auto", "full") else None
    if rule == "extreme":
        return (_EXTREME, 1.0) if format.qmin < 0 and scheme.signed_scales else None
    if rule == "narrow" or (rule in ("auto", "full") and format.qmin == 0):
        return _SYMMETRIC, float(format.qmax)
    if rule == "full" or (rule == "auto" and format.levels > 3):
        return _SYMMETRIC, (format.qmax - format.qmin) / 2
    return None


def _code_dtype(scheme: Scheme) -> torch.dtype:
    return torch.int8 if scheme.format.qmin < 0 else torch.uint8


def _empty_grid(rows: _Rows, scheme: Scheme) -> Grid:
    tiles = (rows.rows * rows.groups, 1)
    zero = torch.empty(tiles, dtype=torch.int32, device="cpu") if scheme.zero_point == "integer" else None
    scale = torch.empty(tiles, dtype=torch.float32, device="cpu")
    return Grid(scale, zero, torch.empty_like(scale) if scheme.zero_point == "float" else None)


def _fits_grid(grid: Grid, rows: _Rows) -> bool:
    parts = [p for p in grid if p is not None]
    return all(_plain_cpu(p) and p.numel() == rows.rows * rows.groups for p in parts)


def _plain(grid: Grid) -> Grid:
    """The parts as the extension reads them. Copies of them live as long as the caller keeps what is returned here."""
    scale, zero, offset = grid
    return Grid(
        scale.float().contiguous(),
        None if zero is None else zero.int().contiguous(),
        None if offset is None else offset.float().contiguous(),
    )


def _groups(
    x: torch.Tensor, rows: _Rows, scheme: Scheme, fit: tuple[int, float], grid: Grid
) -> tuple[list[int], float, list[int]]:
    """Facts, divisor and addresses, in the order of the extension. The caller keeps the tensors alive."""
    stored = STORED.get(scheme.scale, torch.float32) if isinstance(scheme.scale, str) else torch.float32
    format = scheme.format
    facts = [*rows, format.qmin, format.qmax, fit[0], TYPES[stored], TYPES[x.dtype]]
    places = [operand("x", x, x.shape, tuple(TYPES))]
    for name, part in zip(Grid._fields, grid, strict=True):
        shape = () if part is None else part.shape
        places.append(operand(name, part, shape, torch.int32 if name == "zero_point" else torch.float32))
    return facts, fit[1], places
