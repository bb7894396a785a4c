"""Channels of a producer, and the columns of its consumers.

A scale s has one entry for every channel of what a producer makes: the producer is divided by it, and column j of every consumer is
multiplied by s[channels[j]]. Where queries share keys and values (grouped-query attention) several columns are one channel.

Owns: `reduce_columns`, `usable` and `centred`.
"""

from __future__ import annotations

from typing import Final, Literal

import torch

LARGEST: Final = 1e4
"""No scale is further from 1 than this, or its inverse."""


def reduce_columns(
    values: torch.Tensor, channels: torch.Tensor, count: int, how: Literal["amax", "mean"]
) -> torch.Tensor:
    """One number for every channel from one for every column.

    Args:
        values: (n,) float.
        channels: (n,) int64, which channel each column is.
        count: channels of the producer.
        how: of the columns that are one channel the largest number, or the mean.

    Returns:
        (count,), 0 where no column is that channel.
    """
    return values.new_zeros(count).scatter_reduce(0, channels, values, how, include_self=False)


def usable(scale: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
    """A scale that can be folded: finite and positive, 1 for channels that are not alive."""
    good = torch.isfinite(scale) & (scale > 0)
    good = good if alive is None else good & alive
    return torch.where(good, scale, 1.0).clamp(1 / LARGEST, LARGEST)


def centred(scale: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
    """The same scale with its least and largest entry equally far from 1, by ratio; what is not alive is 1.

    A common factor is free, and near 1 nothing overflows.
    """
    some = scale if alive is None else scale[alive]
    if not len(some):
        return torch.ones_like(scale)
    middle = scale / (some.max() * some.min()).sqrt()
    return middle if alive is None else torch.where(alive, middle, 1.0)
