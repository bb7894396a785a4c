"""Weights that a file keeps as (in, out): Conv1D of GPT-2.

Owns: `stored_form`, `stored_forms`, `original_form` and `transpose`. The package multiplies nothing itself, it only restores matrices of whatever shape, and its blocks
may have one column: groups of g inputs of one output are blocks of g × 1 in the turned matrix, and an output channel is a block of
all rows. transformers loads that with `dequantize`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from arrondi.checkpoint.layouts.layout import Placed
from arrondi.formats import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from arrondi.tensor.qtensor import QTensor


def stored_form(placed: Placed, channel_rows: int = 0) -> Placed:
    """The layer as the file sees it: its own orientation, and the granularity turned with it.

    Output channels become blocks of at least `channel_rows` rows, so that layers of several heights can be said by one scheme.
    """
    if not placed.transposed:
        return placed
    weights = placed.scheme.weights
    rows = max(channel_rows, placed.matrix_shape[1])
    turned = replace(weights, granularity=_turned(weights.granularity, rows))
    return replace(placed, scheme=replace(placed.scheme, weights=turned), transposed=False)


def original_form(placed: Placed) -> Placed:
    """The inverse of `stored_form`: blocks of one column are groups or channels of the turned matrix."""
    weights = placed.scheme.weights
    granularity = weights.granularity
    if isinstance(granularity, PerBlock):
        rows, columns = granularity.rows, granularity.columns
        granularity = (
            PerBlock(columns, rows) if columns != 1 else PerChannel() if rows >= placed.shape[0] else PerGroup(rows)
        )
    scheme = replace(placed.scheme, weights=replace(weights, granularity=granularity))
    return replace(placed, scheme=scheme, transposed=True, kind="Conv1D")


def transpose(q: QTensor, scheme: Scheme) -> QTensor:
    """The transposed tensor, whose scheme is `scheme`; its scales are not quantized in turn."""
    assert isinstance(q.scale, torch.Tensor)
    zero = None if q.zero_point is None else q.zero_point.T.contiguous()
    return QTensor(q.codes.T.contiguous(), q.scale.T.contiguous(), zero, None, scheme)


def stored_forms(placed: list[Placed]) -> list[Placed]:
    """All layers as the file sees them, output channels said alike."""
    heights = [p.matrix_shape[1] for p in placed if p.transposed]
    return [stored_form(p, max(heights, default=0)) for p in placed]


def _turned(granularity: Granularity, channel_rows: int) -> Granularity:
    match granularity:
        case PerTensor():
            return granularity
        case PerGroup(size):
            return PerBlock(size, 1)
        case PerBlock(rows, columns):
            return PerBlock(columns, rows)
    return PerBlock(channel_rows, 1)
