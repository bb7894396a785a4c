"""Where the grid of each column comes from while GPTQ goes through them.

Owns: `ColumnGrids`: grids fixed beforehand, or fitted when the sweep reaches a group; and `LearnedGrids`, scales with tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch

from arrondi.errors import SchemeError
from arrondi.formats import PerGroup, Scheme, scale_shape, tile_shape
from arrondi.tensor.nearest import store_grid
from arrondi.tensor.qtensor import Parts, QTensor
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.search import search_grid
from arrondi.tensor.ranges.superblocks import is_superblock, superblock_parts
from arrondi.tensor.ranges.weighted import FOUR_OVER_SIX, shares_outer_scale, weighted_parts
from arrondi.tensor.tiling import to_tiles


class LearnedGrids:
    """Scales and tables that were learned beforehand.

    Args:
        scheme: a look-up format.
        scale: (m, groups) float32.
        tables: (m, levels) float32, the table of every row.
        columns: under one scale.
        dues: (m, n) float32, receives every column as it was to be rounded; None: nobody asks.
    """

    fitted_first = True

    def __init__(
        self, scheme: Scheme, scale: torch.Tensor, tables: torch.Tensor, columns: int, dues: torch.Tensor | None = None
    ) -> None:
        self.scheme, self.scale, self.tables, self.tile, self.dues = scheme, scale, tables, (1, columns), dues

    def note(self, original: int, due: torch.Tensor) -> None:
        """Takes a column as it is to be rounded."""
        if self.dues is not None:
            self.dues[:, original] = due

    def column(self, position: int, original: int, current: Callable[[int], torch.Tensor]) -> Grid:
        """The grid of a column; see `ColumnGrids.column`."""
        return Grid(self.scale[:, original // self.tile[1]])


class ColumnGrids:
    """Where each column's grid comes from: fixed beforehand, or fitted when the sweep reaches a group."""

    tables: torch.Tensor | None = None

    def __init__(
        self,
        work: torch.Tensor,
        scheme: Scheme,
        range: Literal["search", "absmax", "importance"],
        power: float,
        order: Literal["static", "dynamic", "none"],
        permutation: torch.Tensor | None,
        name: str,
        importance: torch.Tensor | None = None,
        magnitude: bool = True,
    ) -> None:
        """`importance` (n,), with range="importance": what an error of each column weighs; `magnitude`: large weights weigh more."""
        if order not in ("static", "dynamic", "none"):
            raise SchemeError(f"Unknown order {order!r}. Known: dynamic, none, static.")
        if range not in ("search", "absmax", "importance"):
            raise SchemeError(f"Unknown range {range!r}. Known: absmax, importance, search.")
        if order == "dynamic" and not isinstance(scheme.granularity, PerGroup):
            raise SchemeError(f"Dynamic act-order forms groups of columns, got {scheme}. Use the option order=static.")
        self.scheme, self.range, self.power, self.name, self.magnitude = scheme, range, power, name, magnitude
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
        columns = slice(None) if self.permutation is None else self.permutation
        if range == "search" and is_superblock(scheme):
            # What cannot be made up for is a large weight that is clipped. Measured by KL, this power is the best of 0, ½ and 1.
            self.kept = superblock_parts(work[:, columns], scheme, magnitude=1.0)
        elif range == "importance" or (range == "search" and shares_outer_scale(scheme)):
            self.kept = self._weighed(work[:, columns].float(), importance)
        elif self.fitted_first:
            self._store(slice(None), work[:, columns].float())
            self.kept = store_grid(self.grid, scheme, self.shape, name=name) if nested else None
        if self.kept is not None:
            self.scale, self.zero_point, self.offset = self.kept.grid

    def note(self, original: int, due: torch.Tensor) -> None:
        """Takes a column as it is to be rounded; nobody asks here."""

    def _weighed(self, columns: torch.Tensor, importance: torch.Tensor | None) -> Parts:
        """Grids of all groups at once, scales tried as they are stored. For fp4 two widths do: measured by KL, what more of them
        gain in single errors is gone once errors make up for each other."""
        if self.range == "importance":
            if not self.fitted_first or self.permutation is not None or importance is None:
                raise SchemeError("Grids by importance are known before the sweep. Use the option order=static.")
            return weighted_parts(columns, self.scheme, importance, name=self.name, magnitude=self.magnitude)
        widths = FOUR_OVER_SIX if self.scheme.format.name == "fp4_e2m1" else None
        return weighted_parts(columns, self.scheme, magnitude=False, widths=widths, turns=0, name=self.name)

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


class RowScales:
    """What `sweep` asks of grids, for one scale a row that is known beforehand: (m, 1)."""

    tile: Final = (1, 1)
    fitted_first: Final = True
    tables: Final = None

    def __init__(self, scheme: Scheme, scale: torch.Tensor) -> None:
        self.scheme, self.grid = scheme, Grid(scale[:, 0], None, None)

    def column(self, position: int, original: int, current: Callable[[int], torch.Tensor]) -> Grid:
        """The same for every column."""
        return self.grid

    def note(self, original: int, due: torch.Tensor) -> None:
        """Nobody asks here what a column was rounded from."""
