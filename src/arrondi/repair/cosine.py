"""Scales of a layer's weights and of its input, by the cosine of what it gives: `best_weight_scales` and `best_input_scale`.

Cosines see no magnitude: where the best one comes with a length that is off by more than two per cent, the squared error decides.

Source: Wu et al. 2020, arXiv:2006.16669 (EasyQuant).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from arrondi.repair.layer import LayerRows, product

Tensor = torch.Tensor

_LENGTH = 0.02


def codes_at(weight: Tensor, scale: Tensor, most: int) -> Tensor:
    """The nearest codes, from -most to most."""
    return (weight / scale).round().clamp(-most, most)


def best_weight_scales(
    weight: Tensor, rows: LayerRows, scale: Tensor, most: int, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """For every output the scale with which it is most like what is wanted.

    Args:
        weight: (outputs, K).
        rows: what is multiplied, rounded, and what is wanted, without the bias.
        scale: (outputs, 1), around which is looked.
        most: largest code.
        shares: scales that are tried are `scale` over these.

    Returns:
        (outputs, 1), and the cosine of every output.
    """
    groups, outputs = rows.x.shape[1], len(weight)
    gram = torch.einsum("ngk,ngl->gkl", rows.x, rows.x)
    cross = torch.einsum("ngo,ngk->gok", rows.y.reshape(len(rows), groups, -1), rows.x).reshape(weight.shape)
    length = rows.y.square().sum(0)
    cosines, losses = [], []
    for share in shares.tolist():
        tried = scale / share
        w = codes_at(weight, tried, most) * tried
        own = w.reshape(groups, outputs // groups, -1)
        inner = (cross * w).sum(1)
        square = (torch.bmm(own, gram) * own).sum(2).reshape(-1)
        cosines.append(inner / (square * length).sqrt().clamp(min=1e-30))
        losses.append((square - 2 * inner + length) / length.clamp(min=1e-30))
    cosine, loss = torch.stack(cosines), torch.stack(losses)
    best = cosine.argmax(0)
    # |ô|² follows of the loss and the cosine; only its distance from |o|² matters.
    picked = loss.gather(0, best[None])[0] - 2 + 2 * cosine.gather(0, best[None])[0]
    off = picked.abs() > 2 * _LENGTH
    best = torch.where(off, loss.argmin(0), best)
    return scale / shares[best][:, None], cosine.gather(0, best[None])[0]


def best_input_scale(
    rows: LayerRows, weight: Tensor, rounds: Callable[[Tensor, float], Tensor], shares: Tensor
) -> tuple[float, float]:
    """The share by which the scale of the input is divided, and the cosine of what the layer then gives.

    Args:
        rows: what is multiplied, not yet rounded, and what is wanted, without the bias.
        weight: (outputs, K), rounded.
        rounds: (x, share) → x rounded with its scale over this share.
    """
    length, found = rows.y.norm(), []
    for share in shares.tolist():
        given = product(rounds(rows.x, share), weight)
        cosine = float((given * rows.y).sum() / (given.norm() * length).clamp(min=1e-30))
        found.append((cosine, float((given - rows.y).norm()), float(given.norm() / length.clamp(min=1e-30)), share))
    best = max(found)
    if abs(best[2] - 1) > _LENGTH:
        best = min(found, key=lambda one: one[1])
    return best[3], best[0]
