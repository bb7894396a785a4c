"""Losses against the products and sums written out with the inputs themselves, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import ShapeError
from arrondi.formats import parse_scheme
from arrondi.rounding import gptq, rtn
from arrondi.rounding.error import Loss, output_loss, sqnr, weight_loss
from arrondi.tensor.nearest import quantize_tensor


def inputs(n: int, tokens: int = 700, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=g) @ torch.randn(8, n, generator=g) + 0.3 * torch.randn(tokens, n, generator=g)
    return x * (torch.rand(n, generator=g) * 5) + 0.4


def moment_of(x: torch.Tensor) -> SecondMoment:
    moment = SecondMoment(x.shape[1])
    for part in x.split(130):
        moment.update(part)
    return moment


def weight(m: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 0.04 + 0.002


def outputs(x: torch.Tensor, w: torch.Tensor, back: torch.Tensor) -> tuple[float, float]:
    """‖X(W - Ŵ)ᵀ‖² and ‖XWᵀ‖² with the inputs at hand."""
    x, w, back = x.double(), w.double(), back.double()
    return float((x @ (w - back).T).square().sum()), float((x @ w.T).square().sum())


@pytest.mark.parametrize("m", [3, 1500])  # the second is more than one block of rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_loss_is_that_of_the_inputs(m: int, dtype: torch.dtype) -> None:
    x, w = inputs(96), weight(m, 96).to(dtype)
    q = rtn(w, parse_scheme("w=int3/g32/asym").weights)
    found = output_loss(w, q.dequantize(), moment_of(x).matrix())
    noise, signal = outputs(x, w, q.dequantize())
    assert found.noise == pytest.approx(noise, rel=1e-4)
    assert found.signal == pytest.approx(signal, rel=1e-4)
    assert found.ratio == pytest.approx(noise / signal, rel=2e-4)


def test_each_of_several_matrices_that_read_the_same_has_its_own() -> None:
    """Rounded in one sweep, as q, k and v are; their errors differ by orders of magnitude."""
    x = inputs(64)
    parts = [weight(16, 64, seed=i) * scale for i, scale in enumerate((1.0, 1e-3, 30.0))]
    parts[1][0, 0] = 2.0  # one number that spoils its row
    q = gptq(torch.cat(parts), parse_scheme("w=int4/channel").weights, moment_of(x))
    ratios = []
    for w, back in zip(parts, q.dequantize().split(16), strict=True):
        noise, signal = outputs(x, w, back)
        ratios.append(output_loss(w, back, moment_of(x).matrix()).ratio)
        assert ratios[-1] == pytest.approx(noise / signal, rel=1e-3)
    assert max(ratios) > 3 * min(ratios), "or the test shows nothing"


def test_the_loss_of_a_stack_is_that_of_all_its_numbers() -> None:
    matrices = [weight(8, 64), weight(8, 64, seed=2) * 1e-3, torch.zeros(8, 64)]
    scheme = parse_scheme("w=int4/g32").weights
    rounded = [quantize_tensor(m, scheme) for m in matrices]
    found = sum((weight_loss(m, q) for m, q in zip(matrices, rounded, strict=True)), Loss())
    exact, back = torch.cat(matrices).double(), torch.cat([q.dequantize() for q in rounded]).double()
    wanted = 10 * math.log10(float(exact.square().sum() / (exact - back).square().sum()))
    assert found.decibels == pytest.approx(wanted, abs=1e-3)
    assert weight_loss(matrices[2], rounded[2]).decibels == math.inf
    x = [inputs(64, seed=s) for s in range(3)]
    sums = [outputs(*part) for part in zip(x, matrices, [q.dequantize() for q in rounded], strict=True)]
    total = sum(
        (output_loss(m, q.dequantize(), moment_of(i).matrix()) for m, q, i in zip(matrices, rounded, x, strict=True)),
        Loss(),
    )
    assert total.ratio == pytest.approx(sum(s[0] for s in sums) / sum(s[1] for s in sums), rel=1e-3)


@pytest.mark.parametrize(
    "text", ["w=int4/g32", "w=uint3/g48/offset", "w=nf4/g64", "w=fp4/g16/s:(fp8/tensor)", "w=int8/channel1"]
)
def test_the_weight_loss_in_and_outside_the_compiled_kernels(text: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = weight(20, 96).to(dtype)
        q = quantize_tensor(w, text)
        apart = w.double() - q.dequantize().double()
        found = weight_loss(w, q)
        assert found.noise == pytest.approx(float(apart.square().sum()), rel=1e-4)
        assert found.signal == pytest.approx(float(w.double().square().sum()), rel=1e-4)
        assert sqnr(w, q.dequantize()) == pytest.approx(found.decibels, abs=1e-3)


def test_groups_in_another_order() -> None:
    w, x = weight(12, 64), inputs(64)
    q = gptq(w, parse_scheme("w=int4/g16").weights, moment_of(x), order="dynamic")
    assert q.group_index is not None
    apart = w.double() - q.dequantize().double()
    assert weight_loss(w, q).noise == pytest.approx(float(apart.square().sum()), rel=1e-4)


def test_the_ends_of_the_scale() -> None:
    assert Loss().decibels == math.inf and Loss().ratio == 0
    assert Loss(1.0, 0.0).ratio == math.inf and Loss(1.0, 0.0).decibels < -2000
    assert Loss(1.0, 100.0).decibels == pytest.approx(20.0)


def test_other_shapes_are_refused() -> None:
    q = quantize_tensor(weight(4, 32), "w=int4/g32")
    with pytest.raises(ShapeError, match=r"got \(4, 64\) and \(4, 32\)"):
        weight_loss(weight(4, 64), q)
    with pytest.raises(ShapeError, match=r"two matrices \(out, 64\), got \(4, 32\)"):
        output_loss(weight(4, 32), q.dequantize(), moment_of(inputs(64)).matrix())
