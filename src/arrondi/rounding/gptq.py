"""GPTQ: round column by column and let the columns not yet rounded make up for each error.

Owns: `gptq`. For a layer with inputs x, H = Σ x xᵀ is the curvature of its output error. With H = V Vᵀ, V upper triangular,
that error is Σ_c (V[c,c] d[c] + Σ_{j<c} V[j,c] d[j])² for the differences d = w - ŵ of all columns: column c cancels what the
columns before it left, as well as its grid can, by rounding w[c] + Σ_{j<c} d[j] V[j,c] / V[c,c]. This is the published method
without the inverse of H: V⁻¹ is its Cholesky factor of H⁻¹.

The grid may be any format: integers, fp4, codebooks, power-of-two or quantized scales.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1; static act-order (scales from the
contiguous groups of the unrounded weight, columns visited by falling diagonal) is the variant that its users settled on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import Format, PerGroup, Scheme, scale_shape, tile_shape
from arrondi.tensor.encoding import code_dtype, decode, encode
from arrondi.tensor.qtensor import Parts, QTensor, store_grid
from arrondi.tensor.quantizers import sweep as sweep_compiled
from arrondi.tensor.quantizers import sweeps as can_sweep
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.search import search_grid
from arrondi.tensor.tiling import to_tiles

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
    # The extremes of a NaN are NaN; a mask of the whole weight would cost ten times as much.
    if work.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(work))).all()):
        raise DataError(f"{name}: the weights hold NaN or infinity. Repair or exclude the tensor.")
    diagonal = moment.diagonal().to(work.device)
    if bool((diagonal == 0).any()):
        work = work * (diagonal > 0)
    permutation = None if order == "none" else torch.argsort(diagonal, descending=True, stable=True)
    grids = _Grids(work, scheme, range, power, order, permutation, name)
    factor = root_factor(moment.matrix(work.dtype).to(work.device), damping, permutation)
    codes, _ = _sweep(work, factor, grids, block_size, permutation)
    return grids.assemble(codes)


def root_factor(hessian: torch.Tensor, damping: float, permutation: torch.Tensor | None = None) -> torch.Tensor:
    """V, upper triangular with a positive diagonal, such that H + λI = V Vᵀ, λ = damping · mean(diag H).

    Args:
        hessian: (n, n) symmetric, float32 or float64; used up. Rows of all zeros (inputs that never occur) count as unit rows.
        permutation: (n,) order of the columns; V belongs to the permuted matrix.

    With J the reversal of indices, J H J = R Rᵀ gives V = J R J. On the CPU R is found by LAPACK in the matrix's own memory,
    which for wide layers decides what fits.

    Raises:
        DataError: no damping up to the mean diagonal makes the matrix definite.
    """
    hessian = hessian.contiguous()
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    diagonal[diagonal <= 0] = 1.0
    if permutation is None:
        _reverse(hessian)
    else:
        backwards = permutation.flip(0)
        hessian = hessian.index_select(0, backwards)
        for rows in hessian.split(_PANEL):
            rows.copy_(rows.index_select(1, backwards))
    saved = hessian.diagonal().clone()
    solve = _root if hessian.device.type == "cpu" else _root_reference
    while True:
        hessian.diagonal().copy_(saved + damping * mean)
        root = solve(hessian)
        if root is not None:
            return _reverse(root.tril_())
        if damping >= 1.0:
            raise DataError(
                "The second moment of the inputs cannot be factored even when heavily damped: it holds NaN or infinity."
            )
        damping = min(max(damping * 10, 1e-6), 1.0)
        upper = hessian.triu(1)
        hessian.copy_(upper + upper.T)


def _root(matrix: torch.Tensor) -> torch.Tensor | None:
    """R in the lower triangle of `matrix` itself, where matrix = R Rᵀ; None if it is not definite.

    The strict upper triangle keeps the matrix. LAPACK counts by columns, so our lower triangle is its upper one.
    """
    from scipy.linalg import lapack

    factorize = lapack.dpotrf if matrix.dtype == torch.float64 else lapack.spotrf
    _, failed = factorize(matrix.numpy().T, lower=0, clean=0, overwrite_a=1)
    return None if failed or not bool(torch.isfinite(matrix.diagonal()).all()) else matrix


def _root_reference(matrix: torch.Tensor) -> torch.Tensor | None:
    """The twin of `_root` on any device, with memory for two more matrices."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else root


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
            raise SchemeError(f"Dynamic act-order forms groups of columns, got {scheme}. Use the option order=static.")
        self.scheme, self.range, self.power, self.name = scheme, range, power, name
        self.shape = (work.shape[0], work.shape[1])
        self.tile = tile_shape(scheme.granularity, self.shape)
        self.permutation = permutation if order == "dynamic" else None
        # Scales that are quantized together (per tensor) must be known together; one group a row is all there at the start.
        whole = self.tile[1] == self.shape[1]
        nested = isinstance(scheme.scale, Scheme) or isinstance(scheme.offset, Scheme)
        self.fitted_first = order == "static" or nested or whole
        shape = scale_shape(scheme.granularity, self.shape)
        self.scale = work.new_ones(shape, dtype=torch.float32)
        self.zero_point = work.new_zeros(shape, dtype=torch.int32) if scheme.zero_point == "integer" else None
        self.offset = work.new_zeros(shape, dtype=torch.float32) if scheme.zero_point == "float" else None
        self.kept: Parts | None = None
        if self.fitted_first:
            columns = slice(None) if self.permutation is None else self.permutation
            self._store(slice(None), work[:, columns].float())
        if nested:
            self.kept = store_grid(self.grid, scheme, self.shape, name=name)
            self.scale, self.zero_point, self.offset = self.kept.grid

    def _store(self, groups: slice, columns: torch.Tensor) -> None:
        if self.range == "search":
            grid = search_grid(columns, self.scheme, power=self.power)
        else:
            grid = fit(to_tiles(columns, self.tile), self.scheme)
        for mine, new in zip((self.scale, self.zero_point, self.offset), grid, strict=True):
            if mine is not None and new is not None:
                mine[:, groups] = new.reshape(mine[:, groups].shape)

    def column(self, position: int, original: int, current: Callable[[int], torch.Tensor]) -> Grid:
        """The grid of the column at `position` of the sweep.

        `current(count)` gives this and later columns, repaired for what was rounded, (count, m): a group that starts here
        is fitted to them.
        """
        index = position if self.permutation is not None else original
        group = index // self.tile[1]
        if not self.fitted_first and index % self.tile[1] == 0:
            width = min(self.tile[1], self.shape[1] - index)
            self._store(slice(group, group + 1), current(width).T.float())
        return self.grid.map(lambda part: self.tall(part[:, group]))

    @property
    def grid(self) -> Grid:
        """Parts as (tiles of rows, groups)."""
        return Grid(self.scale, self.zero_point, self.offset)

    def tall(self, entries: torch.Tensor) -> torch.Tensor:
        """One entry for every tile of rows → one for every row."""
        if self.tile[0] == 1:
            return entries
        return entries.repeat_interleave(self.tile[0], dim=0)[: self.shape[0]]

    def assemble(self, codes: torch.Tensor) -> QTensor:
        index = None
        if self.permutation is not None:
            position = torch.arange(self.shape[1], dtype=torch.int32, device=codes.device)
            index = torch.empty_like(position)
            index[self.permutation] = position // self.tile[1]
        kept = Parts(self.scale, self.zero_point, self.offset) if self.kept is None else self.kept
        return QTensor(codes, kept.scale, kept.zero_point, kept.offset, self.scheme, index)


