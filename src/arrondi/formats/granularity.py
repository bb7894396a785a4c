"""Granularity: which elements of a tensor share a scale.

Owns: the six small types and `tile_shape`, which turns one of them into the tile of elements under one scale.
The shape of a scale follows: every dimension is `ceil(size / tile)`, so the scale itself tells the granularity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from arrondi.arguments import check_fields
from arrondi.errors import ShapeError


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for every index of `axis`; for a weight (out, in), axis 0 is the output channel."""

    axis: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PerGroup:
    """One scale for `size` consecutive elements of the last axis; the last group may be shorter."""

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1:
            raise ShapeError(
                f"A group has at least one element, got group_size={self.size}. For one scale a row use 'channel'."
            )


@dataclass(frozen=True)
class PerBlock:
    """One scale for every tile of `rows` × `columns` of the last two axes."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1 or self.columns < 1:
            raise ShapeError(f"A block has at least one element, got {self.rows} × {self.columns}.")


@dataclass(frozen=True)
class PerRun:
    """One scale for about `size` elements that follow each other in memory: a part of a row, or as many whole rows as fit.

    Where rows divide the size, these are the blocks of the flattened tensor, as bitsandbytes cuts its block scales.
    """

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1:
            raise ShapeError(f"A run has at least one element, got {self.size}. Use 'tensor' for one scale in all.")


@dataclass(frozen=True)
class PerToken:
    """One scale for every position: the last axis shares it. Meant for activations, computed at run time."""


@dataclass(frozen=True)
class PerFlat:
    """One scale for every `size` elements of the flattened tensor, wherever rows end. Meant for scales that are quantized in turn."""

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1:
            raise ShapeError(f"A block has at least one element, got {self.size}. Use 'tensor' for one scale in all.")


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerRun | PerFlat | PerToken


def tile_shape(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The extent of one scale along every axis of a tensor of this shape.

    >>> tile_shape(PerGroup(32), (4, 96)), tile_shape(PerChannel(), (4, 96)), tile_shape(PerBlock(2, 32), (4, 96))
    ((1, 32), (1, 96), (2, 32))
    >>> tile_shape(PerRun(256), (4, 96)), tile_shape(PerRun(64), (4, 96))
    ((2, 96), (1, 64))
    >>> tile_shape(PerFlat(48), (4, 96)), tile_shape(PerFlat(256), (4, 96))
    ((1, 48), (256,))

    Returns:
        an extent for every axis; only one, of the flattened tensor, where blocks of that run across rows.

    Raises:
        ShapeError: the tensor has too few axes for this granularity.
    """
    if not shape and not isinstance(granularity, PerTensor):
        raise ShapeError(
            f"{granularity} needs a tensor with at least one axis, got a scalar. Use one scale for the tensor."
        )
    match granularity:
        case PerTensor():
            return shape
        case PerChannel(axis):
            if not -len(shape) <= axis < len(shape):
                raise ShapeError(f"The axis {axis} of the channels does not exist in shape {shape}.")
            return tuple(1 if i == axis % len(shape) else n for i, n in enumerate(shape))
        case PerToken():
            return (*(1 for _ in shape[:-1]), shape[-1])
        case PerGroup(size):
            return (*(1 for _ in shape[:-1]), min(size, max(shape[-1], 1)))
        case PerRun(size):
            columns = max(shape[-1], 1)
            if len(shape) == 1 or size <= columns:
                return (*(1 for _ in shape[:-1]), min(size, columns))
            return (*(1 for _ in shape[:-2]), min(size // columns, max(shape[-2], 1)), columns)
        case PerFlat(size):
            columns = max(shape[-1], 1)
            if size >= math.prod(shape):
                return shape
            if columns % size == 0 or (size % columns == 0 and len(shape) <= 2):
                return tile_shape(PerRun(size), shape)
            return (size,)
        case PerBlock(rows, columns):
            if len(shape) < 2:
                raise ShapeError(f"PerBlock needs two axes, got shape {shape}. Use groups of {columns} instead.")
            return (*(1 for _ in shape[:-2]), min(rows, max(shape[-2], 1)), min(columns, max(shape[-1], 1)))


def scale_shape(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a tensor of this shape: one entry for every tile, ragged last tiles included.

    Blocks that run across rows are a row of scales.

    >>> scale_shape(PerGroup(32), (4, 100)), scale_shape(PerTensor(), (4, 100))
    ((4, 4), (1, 1))
    """
    tile = tile_shape(granularity, shape)
    if len(tile) < len(shape):
        return (*(1 for _ in shape[:-1]), -(-math.prod(shape) // tile[0]))
    return tuple(-(-n // t) if t else 1 for n, t in zip(shape, tile, strict=True))
