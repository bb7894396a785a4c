"""Stand-ins of quantized weights: where they begin, what they become, and their gradients."""

from __future__ import annotations

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.formats import parse_scheme, tile_shape
from arrondi.repair.soft import SoftRounding, SoftScale, is_nearest, learns_rounding
from arrondi.rounding.gptq import gptq
from arrondi.rounding.rtn import rtn
from arrondi.tensor.tiling import from_tiles

SCHEMES = ["w=int3/g16/bfloat16", "w=uint4/g16/asym/bfloat16", "w=int4/channel", "w=int8/tensor"]


def weight() -> torch.Tensor:
    return torch.randn(12, 48, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("scheme", [*SCHEMES, "w=nf4/g16", "w=uint2/g16/offset", "w=tcq2-l8/channel/rht128:3"])
def test_a_soft_scale_begins_as_its_weight_and_ends_in_its_format(scheme: str) -> None:
    q = rtn(weight(), parse_scheme(scheme).weights)
    soft = SoftScale.of(q)
    assert torch.allclose(soft.value(), q.dequantize(), atol=1e-7)
    with torch.no_grad():
        soft.change.add_(torch.linspace(-0.1, 0.1, soft.change.numel()).reshape(soft.change.shape))
    hard = soft.hard()
    assert torch.equal(hard.codes, q.codes)
    assert torch.allclose(hard.dequantize(), soft.value(), atol=2e-3 * float(weight().abs().max()) + 1e-7, rtol=5e-3)


def test_the_gradient_of_a_scale_is_the_difference_quotient() -> None:
    q = rtn(weight(), parse_scheme("w=int3/g16").weights)
    target = weight().double()

    def loss(change: torch.Tensor) -> torch.Tensor:
        return (SoftScale(q, change).value().double() - target).square().sum()

    soft = SoftScale.of(q)
    loss(soft.change).backward()
    assert soft.change.grad is not None
    moved = torch.zeros_like(soft.change)
    moved[3, 1] = 1e-2
    quotient = float(loss(moved) - loss(-moved)) / 2e-2
    assert float(soft.change.grad[3, 1]) == pytest.approx(quotient, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_learned_rounding_begins_as_rounding_to_nearest(scheme: str) -> None:
    q = rtn(weight(), parse_scheme(scheme).weights, range="absmax")
    soft = SoftRounding.of(q, weight())
    assert torch.allclose(soft.value(), q.dequantize(), atol=1e-7)
    assert torch.equal(soft.hard().codes, q.codes)


def test_a_weight_moves_by_one_level_at_most() -> None:
    q = rtn(weight(), parse_scheme("w=int4/g16").weights, range="absmax")
    soft = SoftRounding.of(q, weight(), shrink=False)
    with torch.no_grad():
        soft.shift.copy_(torch.randn(soft.shift.shape, generator=torch.Generator().manual_seed(1)) * 9)
    soft.limit()
    hard = soft.hard()
    assert int((hard.codes.int() - q.codes.int()).abs().max()) == 1
    steps = (hard.dequantize() - weight()).abs() / q.real_scale.repeat_interleave(16, 1)
    inside = (hard.codes > -8) & (hard.codes < 7)
    assert float(steps[inside].max()) <= 1 + 1e-5


@pytest.mark.parametrize("scheme", ["w=int3/g16/bfloat16", "w=uint4/g16/asym/bfloat16"])
def test_it_may_begin_at_the_codes_of_another_method(scheme: str) -> None:
    moment = SecondMoment(48)
    moment.update(torch.randn(300, 48, generator=torch.Generator().manual_seed(2)) @ torch.randn(48, 48))
    q = gptq(weight(), parse_scheme(scheme).weights, moment)
    soft = SoftRounding.at(q, weight())
    assert torch.equal(soft.hard().codes, q.codes)
    assert torch.allclose(soft.value(), q.dequantize(), atol=1e-6)
    assert float((rtn(weight(), q.scheme).codes != q.codes).float().mean()) > 0.01, "these are other codes"


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("scheme", ["w=int3/g16/bfloat16", "w=int4/channel", "w=int2/g16"])
def test_one_pass_gives_what_the_operations_one_by_one_give(scheme: str, shrink: bool) -> None:
    q = rtn(weight(), parse_scheme(scheme).weights, range="absmax")
    generator = torch.Generator().manual_seed(3)
    pull = torch.randn(12, 48, generator=generator)
    soft = SoftRounding.of(q, weight(), shrink=shrink)
    with torch.no_grad():
        soft.shift.copy_(torch.rand(soft.shift.shape, generator=generator) - 0.5)
        if soft.shrink is not None:
            soft.shrink.copy_(torch.rand(soft.shrink.shape, generator=generator) * 0.6 + 0.4)
    fast = soft.value()
    slow = from_tiles(soft._by_operations(), tile_shape(q.scheme.granularity, q.shape), q.shape)
    torch.testing.assert_close(fast, slow)
    assert bool((fast.detach().abs() > 0).any())
    wanted = torch.autograd.grad((slow * pull).sum(), list(soft.parameters))
    for got, want in zip(torch.autograd.grad((fast * pull).sum(), list(soft.parameters)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_codes_that_a_method_chose_are_told_from_nearest_ones() -> None:
    scheme = parse_scheme("w=int3/g16").weights
    moment = SecondMoment(48)
    moment.update(torch.randn(300, 48, generator=torch.Generator().manual_seed(2)) @ torch.randn(48, 48))
    assert is_nearest(rtn(weight(), scheme), weight())
    assert not is_nearest(gptq(weight(), scheme, moment), weight())


def test_what_cannot_be_learned_is_known() -> None:
    assert learns_rounding(rtn(weight(), parse_scheme("w=int4/g16").weights))
    for scheme in ("w=nf4/g16", "w=fp4_e2m1/g16/e8m0", "w=uint4/g16/offset", "NVFP4A16"):
        assert not learns_rounding(rtn(weight(), parse_scheme(scheme).weights))
