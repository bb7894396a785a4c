"""Ranges by the layer's output: what it minimises, against plain loops."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import parse_scheme, tile_shape
from arrondi.rounding.awq import awq
from arrondi.rounding.rtn import rtn
from arrondi.tensor.nearest import quantize_tensor


def case(m: int = 6, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, SecondMoment]:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(300, n, generator=draw) @ torch.randn(n, n, generator=draw) + torch.randn(n, generator=draw)
    moment = SecondMoment(n)
    moment.update(mixed)
    return torch.randn(m, n, generator=draw) ** 3, moment


def by_tile(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """The error of every tile, row by row and group by group."""
    m, n = weight.shape
    lost = weight - restored
    found = torch.zeros(-(-m // tile[0]), -(-n // tile[1]))
    for i in range(m):
        for g in range(found.shape[1]):
            own = slice(g * tile[1], min((g + 1) * tile[1], n))
            found[i // tile[0], g] += lost[i, own] @ hessian[own, own] @ lost[i, own]
    return found


@pytest.mark.parametrize("name", ["w=uint4/g16/asym", "w=int3/g16", "w=int4/channel", "w=int4/tensor", "w=fp4/b4x16"])
def test_every_tile_takes_the_best_of_the_ranges(name: str) -> None:
    weight, moment = case()
    scheme, hessian = parse_scheme(name).weights, moment.matrix()
    tile = tile_shape(scheme.granularity, (6, 40))
    assert len(tile) == 2
    found = by_tile(weight, awq(weight, scheme, moment).dequantize(), hessian, tile)
    tried = [by_tile(weight, quantize_tensor(weight, scheme, shrink=1 - k / 20).dequantize(), hessian, tile) for k in range(10)]  # fmt: skip
    best = torch.stack(tried).amin(0)
    # A format that is not the same seen from the other side has mirrored grids as well.
    assert bool((found <= best * (1 + 1e-3)).all())
    if not scheme.symmetric or "fp4" in name:
        assert torch.allclose(found, best, rtol=1e-3)
    assert float(found.sum()) < float(tried[0].sum()), "and better than the widest"


def test_it_beats_the_nearest_codes_of_the_widest_range_on_the_whole_output() -> None:
    weight, moment = case(32, 64, 1)
    scheme, hessian = parse_scheme("w=int3/g32").weights, moment.matrix()
    errors = []
    for q in (rtn(weight, scheme, range="absmax"), awq(weight, scheme, moment)):
        lost = weight - q.dequantize()
        errors.append(float(((lost @ hessian) * lost).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_bad_input() -> None:
    weight, moment = case()
    with pytest.raises(DataError, match="second moment"):
        awq(weight, "w=int4/g16")
    with pytest.raises(ShapeError, match="40 inputs, the weight has 39"):
        awq(weight[:, :39], "w=int4/channel", moment)
    with pytest.raises(SchemeError, match="grid"):
        awq(weight, "w=int4/g16", moment, grid=1)
    with pytest.raises(SchemeError, match="shrink"):
        awq(weight, "w=int4/g16", moment, shrink=1.5)
