"""Tiles: the elements under every scale, gathered in the test by plain index arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from arrondi.formats import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, scale_shape, tile_shape
from arrondi.tensor.tiling import from_tiles, to_tiles

CASES: list[tuple[Granularity, tuple[int, ...]]] = [
    (PerTensor(), ()),
    (PerTensor(), (5,)),
    (PerTensor(), (3, 4)),
    (PerTensor(), (2, 3, 4)),
    (PerChannel(), (3, 4)),
    (PerChannel(1), (3, 4)),
    (PerChannel(), (4, 3, 2, 2)),
    (PerChannel(1), (4, 3, 2, 2)),
    (PerChannel(-1), (4, 3, 2)),
    (PerChannel(), (4, 1)),
    (PerChannel(1), (1, 4)),
    (PerToken(), (2, 3, 4)),
    (PerGroup(2), (3, 8)),
    (PerGroup(3), (3, 8)),
    (PerGroup(5), (7,)),
    (PerGroup(100), (3, 8)),
    (PerGroup(1), (3, 1)),
    (PerBlock(2, 4), (4, 8)),
    (PerBlock(2, 4), (5, 10)),
    (PerBlock(3, 3), (2, 7)),
    (PerBlock(2, 3), (2, 5, 7)),
    (PerBlock(1, 4), (3, 8)),
    (PerBlock(4, 8), (4, 8)),
]
IDS = [f"{g}-{s}" for g, s in CASES]


def elements_of(granularity: Granularity, shape: tuple[int, ...]) -> list[list[int]]:
    """For every scale in row-major order, the flat positions of its elements in row-major order."""
    tile = tile_shape(granularity, shape)
    counts = scale_shape(granularity, shape)
    positions = torch.arange(math.prod(shape)).reshape(shape)
    return [
        positions[tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, tile, strict=True))].flatten().tolist()
        for index in itertools.product(*(range(n) for n in counts))
    ]


@pytest.mark.parametrize(("granularity", "shape"), CASES, ids=IDS)
def test_row_i_holds_the_elements_of_scale_i_and_nothing_else(granularity: Granularity, shape: tuple[int, ...]) -> None:
    tile = tile_shape(granularity, shape)
    x = torch.arange(math.prod(shape)).reshape(shape)
    tiles = to_tiles(x, tile)
    wanted = elements_of(granularity, shape)
    assert tiles.shape == (len(wanted), math.prod(tile))
    for row, elements in zip(tiles.tolist(), wanted, strict=True):
        assert set(row) == set(elements)
        if len(elements) == len(row):
            assert row == elements


@pytest.mark.parametrize(("granularity", "shape"), CASES, ids=IDS)
def test_tiles_come_back(granularity: Granularity, shape: tuple[int, ...]) -> None:
    tile = tile_shape(granularity, shape)
    x = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    back = from_tiles(to_tiles(x, tile), tile, shape)
    assert torch.equal(back, x)
    assert back.is_contiguous()


@pytest.mark.parametrize(("granularity", "shape"), CASES, ids=IDS)
def test_the_strides_of_the_input_do_not_matter(granularity: Granularity, shape: tuple[int, ...]) -> None:
    tile = tile_shape(granularity, shape)
    x = torch.arange(math.prod(shape)).reshape(shape)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    backwards = tuple(reversed(range(x.ndim)))
    reversed_strides = x.permute(backwards).contiguous().permute(backwards)
    for other in (strided, reversed_strides):
        assert torch.equal(to_tiles(other, tile), to_tiles(x, tile))


@pytest.mark.parametrize("width", range(1, 9))
def test_a_ragged_group_is_padded_evenly_with_its_own_elements(width: int) -> None:
    # Means and errors of the padded tile then weigh every element alike, up to one repetition.
    x = torch.arange(8 + width, dtype=torch.float32)[None]
    last = to_tiles(x, (1, 8))[1].tolist()
    assert last[:width] == list(range(8, 8 + width))
    counts = [last.count(v) for v in range(8, 8 + width)]
    assert sum(counts) == 8
    assert max(counts) - min(counts) <= 1


def test_groups_and_rows_are_views() -> None:
    x = torch.zeros(4, 8)
    for granularity in (PerGroup(2), PerChannel(), PerTensor(), PerToken()):
        assert to_tiles(x, tile_shape(granularity, (4, 8))).data_ptr() == x.data_ptr()
