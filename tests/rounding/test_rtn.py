"""Round to nearest with the widest range and with a searched one."""

from __future__ import annotations

import itertools

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.encoding import decode, encode
from arrondi.errors import DataError, SchemeError
from arrondi.fitting import Grid
from arrondi.formats import (
    FORMATS,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    integer,
    scale_shape,
    tile_shape,
)
from arrondi.qtensor import quantize
from arrondi.rounding import rtn, search_grid
from arrondi.rounding.grid_search import on_grid
from arrondi.tiling import to_tiles

INT4 = FORMATS["int4"]
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
    "ternary": Scheme(FORMATS["ternary"], PerChannel()),
}


def heavy(m: int = 24, n: int = 80, seed: int = 0) -> torch.Tensor:
    """Weights with a heavy tail, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.exp(0.5 * torch.randn(m, n, generator=generator))


def moment_of(power: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(len(power))
    moment.update(torch.diag(power.sqrt()))
    return moment


def tile_errors(
    weight: torch.Tensor, back: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float
) -> torch.Tensor:
    error = (weight - back).abs().double().pow(power)
    return to_tiles(
        error if importance is None else error * importance, tile_shape(scheme.granularity, tuple(weight.shape))
    ).sum(1)


@pytest.mark.parametrize("name", SCHEMES)
def test_absmax_is_quantize(name: str) -> None:
    weight = heavy()
    q, wanted = rtn(weight, SCHEMES[name]), quantize(weight, SCHEMES[name])
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(q.real_scale, wanted.real_scale)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in ("nvfp4", "mxfp4", "int3-ragged-asym")])
def test_a_searched_range_is_the_best_of_the_factors_for_every_tile(name: str, weighted: bool) -> None:
    # Thirty factors tried by hand, each with the public `quantize`.
    scheme, weight = SCHEMES[name], heavy()
    power = torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.01
    moment = moment_of(power) if weighted else None
    importance = moment.diagonal().double() if moment else None
    q = rtn(weight, scheme, moment, range="mse")
    ours = tile_errors(weight, q.dequantize(), scheme, importance, 2.0)
    tried = [
        tile_errors(weight, quantize(weight, scheme, shrink=float(f)).dequantize(), scheme, importance, 2.0)
        for f in torch.linspace(1.0, 0.4, 30)
    ]
    torch.testing.assert_close(ours, torch.stack(tried).amin(dim=0), rtol=1e-5, atol=0)
    if name != "ternary" or weighted:  # the plain ternary scale is the best one already
        assert bool((ours < tried[0]).any()), "clipping pays somewhere"


def test_power_of_two_scales_try_their_two_neighbours() -> None:
    scheme, weight = SCHEMES["mxfp4"], heavy()
    q = rtn(weight, scheme, range="mse")
    codes = encode(q.real_scale, FORMATS["e8m0"])
    assert torch.equal(decode(codes, FORMATS["e8m0"]), q.real_scale), "still powers of two"
    best = quantize(weight, scheme, rule="best")
    assert torch.equal(
        tile_errors(weight, q.dequantize(), scheme, None, 2.0),
        tile_errors(weight, best.dequantize(), scheme, None, 2.0),
    )


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "nvfp4"])
def test_a_searched_range_is_never_worse_in_its_own_measure(name: str) -> None:
    scheme, weight = SCHEMES[name], heavy(seed=3)
    importance = moment_of(torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.01)
    for moment in (None, importance):
        weights = None if moment is None else moment.diagonal().double()
        searched = tile_errors(weight, rtn(weight, scheme, moment, range="mse").dequantize(), scheme, weights, 2.0)
        widest = tile_errors(weight, rtn(weight, scheme, moment).dequantize(), scheme, weights, 2.0)
        if "ragged" in name:  # the padding counts some elements of the last group once more
            searched, widest = searched.reshape(24, -1)[:, :-1], widest.reshape(24, -1)[:, :-1]
        assert bool((searched <= widest * (1 + 1e-6)).all())


def test_quantized_scales_gain_on_the_whole() -> None:
    scheme, weight = SCHEMES["nvfp4"], heavy(seed=4)
    errors = [float((rtn(weight, scheme, range=r).dequantize() - weight).square().sum()) for r in ("absmax", "mse")]  # type: ignore[arg-type]
    assert errors[1] < errors[0]


def test_a_ragged_group_is_searched_for_its_own_elements() -> None:
    # 64 of 128: the padding repeats each once, so the result is that of a group of 64.
    weight = heavy(24, 192)
    whole = rtn(weight, Scheme(INT4, PerGroup(128)), range="mse")
    tail = rtn(weight[:, 128:], Scheme(INT4, PerGroup(64)), range="mse")
    assert torch.equal(whole.real_scale[:, 1:], tail.real_scale)
    assert torch.equal(whole.codes[:, 128:], tail.codes)


def test_importance_moves_the_range_towards_the_loud_columns() -> None:
    # One large weight on a column that is never used: only a weighted search clips it away.
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    weight[:, 3] = 20.0
    power = torch.ones(32)
    power[3] = 1e-6
    scheme = Scheme(INT4, PerGroup(32))
    plain, weighted = rtn(weight, scheme, range="mse"), rtn(weight, scheme, moment_of(power), range="mse")
    assert bool((weighted.real_scale <= plain.real_scale).all())
    assert float(weighted.real_scale.mean()) < 0.5 * float(plain.real_scale.mean())


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_the_exponent_of_the_error_can_be_chosen(power: float) -> None:
    weight = heavy()
    scheme = SCHEMES["int4-g16"]
    ours = search_grid(weight, scheme, power=power).scale
    tried = []
    for factor in torch.linspace(1.0, 0.4, 30):
        q = quantize(weight, scheme, shrink=float(factor))
        tried.append(tile_errors(weight, q.dequantize(), scheme, None, power))
    best = torch.stack(tried).argmin(dim=0)
    wide = quantize(weight, scheme).real_scale.flatten()
    agree = (ours.flatten() / wide - torch.linspace(1.0, 0.4, 30)[best]).abs() < 1e-5
    assert float(agree.float().mean()) > 0.97, "but for near ties in float32"


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
    q = quantize(weight, scheme)
    tile = tile_shape(scheme.granularity, q.shape)
    parts = [None if p is None else p.reshape(-1, 1) for p in (q.real_scale, q.zero_point, q.offset)]
    tried = on_grid(to_tiles(weight, tile), scheme, Grid(*parts))  # type: ignore[arg-type]
    torch.testing.assert_close(tried, to_tiles(q.dequantize(), tile), rtol=1e-6, atol=1e-6)


def test_refusals_carry_the_name() -> None:
    bad = heavy()
    bad[3, 3] = torch.nan
    for range, scheme in itertools.product(("absmax", "mse"), (SCHEMES["int4-g16"], SCHEMES["nvfp4"])):
        with pytest.raises(DataError, match="^w: .*NaN or infinity"):
            rtn(bad, scheme, range=range, name="w")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="^w: unknown range 'mean'. Known: absmax, mse"):
        rtn(heavy(), SCHEMES["int4-g16"], range="mean", name="w")  # type: ignore[arg-type]


def test_any_number_of_axes_and_none_at_all() -> None:
    for shape in ((5, 3, 16), (16,), (0, 16), (4, 0)):
        for range in ("absmax", "mse"):
            q = rtn(torch.ones(shape), Scheme(integer(4), PerGroup(8)), range=range)  # type: ignore[arg-type]
            assert q.shape == shape
            torch.testing.assert_close(q.dequantize(), torch.ones(shape), rtol=0.08, atol=0)
