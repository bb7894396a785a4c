"""Searched grids: against a dense search by hand, for every kind of scale, ragged and weighted."""

from __future__ import annotations

import inspect

import pytest
import torch

from arrondi.formats import (
    FORMATS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    scale_shape,
    tile_shape,
)
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.search import on_grid, search_grid
from arrondi.tensor.tiling import to_tiles
from tests.cases import each_once

INT4 = FORMATS["int4"]
POWER = inspect.signature(search_grid).parameters["power"].default
SCHEMES = {
    "int4-g16": Scheme(INT4, PerGroup(16)),
    "int3-ragged-asym": Scheme(FORMATS["int3"], PerGroup(32), "integer"),
    "uint4-g16-offset": Scheme(FORMATS["uint4"], PerGroup(16), "float"),
    "int4-channel-bf16": Scheme(INT4, PerChannel(), scale="bfloat16"),
    "int4-axis1": Scheme(INT4, PerChannel(1)),
    "int4-tensor": Scheme(INT4, PerTensor()),
    "int4-block": Scheme(INT4, PerBlock(5, 16), "integer"),
    "mxfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale="e8m0"),
    "fp8-channel": Scheme(FORMATS["fp8_e4m3"], PerChannel()),
    "nvfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale=Scheme(FORMATS["fp8_e4m3"], PerTensor())),
    "nf4": Scheme(FORMATS["nf4"], PerGroup(16)),
    "nf4-offset": Scheme(FORMATS["nf4"], PerGroup(16), "float", offset="float16"),
    "int4-unsigned": Scheme(INT4, PerGroup(16), signed=False),
    "ternary": Scheme(FORMATS["ternary"], PerChannel()),
}


def heavy(m: int = 24, n: int = 80, seed: int = 0) -> torch.Tensor:
    """Weights with a heavy tail, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.exp(0.5 * torch.randn(m, n, generator=generator))


def tile_errors(
    weight: torch.Tensor, back: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float
) -> torch.Tensor:
    error = (weight - back).abs().double().pow(power)
    return to_tiles(
        error if importance is None else error * importance, tile_shape(scheme.granularity, tuple(weight.shape))
    ).sum(1)


def by_hand(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float, factors: torch.Tensor
) -> torch.Tensor:
    """The least error of every tile over factors on its range and, for lopsided formats, both signs of the scale."""
    mirrored = scheme.symmetric and scheme.signed_scales and str(scheme.format) in ("int4", "nf4")
    best = torch.tensor(torch.inf, dtype=torch.float64)
    for factor in factors.tolist():
        q = quantize_tensor(weight, scheme, shrink=factor)
        tried = [q]
        if mirrored:
            tried.append(quantize_with(weight, scheme, Grid(-q.real_scale)))
        for each in tried:
            best = torch.minimum(best, tile_errors(weight, each.dequantize(), scheme, importance, power))
    return best


@pytest.mark.parametrize(
    ("name", "weighted", "power"),
    each_once(
        [n for n in SCHEMES if n not in ("nvfp4", "mxfp4", "int3-ragged-asym")], [False, True], [1.0, 2.0, POWER]
    ),
)
def test_a_searched_range_is_about_the_best_there_is(name: str, weighted: bool, power: float) -> None:
    scheme, weight = SCHEMES[name], heavy()
    loudness = torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.01
    importance = loudness if weighted else None
    back = quantize_with(weight, scheme, search_grid(weight, scheme, importance, power=power)).dequantize()
    ours = tile_errors(weight, back, scheme, importance, power)
    dense = by_hand(weight, scheme, importance, power, torch.linspace(1.0, 0.4, 121))
    assert bool((ours <= by_hand(weight, scheme, importance, power, torch.tensor([1.0])) * (1 + 1e-5)).all()), (
        "never worse"
    )
    # Errors jump as codes flip, so a search of a few factors misses some of what 121 find.
    assert float(ours.sum()) <= 1.05 * float(dense.sum())
    assert float((ours <= 1.25 * dense).double().mean()) > 0.9
    assert float((ours < 0.8 * dense).double().mean()) < 0.02, "nothing is much better than what was tried by hand"


@pytest.mark.parametrize("name", ["int4-g16", "nf4", "int4-unsigned", "ternary", "fp8-channel"])
def test_the_mirror_image_is_tried_where_it_is_another_grid(name: str) -> None:
    negative = bool((search_grid(heavy(), SCHEMES[name]).scale < 0).any())
    assert negative == (name in ("int4-g16", "nf4"))


def test_power_of_two_scales_try_their_two_neighbours() -> None:
    scheme, weight = SCHEMES["mxfp4"], heavy()
    grid = search_grid(weight, scheme, power=2.0)
    codes = encode(grid.scale, FORMATS["e8m0"])
    assert torch.equal(decode(codes, FORMATS["e8m0"]), grid.scale), "still powers of two"
    best = quantize_tensor(weight, scheme, rule="best")
    ours = quantize_with(weight, scheme, grid).dequantize()
    assert torch.equal(
        tile_errors(weight, ours, scheme, None, 2.0), tile_errors(weight, best.dequantize(), scheme, None, 2.0)
    )


def test_the_grid_has_one_entry_for_every_tile() -> None:
    weight = heavy(7, 50)
    for scheme in SCHEMES.values():
        grid = search_grid(weight, scheme)
        tiles = torch.Size(scale_shape(scheme.granularity, (7, 50))).numel()
        assert grid.scale.shape == (tiles, 1)
        assert (grid.zero_point is not None) == (scheme.zero_point == "integer")
        assert (grid.offset is not None) == (scheme.zero_point == "float")


@pytest.mark.parametrize("name", SCHEMES)
def test_large_weights_are_searched_in_chunks_that_cannot_be_seen(name: str) -> None:
    if isinstance(SCHEMES[name].granularity, (PerTensor, PerBlock)) or name in ("int4-axis1", "nvfp4"):
        scheme, weight = Scheme(INT4, PerGroup(16)), heavy(300, 1024)
    else:
        scheme, weight = SCHEMES[name], heavy(300, 1024)
    whole = search_grid(weight, scheme).scale.reshape(300, -1)
    for row in (0, 131, 299):
        assert torch.equal(search_grid(weight[row : row + 1], scheme).scale.flatten(), whole[row])


@pytest.mark.parametrize("name", SCHEMES)
def test_trial_values_are_those_that_will_be_read_back(name: str) -> None:
    scheme, weight = SCHEMES[name], heavy()
    q = quantize_tensor(weight, scheme)
    tile = tile_shape(scheme.granularity, q.shape)
    tried = on_grid(to_tiles(weight, tile), scheme, q.grid.reshape(-1, 1))
    torch.testing.assert_close(tried, to_tiles(q.dequantize(), tile), rtol=1e-6, atol=1e-6)
