"""Ternary and binary weights: the measured errors of the specification, gradients by finite differences, exact splitting."""

from __future__ import annotations

import itertools

import pytest
import torch

from arrondi import DataError, SchemeError, ShapeError, rtn
from arrondi.nn.straight import sign, step, straight
from arrondi.training.binary import binary_weight, centred_weight, halves_weight, split_halves
from arrondi.training.ternary import (
    Ternary,
    absmean,
    alpha_at_first,
    bitnet_weight,
    terdit_weight,
    token_int8,
    twn,
    twn_weight,
)

N = 1 << 20


def nmse(w: torch.Tensor, q: torch.Tensor) -> float:
    return float((w - q).square().sum() / w.square().sum())


def draw(kind: str) -> torch.Tensor:
    if kind == "gaussian":
        return torch.randn(1, N)
    if kind == "uniform":
        return torch.rand(1, N) * 2 - 1
    return torch.distributions.Laplace(0.0, 1.0).sample((1, N))


@pytest.mark.parametrize(
    ("kind", "wanted", "optimum"),
    [
        ("gaussian", (0.1922, 0.1908, 0.1908), 0.77),
        ("uniform", (0.1116, 0.1139, 0.1112), 0.67),
        ("laplace", (0.283, 0.277, 0.265), 1.00),
    ],
)
def test_errors_of_twn(kind: str, wanted: tuple[float, ...], optimum: float) -> None:
    w = draw(kind)
    found = [nmse(w, twn(w, t).value) for t in (0.7, 0.75, None)]
    assert found == pytest.approx(wanted, rel=0.01)
    assert found[2] <= min(found[:2]) + 1e-7
    assert float(twn(w).scale) / 2 / float(w.abs().mean()) == pytest.approx(optimum, rel=0.03)


def test_errors_of_bitnet() -> None:
    w = draw("gaussian")
    t = absmean(w)
    assert float((t.codes == 0).float().mean()) == pytest.approx(0.31, abs=0.005)
    assert nmse(w, t.value) == pytest.approx(0.264, rel=0.01)
    best = (w * t.codes).sum() / t.codes.square().sum()
    assert nmse(w, best * t.codes) == pytest.approx(0.214, rel=0.01)


def test_exact_twn_is_the_best_of_all() -> None:
    w = torch.randn(1, 9)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=9)))[1:]
    every = every[every.abs().sum(1) > 0]
    a = (every * w).sum(1, keepdim=True) / every.square().sum(1, keepdim=True)
    least = float((w - a * every).square().sum(1).min())
    assert float((w - twn(w).value).square().sum()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_scaling_a_weight_scales_its_scale_alone(c: float) -> None:
    w = torch.randn(8, 40)
    for one, other in ((twn(w), twn(c * w)), (absmean(w), absmean(c * w))):
        assert torch.equal(one.codes, other.codes)
        torch.testing.assert_close(other.scale, c * one.scale)
        assert set(one.codes.unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("value", "scheme"),
    [
        (lambda w: twn_weight(w, 0.7), "w=ternary/channel"),
        (lambda w: twn_weight(w, rows=False), "w=ternary/tensor"),
        (bitnet_weight, "T158"),
        (lambda w: terdit_weight(w, torch.tensor([-0.3])), "T158"),
        (binary_weight, "w=binary/channel"),
        (centred_weight, "w=binary/channel"),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 1000)])
def test_rounding_again_changes_nothing(value: object, scheme: str, shape: tuple[int, int]) -> None:
    w = value(torch.randn(shape).exp() * torch.randn(shape) * 0.07)  # type: ignore[operator]
    torch.testing.assert_close(rtn(w, scheme).dequantize(), w, rtol=3e-7, atol=0)


