"""Codes and scales that a method has chosen, made better within their format: `refined`.

Owns: two moves that never raise the layer's output error tr(D H Dᵀ), D = W - Ŵ, and their repetition.

    scales    with the codes fixed, the error of a row is a quadratic function of the row's scales, whose minimum is one small
              linear system; scales are then rounded to their storage
    codes     column by column: with all other columns fixed, the best value of one is known, and its nearest code is taken

GPTQ rounds a column once, knowing what comes before it; here a column is rounded again, knowing all others. A row keeps a move only if its error
falls, so the result is never worse than what was given.

Sources: the cyclic pass over columns is that of Behdin et al. 2023, arXiv:2309.01885 (QuantEase), and Nair and Suggala 2024,
arXiv:2406.17542; refitting scales to codes is the least-squares step of alternating quantizers.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from arrondi.calibration import SecondMoment
from arrondi.formats import PerChannel, PerGroup, Scheme
from arrondi.formats.scheme import PLAIN
from arrondi.rounding.gptq_sweep import column_codes, column_values
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid, round_scale
from arrondi.tensor.tables import table_of_row

_BLOCK = 128
"""Columns between two updates of the columns outside."""
_RIDGE = 1e-6
"""Of the largest diagonal entry of a row's system, added to all: a group whose codes are all zero keeps its scale."""


def refined(q: QTensor, weight: torch.Tensor, hessian: torch.Tensor, rounds: int = 2) -> QTensor:
    """The same weight with other codes and scales, and an output error that is no larger in any row.

    Args:
        q: (m, n), one group a row or contiguous groups; anything else is given back as it is. Scales that are powers of two, or are
            quantized in turn, stay.
        weight: (m, n) float32, what q stands for.
        hessian: (n, n) float32, symmetric and positive definite: Σ x xᵀ, damped.
        rounds: how often both moves are made.
    """
    if not _width(q) or q.group_index is not None:
        return q
    for _ in range(rounds):
        before = q
        q = _better(q, _refit(q, weight, hessian), weight, hessian)
        q = _better(q, _recode(q, weight, hessian), weight, hessian)
        if q is before:
            break
    return q


def damped(moment: SecondMoment, damping: float) -> torch.Tensor:
    """H + λI, float32 (n, n), positive definite; λ as a fraction of the mean diagonal of H."""
    hessian = moment.matrix()
    hessian.diagonal().add_(damping * float(moment.diagonal().mean())).clamp_(min=torch.finfo(torch.float32).tiny)
    return hessian


def row_losses(q: QTensor, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """d H dᵀ of every row, float32 (m,)."""
    d = weight - q.dequantize()
    return ((d @ hessian) * d).sum(1)


def _better(old: QTensor, new: QTensor, weight: torch.Tensor, hessian: torch.Tensor) -> QTensor:
    """Every row from where its error is smaller."""
    if new is old:
        return old
    falls = row_losses(new, weight, hessian) < row_losses(old, weight, hessian)
    if not bool(falls.any()):
        return old
    pick = falls.unsqueeze(1)
    codes = torch.where(pick, new.codes, old.codes)
    if isinstance(old.scale, QTensor) or isinstance(new.scale, QTensor):
        return replace(old, codes=codes)
    return replace(old, codes=codes, scale=torch.where(pick, new.scale, old.scale))


def _width(q: QTensor) -> int:
    """Columns that share a scale, 0 where rows share scales."""
    match q.scheme.granularity:
        case PerGroup(size):
            return size
        case PerChannel(0):
            return q.shape[1]
    return 0


def _refit(q: QTensor, weight: torch.Tensor, hessian: torch.Tensor) -> QTensor:
    """The best scales for the codes."""
    width, n, scale = _width(q), q.shape[1], q.scale
    if isinstance(scale, QTensor) or isinstance(q.scheme.scale, Scheme) or q.scheme.scale not in PLAIN or n % width:
        return q
    units = (q.dequantize() - _wide(q.real_offset, n)) / _wide(scale, n)
    groups = n // width
    pull = _sums(units * ((weight - q.dequantize()) @ hessian), groups)
    system = weight.new_empty((len(weight), groups, groups))
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        system[:, g] = _sums((units[:, columns] @ hessian[columns]) * units, groups)
    ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-30)
    system.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    moved, failed = torch.linalg.solve_ex(system, pull.unsqueeze(2))
    found = scale + moved.squeeze(2)
    usable = torch.isfinite(found).all(1) & (failed == 0) & (found != 0).all(1)
    if not q.scheme.signed_scales:
        usable &= (found > 0).all(1)
    found = torch.where(usable.unsqueeze(1), found, scale)
    return replace(q, scale=round_scale(found, q.scheme.scale))


def _sums(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums over the columns of each group, (m, groups)."""
    return x.reshape(len(x), groups, -1).sum(2)


def _wide(parts: torch.Tensor | None, n: int) -> torch.Tensor | float:
    """One entry for every column of n, from one for every group."""
    return 0.0 if parts is None else parts.repeat_interleave(n // parts.shape[1], 1)


def _recode(q: QTensor, weight: torch.Tensor, hessian: torch.Tensor) -> QTensor:
    """One pass over the columns."""
    width, (m, n) = _width(q), q.shape
    codes, now = q.codes.clone(), q.dequantize().T.contiguous()  # (n, m): a column is a contiguous row
    diagonal = hessian.diagonal().tolist()
    slope = (weight - q.dequantize()) @ hessian
    slope = slope.T.contiguous()
    scale, offset = q.real_scale.T.contiguous(), None if q.real_offset is None else q.real_offset.T.contiguous()
    zero = None if q.zero_point is None else q.zero_point.T.contiguous()
    tables = None
    if q.table is not None and q.scheme.table is not None:
        tables = q.table[table_of_row(q.scheme.table, m, q.table.device)]
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        moved = now.new_zeros((stop - start, m))
        for c in range(start, stop):
            g = c // width
            grid = Grid(scale[g], None if zero is None else zero[g], None if offset is None else offset[g])
            chosen = column_codes(now[c] + slope[c] / diagonal[c], grid, q.scheme.format, tables)
            value = column_values(chosen, grid, q.scheme.format, tables)
            moved[c - start] = now[c] - value
            now[c] = value
            codes[:, c] = chosen
            slope[start:stop].addcmul_(hessian[start:stop, c, None], moved[c - start])
        if start:
            slope[:start] += hessian[:start, start:stop] @ moved
        if stop < n:
            slope[stop:] += hessian[stop:, start:stop] @ moved
    return replace(q, codes=codes)