def _sweep(
    work: torch.Tensor, factor: torch.Tensor, grids: _Grids, block_size: int, permutation: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Visit the columns in order.

    Returns:
        the codes (m, n) in the original order, and the loss ½ Σ (residual · V[c,c])², which equals ½ tr(D (H + λI) Dᵀ) for
        D = weight - rounded weight, whatever the grid and the order.
    """
    m, n = work.shape
    group = grids.tile[1]
    # A group that is fitted on the way must lie inside one block, or its later columns would be stale.
    block = group * max(block_size // group, 1) if not grids.fitted_first and block_size % group else block_size
    # (n, m), a copy: a column is a contiguous row. Columns that were visited hold their differences d.
    rows = torch.empty((n, m), dtype=work.dtype, device=work.device)
    originals = torch.arange(n, device=work.device) if permutation is None else permutation
    for part, some in zip(rows.split(_PANEL), originals.split(_PANEL), strict=True):
        part.copy_(work.index_select(1, some).T)
    state = _State(
        rows,
        torch.zeros((min(block, n), m), dtype=work.dtype, device=work.device),
        factor,
        work.new_empty((n, m), dtype=code_dtype(grids.scheme.format)),
        originals,
    )
    visit = (_Compiled if can_sweep(work, grids.scheme) else _Columns)(state, grids).visit
    loss = 0.0
    for start in range(0, n, block):
        stop = min(start + block, n)
        owed = state.owed[: stop - start]
        if start:
            torch.mm(factor[:start, start:stop].T, rows[:start], out=owed)
        visit(start, stop)
        loss += 0.5 * float((owed * state.diagonal[start:stop]).square_().sum())
    return state.codes.T.contiguous(), loss


class _State:
    """What the sweep works on.

    Attributes:
        rows: (n, m), columns in the order of the visit: differences d where they were visited, weights where not.
        owed: (block, m), for the columns of a block Σ_j d[j] V[j,c] over all j visited; once a column is visited, its residual.
        factor: (n, n), V.
        codes: (n, m), columns in their original order.
        originals: (n,), where each column comes from.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        owed: torch.Tensor,
        factor: torch.Tensor,
        codes: torch.Tensor,
        originals: torch.Tensor,
    ) -> None:
        self.rows, self.owed, self.factor, self.codes, self.originals = rows, owed, factor, codes, originals
        self.diagonal = factor.diagonal().clone().unsqueeze(1)  # (n, 1)
        self.order = originals.tolist()

    def due(self, c: int, start: int) -> torch.Tensor:
        """(m,): a column of the block that begins at `start` as it is to be rounded, now that those before it are."""
        return self.rows[c] + self.owed[c - start] / self.diagonal[c]

    def repaired(self, first: int, count: int, start: int) -> torch.Tensor:
        """(count, m): columns of that block as they would best be if they were not to be rounded."""
        columns = slice(first, first + count)
        owed = self.owed[first - start : first - start + count]
        triangle = self.factor[columns, columns].T
        return self.rows[columns] + torch.linalg.solve_triangular(triangle, owed, upper=False)


