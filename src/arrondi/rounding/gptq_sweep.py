"""GPTQ's loop over the columns of a weight.

Owns: `sweep`, in the compiled kernel and, for every format and device, column by column in PyTorch; and how one column is rounded.
"""

from __future__ import annotations

from functools import partial

import torch

from arrondi.formats import Format
from arrondi.rounding.gptq_factor import PANEL
from arrondi.rounding.gptq_grids import ColumnGrids, LearnedGrids, RowScales
from arrondi.tensor.encoding import code_dtype, decode, encode
from arrondi.tensor.quantizers import sweep as sweep_compiled
from arrondi.tensor.quantizers import sweeps as can_sweep
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.tables import nearest
from arrondi.tensor.trellis import ring_codes, ring_values


def sweep(
    work: torch.Tensor,
    factor: torch.Tensor,
    grids: ColumnGrids | LearnedGrids | RowScales,
    block_size: int,
    permutation: torch.Tensor | None,
    first: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Visit the columns in order.

    Args:
        first: (m,), what the codes of the first column are chosen for, in place of the weight; where grids are known beforehand.

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
    for part, some in zip(rows.split(PANEL), originals.split(PANEL), strict=True):
        part.copy_(work.index_select(1, some).T)
    state = _State(
        rows,
        torch.zeros((min(block, n), m), dtype=work.dtype, device=work.device),
        factor,
        work.new_empty((n, m), dtype=code_dtype(grids.scheme.format)),
        originals,
    )
    if first is not None:
        _begin_with(state, grids, first)
    if isinstance(grids, ColumnGrids) and can_sweep(work, grids.scheme):
        visit = _Compiled(state, grids).visit
    else:
        visit = _Columns(state, grids).visit
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


def _begin_with(state: _State, grids: ColumnGrids | LearnedGrids | RowScales, first: torch.Tensor) -> None:
    """Settle the first column on what its codes for `first` stand for, and let all others make up for it at once.

    With H = V Vᵀ the best that the others can do is H₂₂⁻¹ H₂₁ d = V₂₂⁻ᵀ V₁₂ᵀ d. The sweep then finds the first column on its grid.
    """
    format = grids.scheme.format
    grid = grids.column(0, state.order[0], partial(state.repaired, 0, start=0))
    codes = column_codes(first.to(state.rows), grid, format, grids.tables)
    values = column_values(codes, grid, format, grids.tables).to(state.rows)
    others, ours = state.factor[1:, 1:].T, state.factor[0, 1:, None]
    share = torch.linalg.solve_triangular(others, ours, upper=False)
    state.rows[1:] += share * (state.rows[0] - values)
    state.rows[0] = values


class _Columns:
    """One column after another in PyTorch, for every format: the slow reference of `_Compiled`."""

    def __init__(self, state: _State, grids: ColumnGrids | LearnedGrids | RowScales) -> None:
        self.state, self.grids = state, grids
        self.share = torch.empty_like(state.owed)

    def visit(self, start: int, stop: int) -> None:
        """All columns of a block."""
        state, format = self.state, self.grids.scheme.format
        for c in range(start, stop):
            grid = self.grids.column(c, state.order[c], partial(state.repaired, c, start=start))
            due = state.due(c, start)
            self.grids.note(state.order[c], due)
            state.codes[state.order[c]] = chosen = column_codes(due, grid, format, self.grids.tables)
            values = column_values(chosen, grid, format, self.grids.tables)
            torch.sub(due, values, out=state.owed[c - start])
            difference = state.rows[c].sub_(values)
            # Two roundings: an operation that multiplies and adds would have one on some processors and two on others.
            later = slice(c + 1 - start, stop - start)
            torch.mul(state.factor[c, c + 1 : stop, None], difference, out=self.share[later])
            state.owed[later] += self.share[later]


class _Compiled:
    """The columns of a block in the compiled kernel, with the grids in the order in which it reads them: (groups, m)."""

    def __init__(self, state: _State, grids: ColumnGrids) -> None:
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


def column_codes(w: torch.Tensor, grid: Grid, format: Format, tables: torch.Tensor | None) -> torch.Tensor:
    """The nearest codes of a column (m,), with a grid and, of a look-up format, a table (m, levels) for every row."""
    if grid.offset is not None:
        w = w - grid.offset
    units = (w / grid.scale).float()
    if format.trellis is not None:
        return ring_codes(units, format.trellis)
    if tables is not None:
        return nearest(units[:, None], tables)[:, 0]
    return encode(units, format, grid.zero_point)


def column_values(codes: torch.Tensor, grid: Grid, format: Format, tables: torch.Tensor | None) -> torch.Tensor:
    """What the codes of a column (m,) stand for."""
    if format.trellis is not None:
        values = ring_values(codes[:, None], format.trellis)[:, 0]
    else:
        values = decode(codes, format) if tables is None else tables.gather(1, codes[:, None].long())[:, 0]
    if grid.zero_point is not None:
        values -= grid.zero_point
    values *= grid.scale
    return values if grid.offset is None else values.add_(grid.offset)
