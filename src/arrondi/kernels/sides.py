"""Integer products whose two sides are both rounded anew at every step, as in low-bit training.

Owns: `extremes`, `round_codes`, `scaled`, each with a slow reference that gives the same numbers, `later`, and `integer_product`, exact
sums of int8 products by whichever engine is exact on this machine. Stochastic rounding (unbiased) takes its noise from a hash of
a seed and the place of a number, so that it is the same on every machine and with any number of threads.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch.nn import functional as F

from arrondi.errors import ShapeError
from arrondi.native import TYPES, available, native, operand, plain, threads

_EXACT_COLUMNS: Final = 1024
"""Products of int8 that float32 adds up without rounding: 1024 · 128² = 2²⁴."""

_GOLDEN: Final = 0x9E3779B1
_WORD: Final = 0xFFFFFFFF

Factor = torch.Tensor | None
"""(rows,) or (columns,) float32 that values are multiplied by; None for ones."""


def extremes(x: torch.Tensor, *, row: Factor = None, column: Factor = None, by_column: bool = False) -> torch.Tensor:
    """The largest |x · row · column| of each row, or of each column; NaN where there is one.

    Args:
        x: (rows, columns) float32, bfloat16 or float16.
        row, column: factors.
        by_column: of columns, not of rows.

    Returns:
        (rows,) or (columns,) float32; 0 where there is nothing.
    """
    rows, columns = _shape(x)
    if not _compiled(x):
        return extremes_reference(x, row=row, column=column, by_column=by_column)
    found = torch.zeros(columns if by_column else rows, dtype=torch.float32)
    place, kept = _matrix(x, row, column)
    assert native is not None
    native.extremes(place, by_column, found.data_ptr(), threads())
    del kept
    return found


def extremes_reference(
    x: torch.Tensor, *, row: Factor = None, column: Factor = None, by_column: bool = False
) -> torch.Tensor:
    """The slow reference of `extremes`."""
    values = _values(x, row, column).abs()
    axis = 0 if by_column else 1
    return values.amax(axis) if values.shape[axis] else values.new_zeros(values.shape[1 - axis])


def round_codes(
    x: torch.Tensor,
    *,
    row: Factor = None,
    column: Factor = None,
    lowest: int = -127,
    highest: int = 127,
    seed: int | None = None,
) -> torch.Tensor:
    """clip(round(x · row · column), lowest, highest) as int8, to nearest even or, with a seed, stochastically.

    Args:
        x: (rows, columns) float32, bfloat16 or float16.
        row, column: factors, the inverse scales.
        lowest, highest: codes within int8.
        seed: of the noise, modulo 2³²; None rounds to nearest. The chance to round up is what is left over, to 2⁻¹⁷, and
            whole numbers stay what they are.

    Returns:
        (rows, columns) int8. A NaN becomes the lowest code: its scale carries it on.
    """
    rows, columns = _shape(x)
    if not _compiled(x):
        return round_codes_reference(x, row=row, column=column, lowest=lowest, highest=highest, seed=seed)
    codes = torch.empty((rows, columns), dtype=torch.int8)
    place, kept = _matrix(x, row, column)
    assert native is not None
    native.round_codes(place, lowest, highest, seed is not None, (seed or 0) & _WORD, codes.data_ptr(), threads())
    del kept
    return codes


def round_codes_reference(
    x: torch.Tensor,
    *,
    row: Factor = None,
    column: Factor = None,
    lowest: int = -127,
    highest: int = 127,
    seed: int | None = None,
) -> torch.Tensor:
    """The slow reference of `round_codes`."""
    values = _values(x, row, column)
    if seed is not None:
        values = values + _noise(values.shape[0], values.shape[1], seed, values.device)
    return values.nan_to_num(nan=lowest).clamp(lowest, highest).round().to(torch.int8)


def later(seed: int | None, rows: int) -> int | None:
    """The seed with which a part of a matrix that begins at a row is rounded as it is with the whole; None stays None."""
    return None if seed is None else (seed + rows * _GOLDEN) & _WORD


def scaled(sums: torch.Tensor, row: Factor, column: Factor, bias: Factor, dtype: torch.dtype) -> torch.Tensor:
    """sums · row · column + bias.

    Args:
        sums: (rows, columns) int32; used up, since a float32 result takes their place in memory.
        row, column, bias: (rows,), (columns,) and (columns,) float32, or None.
        dtype: of the result, a floating type.
    """
    rows, columns = _shape(sums)
    if not (sums.is_cpu and available() and dtype in (torch.float32, torch.bfloat16)):
        return scaled_reference(sums, row, column, bias, dtype)
    sums = sums.contiguous()
    y = sums.view(dtype) if dtype == torch.float32 else torch.empty((rows, columns), dtype=dtype)
    kept = (_factor(row), _factor(column), _factor(bias))
    assert native is not None
    native.scale_sums(
        rows, columns, operand("sums", sums, (rows, columns), torch.int32), operand("row", kept[0], (rows,), torch.float32),
        operand("column", kept[1], (columns,), torch.float32), operand("bias", kept[2], (columns,), torch.float32),
        y.data_ptr(), TYPES[dtype], threads(),
    )  # fmt: skip
    return y


def scaled_reference(sums: torch.Tensor, row: Factor, column: Factor, bias: Factor, dtype: torch.dtype) -> torch.Tensor:
    """The slow reference of `scaled`."""
    values = _values(sums.float(), row, column)
    return (values if bias is None else values + bias.float()).to(dtype)


def integer_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a bᵀ, exact.

    Args:
        a: (m, k) int8, any strides.
        b: (n, k) int8, any strides.

    Returns:
        (m, n) int32.

    Raises:
        ShapeError: they are not such matrices, or k is 2¹⁷ or more, of which sums may not fit.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"A product of codes takes (m, k) and (n, k) int8, got {tuple(a.shape)} in {a.dtype} and {tuple(b.shape)} in {b.dtype}."
        )
    if a.shape[1] >= 2**17:
        raise ShapeError(f"Sums of {a.shape[1]} products of int8 may not fit int32: split the {a.shape[1]} columns.")
    if engine(a.device.type) != "torch" or not a.numel() or not b.numel():
        return integer_product_reference(a, b)
    left, right = (a, b) if a.is_cpu else filled(a, b)
    return torch._int_mm(left, right.T)[: len(a), : len(b)]


def integer_product_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The slow reference of `integer_product`: float32 products of so few columns that no sum is rounded."""
    total = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(_EXACT_COLUMNS, 1), b.split(_EXACT_COLUMNS, 1), strict=True):
        total += (left.float() @ right.float().T).to(torch.int32)
    return total


