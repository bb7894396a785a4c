"""GPTQ: round column by column and let the columns not yet rounded make up for each error.

Owns: `gptq`. For a layer with inputs x, H = Σ x xᵀ is the curvature of its output error: with H⁻¹ = UᵀU, U upper
triangular, rounding column c with error e = (w - ŵ)/U[c,c] is best repaired by w[c+1:] -= e · U[c, c+1:].

The grid may be any format: integers, fp4, codebooks, power-of-two or quantized scales.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1; static act-order (scales from the
contiguous groups of the unrounded weight, columns visited by falling diagonal) is the variant that its users settled on.
"""

from __future__ import annotations

from typing import Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.encoding import code_dtype, decode, encode
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.fitting import Grid, fit
from arrondi.formats import Format, PerGroup, Scheme, scale_shape, tile_shape
from arrondi.qtensor import QTensor, quantize_scales
from arrondi.rounding.grid_search import search_grid
from arrondi.tiling import to_tiles

_PANEL = 256
"""Rows permuted at a time."""
_REVERSED = 1 << 20
"""Numbers swapped at a time."""

Order = Literal["static", "dynamic", "none"]
Range = Literal["search", "absmax"]


def gptq(
    weight: torch.Tensor,
    scheme: Scheme,
    moment: SecondMoment | None = None,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "static",
    range: Range = "search",
    power: float = 4.0,
    name: str = "weight",
) -> QTensor:
    """Round a weight so that the layer's output changes least on the calibration inputs.

    Args:
        weight: (m, n), any float dtype, finite. float64 is computed in float64, all else in float32.
        scheme: what it becomes; any granularity.
        moment: second moment of the layer's inputs, of size n; columns whose input was always zero are set to zero.
        damping: fraction of the mean diagonal that is added to the diagonal.
        block_size: columns between two updates of the far columns; changes speed, not results.
        order: "static" visits columns by falling input power with scales fixed beforehand; "dynamic" forms groups in
            the visiting order (`group_index` is set); "none" goes left to right, scales from the compensated columns.
        range: "search" tries narrower ranges for each group, "absmax" spans it.
        power: exponent of the error that the search minimises; see `search_grid`.
        name: for messages.

    Raises:
        ShapeError: weight is not a matrix or the moment has another size.
        SchemeError: `order` does not fit the granularity, or an option is out of range.
        DataError: no moment, or NaN.
    """
    if weight.ndim != 2:
        raise ShapeError(f"{name}: gptq rounds matrices, got shape {tuple(weight.shape)}. Pass each matrix of a stack.")
    if moment is None:
        raise DataError(
            f"{name}: gptq needs the second moment of the layer's inputs. Give calibration text, or use rtn or hqq."
        )
    if moment.n != weight.shape[1]:
        raise ShapeError(f"{name}: the second moment is for {moment.n} inputs, the weight has {weight.shape[1]}.")
    if block_size < 1 or not damping >= 0:
        raise SchemeError(f"{name}: gptq needs block_size >= 1 and damping >= 0, got {block_size} and {damping}.")
    work = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not bool(torch.isfinite(work).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    diagonal = moment.diagonal().to(work.device)
    if bool((diagonal == 0).any()):
        work = work * (diagonal > 0)
    permutation = None if order == "none" else torch.argsort(diagonal, descending=True, stable=True)
    grids = _Grids(work, scheme, range, power, order, permutation, name)
    factor = inverse_factor(moment.matrix(work.dtype).to(work.device), damping, permutation)
    codes, _ = _sweep(work, factor, grids, block_size, permutation)
    return grids.assemble(codes)


def inverse_factor(hessian: torch.Tensor, damping: float, permutation: torch.Tensor | None = None) -> torch.Tensor:
    """U, upper triangular with a positive diagonal, such that (H + λI)⁻¹ = UᵀU, λ = damping · mean(diag H).

    Args:
        hessian: (n, n) symmetric, float32 or float64; used up. Rows of all zeros (inputs that never occur) count as unit rows.
        permutation: (n,) order of the columns; U belongs to the permuted matrix.

    One factorisation: with J the reversal of indices, J H J = R Rᵀ gives H = (J R J)(J R J)ᵀ, and U = J R⁻¹ J. On the CPU it is
    done by LAPACK in the matrix's own memory, which for wide layers decides what fits.

    Raises:
        DataError: no damping up to the mean diagonal makes the matrix definite.
    """
    hessian = hessian.contiguous()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = 1.0
    if permutation is not None:
        hessian = hessian.index_select(0, permutation)
        for rows in hessian.split(_PANEL):
            rows.copy_(rows.index_select(1, permutation))
    _reverse(hessian)
    saved = hessian.diagonal().clone()
    solve = _invert_root if hessian.device.type == "cpu" else _invert_root_reference
    while True:
        hessian.diagonal().copy_(saved + damping * mean)
        inverse = solve(hessian)
        if inverse is not None:
            return _reverse(inverse.tril_())
        if damping >= 1.0:
            raise DataError(
                "The second moment of the inputs cannot be factored even when heavily damped: it holds NaN or infinity."
            )
        damping = min(max(damping * 10, 1e-6), 1.0)
        upper = hessian.triu(1)
        hessian.copy_(upper + upper.T)


def _invert_root(matrix: torch.Tensor) -> torch.Tensor | None:
    """R⁻¹ in the lower triangle of `matrix` itself, where matrix = R Rᵀ; None if it is not definite.

    The strict upper triangle keeps the matrix. LAPACK counts by columns, so our lower triangle is its upper one.
    """
    from scipy.linalg import lapack

    root, invert = (lapack.dpotrf, lapack.dtrtri) if matrix.dtype == torch.float64 else (lapack.spotrf, lapack.strtri)
    array = matrix.numpy().T
    _, failed = root(array, lower=0, clean=0, overwrite_a=1)
    if failed or not bool(torch.isfinite(matrix.diagonal()).all()):
        return None
    _, failed = invert(array, lower=0, overwrite_c=1)
    return None if failed else matrix


def _invert_root_reference(matrix: torch.Tensor) -> torch.Tensor | None:
    """The twin of `_invert_root` on any device, with memory for four more matrices."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(root, one, upper=False)


def _reverse(matrix: torch.Tensor) -> torch.Tensor:
    """Both axes reversed, in place: the same as reading the memory backwards."""
    flat = matrix.reshape(-1)
    half = len(flat) // 2
    for start in range(0, half, _REVERSED):
        stop = min(start + _REVERSED, half)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


class _Grids:
    """Where each column's grid comes from: fixed beforehand, or fitted when the sweep reaches a group."""

    def __init__(
        self,
        work: torch.Tensor,
        scheme: Scheme,
        range: Range,
        power: float,
        order: Order,
        permutation: torch.Tensor | None,
        name: str,
    ) -> None:
        if order not in ("static", "dynamic", "none"):
            raise SchemeError(f"Unknown order {order!r}. Known: dynamic, none, static.")
        if range not in ("search", "absmax"):
            raise SchemeError(f"Unknown range {range!r}. Known: absmax, search.")
        if order == "dynamic" and not isinstance(scheme.granularity, PerGroup):
            raise SchemeError(f"Dynamic act-order forms groups of columns, got {scheme}. Use order='static'.")
        self.scheme, self.range, self.power, self.name = scheme, range, power, name
        self.shape = (work.shape[0], work.shape[1])
        self.tile = tile_shape(scheme.granularity, self.shape)
        self.permutation = permutation if order == "dynamic" else None
        # Scales that are quantized together (per tensor) must be known together; one group a row is all there at the start.
        whole = self.tile[1] == self.shape[1]
        self.fitted_first = order == "static" or isinstance(scheme.scale, Scheme) or whole
        shape = scale_shape(scheme.granularity, self.shape)
        self.scale = work.new_ones(shape, dtype=torch.float32)
        self.zero_point = work.new_zeros(shape, dtype=torch.int32) if scheme.zero_point == "integer" else None
        self.offset = work.new_zeros(shape, dtype=torch.float32) if scheme.zero_point == "float" else None
        self.nested: QTensor | None = None
        if self.fitted_first:
            columns = slice(None) if self.permutation is None else self.permutation
            self._store(slice(None), work[:, columns].float())
        if isinstance(scheme.scale, Scheme):
            self.nested = quantize_scales(self.scale, scheme.scale, name)
            self.scale = self.nested.dequantize()

    def _store(self, groups: slice, columns: torch.Tensor) -> None:
        if self.range == "search":
            grid = search_grid(columns, self.scheme, power=self.power)
        else:
            grid = fit(to_tiles(columns, self.tile), self.scheme)
        for mine, new in zip((self.scale, self.zero_point, self.offset), grid, strict=True):
            if mine is not None and new is not None:
                mine[:, groups] = new.reshape(mine[:, groups].shape)

    def column(self, position: int, original: int, current: torch.Tensor) -> Grid:
        """The grid of the column at `position` of the sweep.

        `current` holds this and later columns as they are now, (columns, m): a group that starts here is fitted to them.
        """
        index = position if self.permutation is not None else original
        group = index // self.tile[1]
        if not self.fitted_first and index % self.tile[1] == 0:
            width = min(self.tile[1], self.shape[1] - index)
            self._store(slice(group, group + 1), current[:width].T.float())
        parts = (self.scale, self.zero_point, self.offset)
        return Grid(*(None if p is None else self._tall(p[:, group]) for p in parts))  # type: ignore[arg-type]

    def _tall(self, entries: torch.Tensor) -> torch.Tensor:
        """One entry for every tile of rows → one for every row."""
        if self.tile[0] == 1:
            return entries
        return entries.repeat_interleave(self.tile[0])[: self.shape[0]]

    def assemble(self, codes: torch.Tensor) -> QTensor:
        index = None
        if self.permutation is not None:
            position = torch.arange(self.shape[1], dtype=torch.int32, device=codes.device)
            index = torch.empty_like(position)
            index[self.permutation] = position // self.tile[1]
        return QTensor(
            codes,
            self.nested if self.nested is not None else self.scale,
            self.zero_point,
            self.offset,
            self.scheme,
            index,
        )


def _sweep(
    work: torch.Tensor, factor: torch.Tensor, grids: _Grids, block_size: int, permutation: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Visit the columns in order.

    Returns:
        the codes (m, n) in the original order, and the loss ½ Σ (error / U[c,c])², which equals ½ tr(D (H + λI) Dᵀ) for
        D = weight - rounded weight, whatever the grid and the order.
    """
    m, n = work.shape
    format = grids.scheme.format
    group = grids.tile[1]
    # A group that is fitted on the way must lie inside one block, or its later columns would be stale.
    block = group * max(block_size // group, 1) if not grids.fitted_first and block_size % group else block_size
    # (n, m), a copy: a column is a contiguous row.
    rows = (
        work.T.clone(memory_format=torch.contiguous_format)
        if permutation is None
        else work.T.index_select(0, permutation)
    )
    originals = list(range(n)) if permutation is None else permutation.tolist()
    diagonal = factor.diagonal().tolist()
    codes = work.new_empty((n, m), dtype=code_dtype(format))
    errors = work.new_empty((min(block, n), m))
    loss = 0.0
    for start in range(0, n, block):
        stop = min(start + block, n)
        for c in range(start, stop):
            w = rows[c]
            grid = grids.column(c, originals[c], rows[c:])
            codes[originals[c]] = chosen = _column_codes(w, grid, format)
            error = torch.sub(w, _column_values(chosen, grid, format), out=errors[c - start]).div_(diagonal[c])
            if c + 1 < stop:
                rows[c + 1 : stop].addr_(factor[c, c + 1 : stop], error, alpha=-1)
        done = errors[: stop - start]
        loss += 0.5 * float(done.square().sum())
        if stop < n:
            rows[stop:].addmm_(factor[start:stop, stop:].T, done, alpha=-1)
    return codes.T.contiguous(), loss


def _column_codes(w: torch.Tensor, grid: Grid, format: Format) -> torch.Tensor:
    if grid.offset is not None:
        w = w - grid.offset
    return encode((w / grid.scale).float(), format, grid.zero_point)


def _column_values(codes: torch.Tensor, grid: Grid, format: Format) -> torch.Tensor:
    values = decode(codes, format)
    if grid.zero_point is not None:
        values -= grid.zero_point
    values *= grid.scale
    return values if grid.offset is None else values.add_(grid.offset)
