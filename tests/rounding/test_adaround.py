"""AdaRound: its rectified sigmoid and schedule, the toy of the specification, and what white inputs must give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats import parse_scheme
from arrondi.rounding import METHODS, check_options
from arrondi.rounding.adaround import adaround, beta_of, rectified, unrectified
from arrondi.rounding.rtn import rtn
from tests.rounding.test_gptaq import N, error, made


def toy() -> tuple[torch.Tensor, torch.Tensor, SecondMoment]:
    """A layer 64 → 32 behind a ReLU whose outputs are correlated."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(64, 64, generator=generator)
    x = (torch.randn(1024, 64, generator=generator) @ mix / 8 + 0.3).relu()
    moment = SecondMoment(64)
    moment.update(x)
    return torch.randn(32, 64, generator=generator), x, moment


def run(weight: torch.Tensor, scheme: str, moment: SecondMoment, **options: Any) -> Any:
    options = {"cross_moment": moment.matrix(), "iterations": 500, **options}
    return adaround(weight, parse_scheme(scheme).weights, moment, **options)


def test_the_sigmoid_reaches_both_ends_and_begins_where_the_weight_is() -> None:
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(rectified(unrectified(share)), share, atol=1e-12)
    assert rectified(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


def test_beta_falls_after_a_fifth_of_the_iterations() -> None:
    betas = [beta_of(step, 1000) for step in (0, 199, 200, 600, 1000)]
    assert betas == [math.inf, math.inf, 20.0, 11.0, 2.0]


@pytest.mark.parametrize("scheme", ["w=int4/channel", "w=uint4/g16/asym", "w=int3/g16"])
def test_the_output_error_is_a_fraction_of_that_of_rounding_to_nearest(scheme: str) -> None:
    weight, x, moment = toy()
    facts: dict[str, Any] = {}
    q = run(weight, scheme, moment, facts=facts)
    nearest = rtn(weight, parse_scheme(scheme).weights, None, range="search")
    rows = ((x @ (q.dequantize() - weight).T).square().sum(0), (x @ (nearest.dequantize() - weight).T).square().sum(0))
    assert float(rows[0].sum()) < 0.6 * float(rows[1].sum())
    assert bool((rows[0] <= rows[1] * 1.05).all()), "no row is worse, but for the damping"
    assert facts["undecided"] < 0.05 and 0.05 < facts["rounded_away"] < 0.5


def test_no_weight_moves_by_a_whole_step_and_scales_stay() -> None:
    weight, _, moment = toy()
    weight[3] = 0
    q = run(weight, "w=int3/g16", moment)
    nearest = rtn(weight, q.scheme, None, range="search")
    assert torch.equal(q.real_scale, nearest.real_scale)
    step = q.real_scale.abs().repeat_interleave(16, 1)
    inside = (q.codes > -4) & (q.codes < 3)
    assert bool(((q.dequantize() - weight).abs() < step * 1.00001)[inside].all())
    assert bool(((q.codes - nearest.codes).abs() <= 1).all())


def test_white_inputs_give_the_nearest_level() -> None:
    weight, _, _ = toy()
    moment = SecondMoment(64)
    moment.update(torch.eye(64))
    q = run(weight, "w=int4/g16", moment)
    assert torch.equal(q.codes, rtn(weight, q.scheme, None, range="search").codes)


def test_it_makes_up_for_inputs_that_rounding_has_changed() -> None:
    weight, f, x, moment, cross = made()
    both = [run(weight, "w=int4/g32", moment, cross_moment=c).dequantize() for c in (moment.matrix(), cross)]
    assert error(weight, f, both[1], x) < 0.9 * error(weight, f, both[0], x)


def test_the_size_of_weights_and_inputs_does_not_matter() -> None:
    weight, x, moment = toy()
    larger = SecondMoment(64)
    larger.update(x * 64)
    one, other = (run(w, "w=int4/g16", m, iterations=50) for w, m in ((weight, moment), (weight / 1024, larger)))
    assert float((one.codes == other.codes).float().mean()) > 0.995


def test_what_makes_no_sense_is_named() -> None:
    weight, _, _, moment, cross = made()
    with pytest.raises(SchemeError, match="AdaRound learns integer codes with plain scales"):
        adaround(weight, "NF4", moment, cross_moment=cross)
    with pytest.raises(DataError, match=r"^layer: adaround needs the second moment"):
        adaround(weight, "w=int4/g32", moment, name="layer")
    with pytest.raises(ShapeError, match=r"^layer: the moments are for 64"):
        adaround(weight[:, : N // 2], "w=int4/g32", moment, cross_moment=cross, name="layer")
    for option, value in (("iterations", 0), ("rate", -0.1), ("regular", -1.0)):
        with pytest.raises(SchemeError, match=f"Option {option} of adaround"):
            check_options("adaround", METHODS["adaround"].run, {option: value})