class _Columns:
    """One column after another in PyTorch, for every format: the slow twin of `_Compiled`."""

    def __init__(self, state: _State, grids: _Grids) -> None:
        self.state, self.grids = state, grids
        self.share = torch.empty_like(state.owed)

    def visit(self, start: int, stop: int) -> None:
        """All columns of a block."""
        state, format = self.state, self.grids.scheme.format
        for c in range(start, stop):
            grid = self.grids.column(c, state.order[c], partial(state.repaired, c, start=start))
            due = state.due(c, start)
            state.codes[state.order[c]] = chosen = _column_codes(due, grid, format)
            values = _column_values(chosen, grid, format)
            torch.sub(due, values, out=state.owed[c - start])
            difference = state.rows[c].sub_(values)
            # Two roundings: an operation that multiplies and adds would have one on some processors and two on others.
            later = slice(c + 1 - start, stop - start)
            torch.mul(state.factor[c, c + 1 : stop, None], difference, out=self.share[later])
            state.owed[later] += self.share[later]


class _Compiled:
    """The columns of a block in the compiled kernel, with the grids in the order in which it reads them: (groups, m)."""

    def __init__(self, state: _State, grids: _Grids) -> None:
        self.state, self.grids = state, grids
        n = len(state.rows)
        index = state.originals if grids.permutation is None else torch.arange(n, device=state.rows.device)
        self.groups = index // grids.tile[1]
        self.tables = grids.grid.map(lambda part: grids.tall(part).T.float().contiguous())

    def visit(self, start: int, stop: int) -> None:
        """All columns of a block; where groups are fitted on the way, one group after another."""
        if self.grids.fitted_first:
            self._sweep(start, start, stop, stop)
            return
        width = self.grids.tile[1]
        for first in range(start, stop, width):
            repaired = partial(self.state.repaired, first, start=start)
            grid = self.grids.column(first, self.state.order[first], repaired)
            for table, part in zip(self.tables, grid, strict=True):
                if table is not None and part is not None:
                    table[first // width] = part
            self._sweep(start, first, min(first + width, stop), stop)

    def _sweep(self, start: int, first: int, last: int, stop: int) -> None:
        state, scheme = self.state, self.grids.scheme
        places = state.originals, self.groups
        owed = state.owed[first - start :]
        sweep_compiled(state.rows, owed, state.factor, state.codes, places, self.tables, (first, last, stop), scheme)


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
