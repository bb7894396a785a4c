"""Which elements share a scale: shapes worked by hand."""

from __future__ import annotations

import pytest

from arrondi.errors import ShapeError
from arrondi.formats import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, scale_shape, tile_shape

CASES: list[tuple[Granularity, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    (PerTensor(), (4, 96), (4, 96), (1, 1)),
    (PerTensor(), (), (), ()),
    (PerTensor(), (7,), (7,), (1,)),
    (PerChannel(), (4, 96), (1, 96), (4, 1)),
    (PerChannel(1), (4, 96), (4, 1), (1, 96)),
    (PerChannel(-1), (4, 96), (4, 1), (1, 96)),
    (PerChannel(), (8, 3, 5, 5), (1, 3, 5, 5), (8, 1, 1, 1)),
    (PerChannel(1), (8, 3, 5, 5), (8, 1, 5, 5), (1, 3, 1, 1)),
    (PerGroup(32), (4, 96), (1, 32), (4, 3)),
    (PerGroup(32), (4, 100), (1, 32), (4, 4)),
    (PerGroup(32), (4, 20), (1, 20), (4, 1)),
    (PerGroup(1), (4, 5), (1, 1), (4, 5)),
    (PerGroup(8), (2, 3, 16), (1, 1, 8), (2, 3, 2)),
    (PerGroup(8), (20,), (8,), (3,)),
    (PerToken(), (2, 7, 64), (1, 1, 64), (2, 7, 1)),
    (PerToken(), (64,), (64,), (1,)),
    (PerBlock(128, 128), (256, 384), (128, 128), (2, 3)),
    (PerBlock(128, 128), (200, 300), (128, 128), (2, 3)),
    (PerBlock(2, 8), (3, 5, 20), (1, 2, 8), (3, 3, 3)),
    (PerBlock(8, 8), (3, 20), (3, 8), (1, 3)),
    (PerChannel(), (0, 8), (1, 8), (0, 1)),
    (PerGroup(4), (3, 0), (1, 1), (3, 0)),
    (PerTensor(), (0, 8), (0, 8), (1, 1)),
]


@pytest.mark.parametrize(("granularity", "shape", "tile", "scale"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_tile_and_scale_shapes(
    granularity: Granularity, shape: tuple[int, ...], tile: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    assert tile_shape(granularity, shape) == tile
    assert scale_shape(granularity, shape) == scale


@pytest.mark.parametrize(
    ("granularity", "shape", "words"),
    [
        (PerChannel(2), (4, 8), "does not exist in shape"),
        (PerChannel(-3), (4, 8), "does not exist in shape"),
        (PerBlock(2, 2), (8,), "needs two axes"),
        (PerChannel(), (), "got a scalar. Use one scale"),
        (PerGroup(4), (), "got a scalar"),
        (PerToken(), (), "got a scalar"),
    ],
)
def test_a_granularity_that_does_not_fit_the_shape(
    granularity: Granularity, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        tile_shape(granularity, shape)


@pytest.mark.parametrize("size", [0, -1])
def test_groups_and_blocks_are_not_empty(size: int) -> None:
    with pytest.raises(ShapeError, match=f"group_size={size}"):
        PerGroup(size)
    with pytest.raises(ShapeError, match="at least one element"):
        PerBlock(size, 8)
    with pytest.raises(ShapeError, match="at least one element"):
        PerBlock(8, size)