@functools.cache
def engine(device: str) -> str:
    """Who multiplies int8 on a kind of device: "torch" (`torch._int_mm`) where it is exact, else "float32" in exact pieces.

    On a CPU without an instruction for four products of bytes, PyTorch's own adds pairs up in 16 bits that overflow; the
    largest codes show it.
    """
    try:
        for first, second in ((127, 127), (-128, -128), (-127, 127)):
            a = torch.full((32, 64), first, dtype=torch.int8, device=device)
            b = torch.full((32, 64), second, dtype=torch.int8, device=device)
            if not bool((torch._int_mm(a, b.T) == 64 * first * second).all()):
                return "float32"
    except (RuntimeError, AttributeError):
        return "float32"
    return "torch"


def filled(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sides (m, k) and (n, k) with zeros added up to the sizes that CUDA's product takes: m above 16, k and n multiples of 8."""
    sums, rows, columns = -a.shape[1] % 8, max(17 - len(a), 0), -len(b) % 8
    left = F.pad(a, (0, sums, 0, rows)) if sums or rows else a
    return left, F.pad(b, (0, sums, 0, columns)) if sums or columns else b


def _shape(x: torch.Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ShapeError(f"A matrix (rows, columns) is rounded, got shape {tuple(x.shape)}. Reshape it first.")
    return int(x.shape[0]), int(x.shape[1])


def _compiled(x: torch.Tensor) -> bool:
    return plain(x) and x.dtype in TYPES and available()


def _matrix(x: torch.Tensor, row: Factor, column: Factor) -> tuple[tuple[int, ...], tuple[object, ...]]:
    """What the extension wants to know of a matrix, and what must live until it has read it."""
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        x = x.contiguous()
    of_row, of_column = _factor(row), _factor(column)
    place = (
        rows, columns, operand("x", x, (rows, columns), tuple(TYPES), "rows"), x.stride(0), TYPES[x.dtype],
        operand("row", of_row, (rows,), torch.float32), operand("column", of_column, (columns,), torch.float32),
    )  # fmt: skip
    return place, (x, of_row, of_column)


def _factor(factor: Factor) -> Factor:
    return None if factor is None else factor.detach().float().contiguous()


def _values(x: torch.Tensor, row: Factor, column: Factor) -> torch.Tensor:
    values = x.detach().float()
    if row is not None:
        values = values * row.float()[:, None]
    return values if column is None else values * column.float()


def _noise(rows: int, columns: int, seed: int, device: torch.device) -> torch.Tensor:
    """(rows, columns) float32 in (-0.5, 0.5): odd multiples of 2⁻¹⁷."""
    of_row = _mixed((seed + torch.arange(rows, device=device) * _GOLDEN) & _WORD)
    bits = _mixed((of_row[:, None] + torch.arange(columns, device=device) * _GOLDEN) & _WORD) >> 16
    return (2 * bits - 65535).float() * 2.0**-17


def _mixed(v: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits (the finalizer "lowbias32" of C. Wellons' search) in int64."""
    v = _times(v ^ (v >> 16), 0x7FEB352D)
    v = _times(v ^ (v >> 15), 0x846CA68B)
    return v ^ (v >> 16)


def _times(v: torch.Tensor, factor: int) -> torch.Tensor:
    """v · factor modulo 2³², by halves, since int64 would overflow."""
    low, high = v & 0xFFFF, v >> 16
    return (low * factor + (((high * factor) & 0xFFFF) << 16)) & _WORD


__all__ = [
    "engine",
    "extremes",
    "extremes_reference",
    "filled",
    "integer_product",
    "integer_product_reference",
    "later",
    "round_codes",
    "round_codes_reference",
    "scaled",
    "scaled_reference",
]
