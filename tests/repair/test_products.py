"""Measures of products, and the curvature of predictions: what must hold of them."""

from __future__ import annotations

import torch

from arrondi.repair.curvature import Curved, factors
from arrondi.repair.products import correlation, disorder, weighted


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_order_of_scores() -> None:
    scores = numbers(2, 6, 9)
    close = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert disorder(close, close + 0.01) == 0  # gaps are wider than the margin, and the order is kept
    assert disorder(close, close.flip(1)) > disorder(close, 0 * close) > 0
    turned = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    noisy = scores + 0.5 * numbers(2, 6, 9, seed=2)
    assert torch.allclose(disorder(scores, noisy), disorder(scores[..., turned], noisy[..., turned]))
    assert disorder(scores, noisy) > disorder(scores, scores)


def test_channels_add_up_and_are_judged_alone() -> None:
    o, given, slope = numbers(3, 5, 4), numbers(3, 5, 4, seed=1), numbers(3, 5, 4, seed=2)
    assert torch.allclose(weighted(o, given, slope, -1).sum(), weighted(o, given, slope))
    assert weighted(o, o, slope) == 0
    other = given.clone()
    other[..., 2] = o[..., 2]
    for measure in (lambda g: weighted(o, g, slope, -1), lambda g: correlation(o, g, -1)):
        better = measure(other) > measure(given)
        assert better.tolist() == [False, False, True, False]


def test_correlation_sees_no_offset_but_a_wrong_length() -> None:
    o = numbers(4, 30)
    assert torch.allclose(correlation(o, o + 3), torch.ones(()), atol=1e-5)
    assert correlation(o, 1.01 * o) > 0.999 > correlation(o, 1.5 * o)


def test_factors_are_the_second_derivative_of_the_divergence() -> None:
    first, second = numbers(6, 7, seed=3), numbers(5, 6, seed=4)
    parts = [lambda z: torch.tanh(z @ first.T), lambda z: z @ second.T]
    z = numbers(3, 7, seed=5)
    found = factors(parts, z, 5, torch.Generator().manual_seed(0))
    assert [tuple(f.shape) for f in found] == [(5, 3, 7), (5, 3, 6), (5, 3, 5)]

    def divergence(x: torch.Tensor, k: int) -> torch.Tensor:
        wanted = parts[1](parts[0](z[k])).log_softmax(0)
        return (wanted.exp() * (wanted - parts[1](parts[0](x)).log_softmax(0))).sum()

    for k in range(3):
        exact = torch.autograd.functional.hessian(lambda x, k=k: divergence(x, k), z[k])
        own = found[0][:, k].float()
        assert torch.allclose(own.T @ own, exact, atol=2e-2 * float(exact.abs().max()))  # bfloat16


def test_drawn_factors_are_right_on_average() -> None:
    weight, z = numbers(8, 4, seed=6), numbers(2, 4, seed=7)
    exact = factors([lambda x: x @ weight.T], z, 8, torch.Generator().manual_seed(0))[0].float()
    drawn = [factors([lambda x: x @ weight.T], z, 7, torch.Generator().manual_seed(s))[0].float() for s in range(300)]
    mean = sum(torch.einsum("dni,dnj->nij", f, f) for f in drawn) / len(drawn)
    wanted = torch.einsum("dni,dnj->nij", exact, exact)
    assert (mean - wanted).norm() < 0.1 * wanted.norm()


def test_the_curved_loss_begins_at_one_and_follows_its_directions() -> None:
    low, errors = torch.zeros(1, 6, 3), numbers(6, 3, seed=8)
    low[..., 0] = 1
    curved = Curved.of(low, 0.25)
    curved.begin(errors)
    every = torch.arange(6)
    assert torch.allclose(curved(errors, every), torch.ones(()))
    elsewhere = errors + torch.tensor([0.0, 5.0, 5.0])
    assert torch.allclose(curved(elsewhere, every), torch.ones(()))
    assert curved(2 * errors, every) > 3.9
