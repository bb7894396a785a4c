"""Round to nearest: which grid it takes, what that gains, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError
from arrondi.formats import FORMATS, PRESETS, PerChannel, PerGroup, PerTensor, Scheme, integer, parse_scheme
from arrondi.rounding import rtn
from arrondi.rounding.rtn import pays_to_search
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.ranges.search import search_grid
from tests.cases import each_once

INT4 = FORMATS["int4"]
SCHEMES = {
    "int4-g16": Scheme(INT4, PerGroup(16)),
    "int3-ragged-asym": Scheme(FORMATS["int3"], PerGroup(32), "integer"),
    "uint4-g16-offset": Scheme(FORMATS["uint4"], PerGroup(16), "float"),
    "int4-channel-bf16": Scheme(INT4, PerChannel(), scale="bfloat16"),
    "mxfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale="e8m0"),
    "nvfp4": Scheme(FORMATS["fp4_e2m1"], PerGroup(16), scale=Scheme(FORMATS["fp8_e4m3"], PerTensor())),
    "nf4": Scheme(FORMATS["nf4"], PerGroup(16)),
}


def heavy(m: int = 24, n: int = 80, seed: int = 0) -> torch.Tensor:
    """Weights with a heavy tail, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.exp(0.5 * torch.randn(m, n, generator=generator))


def moment_of(power: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(len(power))
    moment.update(torch.diag(power.sqrt()))
    return moment


@pytest.mark.parametrize("name", SCHEMES)
def test_absmax_is_the_datas_own_range(name: str) -> None:
    weight = heavy()
    q, wanted = rtn(weight, SCHEMES[name], range="absmax"), quantize_tensor(weight, SCHEMES[name])
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(q.real_scale, wanted.real_scale)


@pytest.mark.parametrize(("name", "weighted"), each_once([n for n in SCHEMES if n != "nvfp4"], [False, True]))
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


# Which is the default, and why.

SEARCHED = {"W2A16", "W3A16", "W4A16", "W6A16", "W4A16_ASYM", "MXFP4A16", "MXFP6", "MXFP8A16"}
ABSMAX = {"W8A16", "W8A8", "FP8A16", "FP8_BLOCK", "NVFP4A16", "FP4", "NF4", "TERNARY", "BINARY"}


def test_the_default_searches_where_it_pays() -> None:
    for name in SEARCHED | ABSMAX:
        scheme, weight = PRESETS[name].weights, heavy(8, 256)
        assert pays_to_search(scheme) == (name in SEARCHED), name
        wanted = rtn(weight, scheme, range="search" if name in SEARCHED else "absmax")
        assert torch.equal(rtn(weight, scheme).codes, wanted.codes), name


@pytest.mark.parametrize(
    ("text", "absmax", "searched"),
    [
        ("w=int2/g128", 0.303, 0.135),
        ("w=int3/g128", 0.0565, 0.0352),
        ("w=int4/g128", 0.0123, 0.0095),
        ("w=int8/g128", 4.27e-5, 4.27e-5),
    ],
)
def test_what_the_search_gains_on_gaussian_weights(text: str, absmax: float, searched: float) -> None:
    # Origin of the first of each: absmax over half the code range on 2^20 Gaussian samples. The optimum of an even grid of four
    # levels is 0.1188, which no scale of 128 samples reaches; integers lack one level on one side.
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    scheme = parse_scheme(text).weights
    for range, wanted in (("absmax", absmax), ("search", searched)):
        back = rtn(weight, scheme, range=range).dequantize()
        assert float((back - weight).square().sum() / weight.square().sum()) == pytest.approx(wanted, rel=0.02)


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
    plain = rtn(heavy(), scheme, range="absmax")
    errors = [float((each.dequantize() - heavy()).square().sum()) for each in (q, plain)]
    assert errors[0] < errors[1]


def test_quantized_scales_gain_on_the_whole() -> None:
    scheme, weight = SCHEMES["nvfp4"], heavy(seed=4)
    errors = [float((rtn(weight, scheme, range=r).dequantize() - weight).square().sum()) for r in ("absmax", "search")]
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


def test_refusals_carry_the_name() -> None:
    bad = heavy()
    bad[3, 3] = torch.nan
    for range, scheme in itertools.product(("absmax", "search"), (SCHEMES["int4-g16"], SCHEMES["nvfp4"])):
        with pytest.raises(DataError, match=r"^w: .*NaN or infinity"):
            rtn(bad, scheme, range=range, name="w")
    with pytest.raises(SchemeError, match=r"^w: Unknown range 'mean'\. Known: absmax, auto, best"):
        rtn(heavy(), SCHEMES["int4-g16"], range="mean", name="w")


def test_any_number_of_axes_and_none_at_all() -> None:
    for shape in ((5, 3, 16), (16,), (0, 16), (4, 0)):
        for range in ("absmax", "search"):
            q = rtn(torch.ones(shape), Scheme(integer(4), PerGroup(8)), range=range)
            assert q.shape == shape
            torch.testing.assert_close(q.dequantize(), torch.ones(shape), rtol=0.08, atol=0)


# Blocks of fp4: measured on 10^6 Gaussian and Laplace samples (relative squared error), and the two scales of arXiv:2512.02010.


@pytest.mark.parametrize(
    ("range", "gaussian", "laplace"),
    [
        ("floor", 0.01322, 0.01607),
        ("ceil", 0.01332, 0.01745),
        ("best", 0.01245, 0.01507),
    ],
)
def test_rules_of_power_of_two_scales(range: str, gaussian: float, laplace: float) -> None:
    seeded = torch.Generator().manual_seed(0)
    for sample, wanted in (
        (torch.randn(512, 1024, generator=seeded), gaussian),
        (
            torch.empty(512, 1024).exponential_(generator=seeded) * torch.randn(512, 1024, generator=seeded).sign(),
            laplace,
        ),
    ):
        back = rtn(sample, "MXFP4A16", range=range).dequantize()
        assert float((back - sample).square().sum() / sample.square().sum()) == pytest.approx(wanted, rel=0.02)


def test_the_largest_magnitude_on_four_or_on_six_is_a_choice_between_two_scales() -> None:
    """A block of 6 and -6 is exact on 6, one of 4 and 3 on 4; each block takes the scale with the lower error."""
    weight = torch.tensor([[6.0, -6.0] * 8 + [4.0, 3.0] * 8]) / 6
    widest, both = (rtn(weight, "NVFP4A16", range=r) for r in ("absmax", "four-over-six"))
    torch.testing.assert_close(both.dequantize(), weight)
    assert not torch.allclose(widest.dequantize(), weight, rtol=0.05)
    assert (both.real_scale[0] / widest.real_scale[0]).tolist() == pytest.approx([1.0, 1.5], rel=0.07)


def test_ranges_that_do_not_go_with_the_scheme_are_refused() -> None:
    for scheme, range in (("W4A16", "best"), ("MXFP4A16", "four-over-six"), ("NF4", "four-over-six")):
        with pytest.raises(SchemeError, match=f"w: range={range} is .*Use range=search"):
            rtn(heavy(), scheme, range=range, name="w")
