"""Metrics of single positions against independent computations and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from arrondi.errors import ShapeError
from arrondi.measure import kl_divergence, metrics, perplexity, token_nll, top1_agreement

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32))


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("vocabulary", [2, 50, 32000])
def test_uniform_logits_have_the_vocabulary_as_perplexity(vocabulary: int):
    nll = token_nll(torch.full((20, vocabulary), 3.5), torch.arange(20) % vocabulary)
    assert perplexity([nll]).perplexity == pytest.approx(vocabulary, rel=1e-5)


def test_nll_is_torchs_cross_entropy():
    logits, targets = random_logits(2, 9, 31), torch.arange(18).reshape(2, 9) % 31
    expected = torch.nn.functional.cross_entropy(logits.double().reshape(-1, 31), targets.reshape(-1), reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected.reshape(2, 9).float(), rtol=1e-5, atol=1e-6)


def test_kl_is_scipys():
    a, b = random_logits(4, 3, 57), random_logits(4, 3, 57, seed=1)
    expected = rel_entr(softmax(a.double().numpy(), -1), softmax(b.double().numpy(), -1)).sum(-1)
    np.testing.assert_allclose(kl_divergence(a, b).numpy(), expected, rtol=1e-6)
    assert not np.allclose(kl_divergence(b, a).numpy(), expected, rtol=0.1)  # the reference comes first


def test_kl_of_a_hair_is_still_right():
    """In float32 this would be rounding noise of 1e-6: to second order KL is half the variance of the difference."""
    a = random_logits(8, 2000)
    change = random_logits(8, 2000, seed=1) * 1e-4
    b = a.double() + change.double()
    p = torch.softmax(a.double(), -1)
    mean = (p * change).sum(-1, keepdim=True)
    expected = (p * (change - mean).square()).sum(-1) / 2
    assert float(expected.max()) < 1e-6
    torch.testing.assert_close(kl_divergence(a, b).double(), expected, rtol=5e-3, atol=0)


@given(a=LOGITS, b=LOGITS)
@example(a=np.zeros((3, 5), np.float32), b=np.full((3, 5), -80, np.float32))
@settings(max_examples=60, deadline=None)
def test_kl_is_not_negative_and_zero_only_of_itself(a: np.ndarray, b: np.ndarray):
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    assert bool((kl_divergence(x, y) >= 0).all())
    assert bool((kl_divergence(x, x) == 0).all())
    distance = (torch.softmax(x.double(), -1) - torch.softmax(y.double(), -1)).abs().sum(-1)
    assert bool((kl_divergence(x, y) * 2 + 1e-6 >= distance.square()).all())  # Pinsker


@pytest.mark.parametrize("shift", [-50.0, 7.0])
def test_a_constant_changes_nothing(shift: float):
    a, b, targets = random_logits(6, 40), random_logits(6, 40, seed=1), torch.arange(6)
    torch.testing.assert_close(token_nll(a + shift, targets), token_nll(a, targets), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl_divergence(a, b + shift), kl_divergence(a, b), rtol=1e-5, atol=1e-6)
    assert torch.equal(top1_agreement(a, b + shift), top1_agreement(a, b))


def test_forbidden_tokens():
    a, b = random_logits(2, 6), random_logits(2, 6, seed=1)
    masked_a, masked_b = a.clone(), b.clone()
    masked_a[:, 5] = masked_b[:, 5] = -math.inf
    torch.testing.assert_close(kl_divergence(masked_a, masked_b), kl_divergence(a[:, :5], b[:, :5]))
    assert bool(torch.isinf(kl_divergence(a, masked_b)).all())
    assert bool(torch.isfinite(kl_divergence(masked_a, b)).all())


def test_agreement_counts_the_same_favourite():
    a = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    b = torch.tensor([[0.0, 9.0, 8.0], [1.0, 2.0, 0.0]])
    assert top1_agreement(a, b).tolist() == [True, False]


def test_a_nan_agrees_with_nothing():
    a = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    b = a.clone()
    b[0, 1] = math.nan
    assert top1_agreement(a, b).tolist() == top1_agreement(b, b).tolist() == [False, True]
    assert kl_divergence(a, b).isnan().tolist() == [True, False]


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    a, b, targets = random_logits(3, 7, 20), random_logits(3, 7, 20, seed=1), torch.arange(21).reshape(3, 7) % 20
    nll, kl = token_nll(a, targets), kl_divergence(a, b)
    monkeypatch.setattr(metrics, "_CHUNK", 45)
    assert [len(chunk) for _, chunk in metrics._position_chunks(a)] == [2] * 10 + [1]
    torch.testing.assert_close(token_nll(a, targets), nll)
    torch.testing.assert_close(kl_divergence(a, b), kl)


def test_half_precision_logits_are_read_as_they_are():
    a, b = random_logits(4, 30).bfloat16(), random_logits(4, 30, seed=1).bfloat16()
    assert torch.equal(kl_divergence(a, b), kl_divergence(a.float(), b.float()))
    assert torch.equal(token_nll(a, torch.arange(4)), token_nll(a.float(), torch.arange(4)))


def test_shapes_that_do_not_match_are_named():
    with pytest.raises(ShapeError, match="one target each"):
        token_nll(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))
    for function in (kl_divergence, top1_agreement):
        with pytest.raises(ShapeError, match="same shape"):
            function(torch.zeros(3, 5), torch.zeros(3, 6))


def test_no_positions_give_no_numbers():
    assert token_nll(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert kl_divergence(torch.zeros(2, 0, 5), torch.zeros(2, 0, 5)).shape == (2, 0)
