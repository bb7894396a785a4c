"""SINQ: one scale for every row and one for every column, so that no row and no column is wider than others. No data.

Owns: `sinkhorn`. W = diag(rows) · Ŵ · diag(columns), where all rows and all columns of Ŵ have nearly the same standard deviation. A
quantizer with a scale for every row (or for groups in it) needs no more than the columns: its own scales follow any factor of a row.
The columns are folded into what makes the activation, so nothing is left to do when the model runs.

Source: Müller et al. 2025, arXiv:2509.22944, section 2 and its variant without overhead, which shares the columns among all
linears that read the same activation. Alternating normalization is Sinkhorn and Knopp's, on squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from arrondi.rewrite.channels import centred, reduce_columns, usable

_LEAST = 1e-12


class Dual(NamedTuple):
    """The two scales of some matrices that read the same activation.

    Attributes:
        rows: (m,) of each matrix.
        columns: (channels,) what the columns are to be divided by, the same for all matrices.
        history: the imbalance (largest over least standard deviation) before, and after every sweep.
    """

    rows: list[torch.Tensor]
    columns: torch.Tensor
    history: tuple[float, ...]


def sinkhorn(
    weights: Sequence[torch.Tensor], channels: torch.Tensor | None = None, count: int = 0, sweeps: int = 16
) -> Dual:
    """Rows and columns made equally wide in turn; the best of all sweeps counts.

    Args:
        weights: matrices (m, n) over the same columns.
        channels: (n,) int64, columns with the same number share a scale; None: each has its own.
        count: number of channels.
        sweeps: at most.
    """
    n = weights[0].shape[1]
    if channels is None:
        channels, count = torch.arange(n, device=weights[0].device), n
    squares = torch.cat([w.float().square() for w in weights])
    means = torch.cat([w.float() for w in weights])
    rows, columns = squares.new_ones(len(squares)), squares.new_ones(count)
    alive_rows, alive = squares.amax(1) > 0, reduce_columns(squares.amax(0), channels, count, "amax") > 0
    best, history = (rows, columns), []
    for sweep in range(sweeps + 1):
        by_row, by_column = _widths(squares, means, rows, columns, channels)
        widths = torch.cat([by_row[alive_rows], by_column[alive]])
        history.append(float(widths.max() / widths.min().clamp(min=_LEAST)) if len(widths) else 1.0)
        if history[-1] <= min(history):
            best = (rows, columns)
        if sweep == sweeps or history[-1] < 1 + 1e-3:
            break
        rows = torch.where(alive_rows, rows * by_row, 1.0)
        _, by_column = _widths(squares, means, rows, columns, channels)
        columns = torch.where(alive, columns * by_column, 1.0)
    found = usable(centred(best[1], alive))
    return Dual(list(best[0].split([len(w) for w in weights])), found, tuple(history))


def _widths(
    squares: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, channels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The standard deviations of every row and of every channel of diag(1/rows) · W · diag(1/columns)."""
    m, n = squares.shape
    over_rows, over_columns = rows.reciprocal(), columns.reciprocal()[channels]
    row_mean = (values @ over_columns) * over_rows / n
    row_square = (squares @ over_columns.square()) * over_rows.square() / n
    column_mean = (over_rows @ values) * over_columns / m
    column_square = (over_rows.square() @ squares) * over_columns.square() / m
    by_row = (row_square - row_mean.square()).clamp(min=0).sqrt()
    # Columns that are one channel are seen as one long column.
    spread = reduce_columns(column_square, channels, len(columns), "mean")
    middle = reduce_columns(column_mean, channels, len(columns), "mean")
    return by_row.clamp(min=_LEAST), (spread - middle.square()).clamp(min=_LEAST**2).sqrt()


def imbalance(weight: torch.Tensor) -> float:
    """The largest standard deviation of a row or column over the least one."""
    widths = torch.cat([weight.float().std(0, correction=0), weight.float().std(1, correction=0)])
    return float(widths.max() / widths.min()) if float(widths.min()) > 0 else math.inf
