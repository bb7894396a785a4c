"""Grids for what GPTQ's sweep had to round, and another sweep with them: `reswept`.

What earlier columns leave to a column moves it away from the weights for which its grid was chosen. The loss of a sweep is
½ Σ V[c,c]² (due - value)², with V the root factor and `due` the column as it was to be rounded: so the grids that suit a sweep are
those of the dues, weighed by V[c,c]². With them the dues are others again; every row keeps its best sweep.

Ours; the same alternation for learned tables is in `arrondi.rounding.kmeans`.
"""

from __future__ import annotations

import torch

from arrondi.formats import Scheme
from arrondi.formats.scheme import PLAIN
from arrondi.rounding.gptq_grids import ColumnGrids
from arrondi.rounding.gptq_sweep import sweep
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.superblocks import is_superblock
from arrondi.tensor.rows import pick_rows, rowwise


def resweeps(scheme: Scheme) -> bool:
    """Whether the rows of a scheme are rounded by themselves, with scales or units of scales that can be chosen freely."""
    plain = not isinstance(scheme.scale, Scheme) and scheme.scale in PLAIN
    return rowwise(scheme) and (plain or is_superblock(scheme))


def reswept(
    q: QTensor, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, block: int, times: int, name: str
) -> QTensor:
    """The same weight after further sweeps; no row's loss is larger.

    Args:
        q: (m, n), of a sweep with grids fixed beforehand, of a scheme that `resweeps`.
        weight: (m, n) float32 or float64, what was rounded.
        factor: V (n, n), upper triangular, in the order of the visit.
        order: (n,), the columns in that order.
        block: columns between two updates of the far columns; changes speed, not results.
        times: further sweeps.
    """
    shares = torch.empty_like(factor.diagonal())
    shares[order] = factor.diagonal().square()
    shares /= shares.mean()
    dues, best = _dues(q, weight, factor, order)
    for _ in range(times):
        grids = ColumnGrids(dues, q.scheme, "importance", 2.0, "static", order, name, shares, magnitude=False)
        codes, _ = sweep(weight, factor, grids, block, order)
        last = grids.assemble(codes)
        dues, loss = _dues(last, weight, factor, order)
        q, best = pick_rows(last, q, loss < best), torch.minimum(loss, best)
    return q


def _dues(
    q: QTensor, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every column was to be rounded as (m, n), and the loss of every row (m,), of a sweep that gave q."""
    values = q.dequantize().to(weight)
    residuals = (weight - values)[:, order] @ factor
    dues = torch.empty_like(weight)
    dues[:, order] = values[:, order] + residuals / factor.diagonal()
    return dues, residuals.square().sum(1)
