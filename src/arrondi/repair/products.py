"""How alike two outputs of a product are, by four measures that a search for scales can follow.

Shapes are those of the output: samples first. Every measure is better when larger.

Sources: Yuan et al. 2022, arXiv:2111.12293 (PTQ4ViT: squared errors weighted by the squared gradient of the loss); Liu et al. 2021,
arXiv:2106.14156 (the correlation of outputs, and the order of attention scores).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

_LEAST = 1e-30
_LENGTH: float = 0.02
"""By so much an output may be too long or too short, which correlations do not see."""
MARGIN = 0.2
"""Of a row's deviation: by how much two scores stay apart."""
ROWS = 64
"""Rows of attention that are looked at."""


def weighted(o: Tensor, given: Tensor, slope: Tensor, axis: int | None = None) -> Tensor:
    """-Σ (g (o - ô))², of everything or of every channel along an axis."""
    found = -((o - given) * slope).square()
    return found.sum() if axis is None else found.movedim(axis, 0).flatten(1).sum(1)


def correlation(o: Tensor, given: Tensor, axis: int | None = None) -> Tensor:
    """Pearson's, the mean over samples, or of every channel along an axis; less what a wrong length beyond two per cent adds."""
    rows = (o.flatten(1), given.flatten(1)) if axis is None else (t.movedim(axis, 0).flatten(1) for t in (o, given))
    wanted, found = (r - r.mean(1, keepdim=True) for r in rows)
    lengths = wanted.norm(dim=1), found.norm(dim=1)
    alike = (wanted * found).sum(1) / (lengths[0] * lengths[1]).clamp(min=_LEAST)
    off = (lengths[1] / lengths[0].clamp(min=_LEAST) - 1).abs()
    scores = alike - (off - _LENGTH).clamp(min=0)
    return scores.mean() if axis is None else scores


def disorder(scores: Tensor, given: Tensor, margin: float = MARGIN, rows: int = ROWS) -> Tensor:
    """The ranking loss: by how much, on average, pairs of a row lack the margin in their true order; ties are left out.

    Args:
        scores, given: (..., w), in floating point and with rounded operands.
        margin: in deviations of the row.
        rows: that are looked at, at most, evenly spread.
    """
    flat, other = (t.reshape(-1, t.shape[-1]) for t in (scores, given))
    picked = torch.linspace(0, len(flat) - 1, min(rows, len(flat))).long()
    a, b = flat[picked], other[picked]
    signs = (a[:, :, None] - a[:, None, :]).sign()
    wanted = margin * a.std(1, correction=0)[:, None, None]
    lacking = (wanted - (b[:, :, None] - b[:, None, :]) * signs).clamp(min=0) * signs.abs()
    return lacking.sum() / signs.abs().sum().clamp(min=1)
