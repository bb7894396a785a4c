"""Round to nearest with the widest range and with a searched one."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError
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
from arrondi.rounding import rtn
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.qtensor import quantize_tensor, quantize_with
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.search import on_grid, search_grid
from arrondi.tensor.tiling import to_tiles

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
    q, wanted = rtn(weight, SCHEMES[name]), quantize_tensor(weight, SCHEMES[name])
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(q.real_scale, wanted.real_scale)


def by_hand(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float, factors: torch.Tensor
) -> torch.Tensor:
    """The least error of every tile over factors on its range and, for lopsided formats, both signs of the scale."""
    mirrored = scheme.symmetric and str(scheme.format) in ("int4", "nf4")
    best = torch.tensor(torch.inf, dtype=torch.float64)
    for factor in factors.tolist():
        q = quantize_tensor(weight, scheme, shrink=factor)
        tried = [q]
        if mirrored:
            tried.append(quantize_with(weight, scheme, Grid(-q.real_scale)))
        for each in tried:
            best = torch.minimum(best, tile_errors(weight, each.dequantize(), scheme, importance, power))
    return best


@pytest.mark.parametrize("power", [1.0, 2.0, POWER], ids=["1", "2", "default"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in ("nvfp4", "mxfp4", "int3-ragged-asym")])
def test_a_searched_range_is_about_the_best_there_is(name: str, weighted: bool, power: float) -> None:
    scheme, weight = SCHEMES[name], heavy()
    loudness = torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.01
    importance = loudness if weighted else None
    parts = [
        None if p is None else p.reshape(scale_shape(scheme.granularity, (24, 80)))
        for p in search(weight, name, importance, power)
    ]
    back = quantize_with(weight, scheme, Grid(*parts)).dequantize()  # type: ignore[arg-type]
    ours = tile_errors(weight, back, scheme, importance, power)
    dense = by_hand(weight, scheme, importance, power, torch.linspace(1.0, 0.4, 121))
    assert bool((ours <= by_hand(weight, scheme, importance, power, torch.tensor([1.0])) * (1 + 1e-5)).all()), (
        "never worse"
    )
    # Errors jump as codes flip, so a search of a few factors misses some of what 121 find.
    assert float(ours.sum()) <= 1.05 * float(dense.sum())
    assert float((ours <= 1.25 * dense).double().mean()) > 0.9
    assert float((ours < 0.8 * dense).double().mean()) < 0.02, "nothing is much better than what was tried by hand"


def search(weight: torch.Tensor, name: str, importance: torch.Tensor | None, power: float) -> Grid:
    return search_grid(weight, SCHEMES[name], importance, power=power)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "nvfp4"])
def test_rtn_rounds_on_the_searched_grid(name: str, weighted: bool) -> None:
    weight = heavy()
    moment = moment_of(torch.rand(80, generator=torch.Generator().manual_seed(1)) + 0.01) if weighted else None
    q = rtn(weight, SCHEMES[name], moment, range="search")
    grid = search_grid(weight, SCHEMES[name], None if moment is None else moment.diagonal())
    assert torch.equal(q.real_scale.flatten(), grid.scale.flatten())
    for part, wanted in ((q.zero_point, grid.zero_point), (q.offset, grid.offset)):
        assert (part is None) == (wanted is None)
        assert part is None or wanted is None or torch.equal(part.flatten(), wanted.flatten())
    assert torch.equal(q.codes, quantize_with(weight, SCHEMES[name], q.grid).codes)


def test_signed_integers_may_use_their_extra_code_on_either_side() -> None:
    # -8 … 7: a group whose extreme is positive is better off with a negative scale.
    weight = torch.linspace(-7, 7, 15).repeat(2, 1)
    weight = torch.cat([weight, torch.tensor([[8.0], [-8.0]])], dim=1)
    q = rtn(weight, Scheme(INT4), range="search")
    assert q.real_scale.flatten().tolist() == pytest.approx([-1.0, 1.0], rel=0.07)


@pytest.mark.parametrize("name", ["mxint8", "int4-fp8-scales"])
def test_scales_without_a_sign_stay_positive(name: str) -> None:
    scheme = {
        "mxint8": Scheme(FORMATS["int8"], PerGroup(16), scale="e8m0"),
        "int4-fp8-scales": Scheme(INT4, PerGroup(16), scale=Scheme(FORMATS["fp8_e4m3"], PerTensor())),
    }[name]
    q = rtn(heavy(), scheme, range="search")
    assert bool((q.real_scale > 0).all())
    assert float((q.dequantize() - heavy()).norm() / heavy().norm()) < 0.15


def test_power_of_two_scales_try_their_two_neighbours() -> None:
    scheme, weight = SCHEMES["mxfp4"], heavy()
    q = rtn(weight, scheme, range="search")
    codes = encode(q.real_scale, FORMATS["e8m0"])
    assert torch.equal(decode(codes, FORMATS["e8m0"]), q.real_scale), "still powers of two"
    best = quantize_tensor(weight, scheme, rule="best")
    grid = search_grid(weight, scheme, power=2.0)
    ours = quantize_with(weight, scheme, Grid(grid.scale)).dequantize()
    assert torch.equal(
        tile_errors(weight, ours, scheme, None, 2.0), tile_errors(weight, best.dequantize(), scheme, None, 2.0)
    )


def test_quantized_scales_gain_on_the_whole() -> None:
    scheme, weight = SCHEMES["nvfp4"], heavy(seed=4)
    errors = [float((rtn(weight, scheme, range=r).dequantize() - weight).square().sum()) for r in ("absmax", "search")]  # type: ignore[arg-type]
    assert errors[1] < errors[0]


def test_a_ragged_group_is_searched_for_its_own_elements() -> None:
    # 64 of 128: the padding repeats each once, so the result is that of a group of 64.
    weight = heavy(24, 192)
    whole = rtn(weight, Scheme(INT4, PerGroup(128)), range="search")
    tail = rtn(weight[:, 128:], Scheme(INT4, PerGroup(64)), range="search")
    assert torch.equal(whole.real_scale[:, 1:], tail.real_scale)
    assert torch.equal(whole.codes[:, 128:], tail.codes)


def test_importance_moves_the_range_towards_the_loud_columns() -> None:
    # One large weight on a column that is never used: only a weighted search clips it away.
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    weight[:, 3] = 20.0
    power = torch.ones(32)
    power[3] = 1e-6
    scheme = Scheme(INT4, PerGroup(32))
    plain, weighted = rtn(weight, scheme, range="search"), rtn(weight, scheme, moment_of(power), range="search")
    assert float(weighted.real_scale.abs().mean()) < 0.6 * float(plain.real_scale.abs().mean())


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
    parts = [None if p is None else p.reshape(-1, 1) for p in (q.real_scale, q.zero_point, q.offset)]
    tried = on_grid(to_tiles(weight, tile), scheme, Grid(*parts))  # type: ignore[arg-type]
    torch.testing.assert_close(tried, to_tiles(q.dequantize(), tile), rtol=1e-6, atol=1e-6)


def test_refusals_carry_the_name() -> None:
    bad = heavy()
    bad[3, 3] = torch.nan
    for range, scheme in itertools.product(("absmax", "search"), (SCHEMES["int4-g16"], SCHEMES["nvfp4"])):
        with pytest.raises(DataError, match=r"^w: .*NaN or infinity"):
            rtn(bad, scheme, range=range, name="w")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match=r"^w: unknown range 'mean'\. Known: absmax, search"):
        rtn(heavy(), SCHEMES["int4-g16"], range="mean", name="w")  # type: ignore[arg-type]


def test_any_number_of_axes_and_none_at_all() -> None:
    for shape in ((5, 3, 16), (16,), (0, 16), (4, 0)):
        for range in ("absmax", "search"):
            q = rtn(torch.ones(shape), Scheme(integer(4), PerGroup(8)), range=range)  # type: ignore[arg-type]
            assert q.shape == shape
            torch.testing.assert_close(q.dequantize(), torch.ones(shape), rtol=0.08, atol=0)
