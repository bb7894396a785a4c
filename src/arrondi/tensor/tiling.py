"""A tensor seen as rows of elements that share a scale.

Owns: `to_tiles` and `from_tiles`. Every granularity becomes the same two-dimensional problem: row i holds the elements of
scale i. Groups along the last axis and output channels are views; blocks and other axes are copied. A ragged last tile is
padded with its own elements over again, which changes no minimum or maximum and hardly a mean or an error, and cut off
again on the way back.
"""

from __future__ import annotations

import math

import torch


def to_tiles(x: torch.Tensor, tile: tuple[int, ...]) -> torch.Tensor:
    """`x` (any shape) → (number of tiles, elements of a tile), tiles in row-major order of the scale's shape."""
    if not x.ndim:
        return x.reshape(1, 1)
    if len(tile) < x.ndim:  # blocks of the flattened tensor
        x = x.reshape(-1)
    x = _pad(x, tile)
    if all(t == 1 for t in tile[:-1]) or tile == tuple(x.shape):
        return x.reshape(-1, math.prod(tile))
    lead = _full_suffix(tuple(x.shape), tile)
    if lead is not None:
        return x.reshape(-1, math.prod(tile[lead:]))
    split = [n for size, t in zip(x.shape, tile, strict=True) for n in (size // t, t)]
    order = [*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2)]
    return x.reshape(split).permute(order).reshape(-1, math.prod(tile))


def from_tiles(tiles: torch.Tensor, tile: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `to_tiles` for a tensor of `shape`; contiguous."""
    if not shape:
        return tiles.reshape(())
    if len(tile) < len(shape):
        return from_tiles(tiles, tile, (math.prod(shape),)).reshape(shape)
    counts = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
    padded = tuple(c * t for c, t in zip(counts, tile, strict=True))
    if all(t == 1 for t in tile[:-1]) or _full_suffix(padded, tile) is not None:
        whole = tiles.reshape(padded)
    else:
        n = len(shape)
        order = [axis for i in range(n) for axis in (i, n + i)]
        whole = tiles.reshape(*counts, *tile).permute(order).reshape(padded)
    for axis, size in enumerate(shape):
        whole = whole.narrow(axis, 0, size)
    return whole.contiguous()


def _full_suffix(shape: tuple[int, ...], tile: tuple[int, ...]) -> int | None:
    """Where the tile starts to cover whole axes, if it is one element thick before that: then tiles are contiguous."""
    for lead in range(len(shape)):
        if tile[lead:] == shape[lead:] and all(t == 1 for t in tile[:lead]):
            return lead
    return None


def _pad(x: torch.Tensor, tile: tuple[int, ...]) -> torch.Tensor:
    for axis, t in enumerate(tile):
        missing = -x.shape[axis] % t if t else 0
        if missing:
            width = t - missing
            again = x.shape[axis] - width + torch.arange(missing, device=x.device) % width
            x = torch.cat([x, x.index_select(axis, again)], dim=axis)
    return x
