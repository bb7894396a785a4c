"""Tables of learned values: what the codes of a look-up format mean.

Owns: `looked_up`, `nearest`, the stored form of entries (`round_table`, `store_table`, `load_table`), `table_bits` and `wrong_table`. A
table has its entries in ascending order; an int8 entry t means t/128.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.formats import Table

STEP: Final = 1 / 128
"""What one step of an int8 entry means."""


def table_bits(table: Table, rows: int, levels: int) -> int:
    """Bits of all tables of a matrix of so many rows."""
    return table.count(rows) * levels * {"int8": 8, "float32": 32}.get(table.stored, 16)


def table_of_row(table: Table, rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The number of the table of every row, int64 (rows,)."""
    return (
        torch.arange(rows, device=device) // table.rows
        if table.rows
        else torch.zeros(rows, dtype=torch.int64, device=device)
    )


def looked_up(codes: torch.Tensor, values: torch.Tensor, table: Table) -> torch.Tensor:
    """The value of every code, before scale and offset.

    Args:
        codes: (m, n) uint8.
        values: (tables, levels) float32.
        table: who shares them.

    Returns:
        (m, n) float32.
    """
    start = (table_of_row(table, len(codes), codes.device) * values.shape[1]).int()
    return values.flatten()[codes.int() + start[:, None]]


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest entry, a tie to the lower one.

    Args:
        x: (tables, elements) float32, in units of the scale.
        values: (tables, levels) float32, ascending; of equal entries the first is taken.

    Returns:
        (tables, elements) uint8.
    """
    middles = (values[:, 1:] + values[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), x.contiguous()).to(torch.uint8)


def round_table(values: torch.Tensor, table: Table) -> torch.Tensor:
    """Entries rounded to their stored type, as float32."""
    return load_table(store_table(values, table))


def store_table(values: torch.Tensor, table: Table) -> torch.Tensor:
    """Entries in their stored type."""
    if table.stored == "int8":
        return torch.round(values / STEP).clamp_(-128, 127).to(torch.int8)
    return values.to(getattr(torch, table.stored))


def load_table(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `store_table`, float32."""
    return stored.float() * STEP if stored.dtype == torch.int8 else stored.float()


def wrong_table(values: torch.Tensor | None) -> str | None:
    """What is wrong with tables (tables, levels), None if nothing is."""
    if values is None:
        return None
    if not bool(torch.isfinite(values).all()):
        return "an entry of a table is NaN or infinite"
    return "a table does not ascend" if bool((values[:, 1:] < values[:, :-1]).any()) else None