def test_zero_weights() -> None:
    w = torch.zeros(3, 8)
    assert not twn(w).value.any() and not absmean(w).value.any() and not binary_weight(w).any()
    assert float(alpha_at_first(w)) == pytest.approx(0.5 / 8**0.5)
    w[1] = torch.randn(8)
    assert float(alpha_at_first(w)) == pytest.approx(float(w.abs().mean()))
    assert not twn(w).value[0].any()


def test_values_are_exact_where_gradients_pass() -> None:
    x, y = torch.randn(1000, requires_grad=True), torch.randn(1000) * 1e-9
    assert torch.equal(straight(x, y), y)
    straight(x, y, 0.5).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 0.5).float())


def test_signs_and_steps() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    assert sign(x).tolist() == [-1, -1, 1, 1, 1]
    assert sign(x, at_zero=-1).tolist() == [-1, -1, -1, 1, 1]
    assert step(x).tolist() == [0, 0, 1, 1, 1]
    sign(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_gradients_of_weights() -> None:
    g = torch.randn(4, 6)
    w, alpha = torch.randn(4, 6, requires_grad=True), torch.tensor([0.7], requires_grad=True)
    for value in (twn_weight(w), bitnet_weight(w), binary_weight(w)):
        w.grad = None
        (value * g).sum().backward()
        assert torch.equal(w.grad, g)
    w.grad = None
    (terdit_weight(w, alpha) * g).sum().backward()
    torch.testing.assert_close(w.grad, 0.7 * g)
    assert float(alpha.grad) == pytest.approx(float((g * absmean(w).codes).sum()), rel=1e-5)
    w.grad = None
    (centred_weight(w, None) * g).sum().backward()  # what passes the sign goes through w - mean(w)
    torch.testing.assert_close(w.grad, g - g.mean(1, keepdim=True))


def test_terdit_learns_from_zero() -> None:
    w = torch.nn.Parameter(torch.zeros(6, 4))
    alpha = torch.nn.Parameter(alpha_at_first(w))
    value = terdit_weight(w, alpha)
    assert not value.any()
    value.sum().backward()
    assert bool((w.grad != 0).all())


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("threshold", [0.7, None])
def test_splitting_is_exact(rows: bool, threshold: float | None) -> None:
    w = torch.randn(16, 200) * torch.rand(16, 1) * 0.1 + 0.003
    t = twn(w, threshold, rows=rows)
    first, second = split_halves(w, t)
    torch.testing.assert_close(first + second, w, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(halves_weight(first, second, rows=rows), t.value, rtol=1e-5, atol=1e-7)
    alphas = [h.abs().mean(1 if rows else None) for h in (first, second)]
    torch.testing.assert_close(*alphas, rtol=1e-5, atol=0)


def test_splitting_of_rows_that_have_no_zeros_or_nothing_else() -> None:
    w = torch.stack((torch.ones(8), torch.zeros(8), torch.tensor([1.0, -1] * 4)))
    t = twn(w)
    torch.testing.assert_close(halves_weight(*split_halves(w, t)), t.value)


def test_bad_input() -> None:
    w = torch.randn(4, 32)
    with pytest.raises(DataError, match="has no halves"):
        split_halves(w, absmean(w))
    with pytest.raises(ShapeError, match="split by its own codes"):
        split_halves(w, twn(w[:, :8]))
    lopsided = torch.cat((torch.ones(1, 3), torch.full((1, 400), 0.3)), 1)
    with pytest.raises(DataError, match="outweigh"):
        split_halves(lopsided, Ternary((lopsided > 0.5).float(), torch.ones(1, 1)))
    with pytest.raises(SchemeError, match="threshold"):
        twn(w, "0.7")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        twn([1.0])  # type: ignore[arg-type]


def test_inputs_of_tokens() -> None:
    x = torch.randn(5, 64, requires_grad=True)
    y = token_int8(x)
    steps = x.detach().abs().amax(1, keepdim=True) / 127.5
    assert float(((y - x).detach().abs() / steps).max()) <= 0.5 + 1e-4
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
