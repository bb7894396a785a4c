"""Metrics against independent computations, laws, and the coverage of their intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr, softmax

from arrondi.errors import DataError, ShapeError
from arrondi.evaluate import (
    Comparison,
    EncoderComparison,
    block_bootstrap,
    kl_divergence,
    metrics,
    perplexity,
    token_nll,
    top1_agreement,
)

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32))


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


# ── per position ──────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── intervals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def autoregressive(generator: np.random.Generator, n: int, memory: float) -> np.ndarray:
    """A stationary series of mean 0 in which each value remembers the one before."""
    noise = generator.standard_normal(n) * math.sqrt(1 - memory**2)
    series = np.empty(n)
    last = generator.standard_normal()
    for i in range(n):
        last = series[i] = memory * last + noise[i]
    return series


def test_bootstrap_covers_the_mean_of_a_dependent_series():
    generator = np.random.default_rng(0)
    trials = [autoregressive(generator, 600, 0.8) for _ in range(200)]

    def covered(block: int) -> float:
        inside = [low <= 0 <= high for low, high in (block_bootstrap(t, block=block, resamples=200) for t in trials)]
        return sum(inside) / len(inside)

    assert 0.86 <= covered(40) <= 0.99
    assert covered(1) < 0.6  # as if independent: three times too narrow


def test_bootstrap_of_independent_values_is_the_standard_error():
    values = np.random.default_rng(0).standard_normal(2000) * 3 + 1
    low, high = block_bootstrap(values, block=1, resamples=2000, seed=1)
    error = values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    narrow = block_bootstrap(values, block=1, resamples=2000, seed=1, confidence=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_bootstrap_takes_any_statistic_and_draws_whole_blocks(monkeypatch: pytest.MonkeyPatch):
    values = np.arange(12.0)
    drawn: list[np.ndarray] = []

    def spread(rows: np.ndarray) -> np.ndarray:
        drawn.append(rows)
        return rows.max(axis=-1) - rows.min(axis=-1)

    monkeypatch.setattr(metrics, "_RESAMPLED", 120)
    assert block_bootstrap(values, spread, block=12, resamples=35) == (11.0, 11.0)
    assert [len(rows) for rows in drawn] == [10, 10, 10, 5]
    steps = np.diff(np.concatenate(drawn), axis=-1) % 12
    assert bool((steps == 1).all())
    assert block_bootstrap(np.array([4.0]), block=5) == (4.0, 4.0)


def test_bootstrap_is_reproducible_and_leaves_the_global_seed_alone():
    values = np.random.default_rng(0).standard_normal(100)
    np.random.seed(5)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = block_bootstrap(values, block=10, seed=3)
    assert block_bootstrap(values, block=10, seed=3) == first
    assert block_bootstrap(values, block=10, seed=4) != first
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize("bad", [{"block": 0}, {"block": 1, "resamples": 0}, {"block": 1, "confidence": 1.0}])
def test_bootstrap_names_bad_parameters(bad: dict):
    with pytest.raises(DataError, match="between 0 and 1"):
        block_bootstrap([1.0, 2.0], **bad)


def test_bootstrap_needs_a_value():
    with pytest.raises(DataError, match="got none"):
        block_bootstrap([], block=1)


def test_windows_that_differ_widen_the_interval():
    """Positions of one window share its difficulty; the interval must cover the mean over windows all the same."""
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(150):
        difficulty = generator.standard_normal(40)
        windows = [torch.from_numpy(2 + d + 0.1 * generator.standard_normal(25)) for d in difficulty]
        low, high = perplexity(windows, resamples=200, seed=trial).perplexity_interval
        inside += low <= math.exp(2) <= high
    assert 0.86 <= inside / 150 <= 0.99


# ── language models ───────────────────────────────────────────────────────────────────────────────────────────────────


def compared(noise: float, windows: int = 12, tokens: int = 20, vocabulary: int = 30, **options) -> Comparison:
    comparison = Comparison(resamples=200, **options)
    reference = random_logits(windows, tokens, vocabulary)
    ids = torch.randint(vocabulary, (windows, tokens), generator=torch.Generator().manual_seed(2))
    comparison.add(reference, reference + noise * random_logits(windows, tokens, vocabulary, seed=3), ids)
    return comparison


def test_position_t_predicts_token_t_plus_one():
    ids = torch.tensor([[1, 2, 0, 1]])
    sure = 50.0 * torch.nn.functional.one_hot(ids.roll(-1, dims=1), 3).float()
    comparison = Comparison()
    comparison.add(sure, sure, ids)
    result = comparison.summary()
    assert result.perplexity == pytest.approx(1.0)
    assert result.tokens == 3


def test_summary_is_the_plain_formulas():
    reference, ids = random_logits(3, 9, 17), torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(1))
    other = reference + random_logits(3, 9, 17, seed=4) * 0.3
    comparison = Comparison()
    comparison.add(reference[:2], other[:2], ids[:2])
    comparison.add(reference[2:], other[2:], ids[2:])
    result = comparison.summary()
    targets = ids[:, 1:].reshape(-1)
    ppl = [
        float(torch.nn.functional.cross_entropy(x[:, :-1].reshape(-1, 17), targets).exp()) for x in (reference, other)
    ]
    p, q = (softmax(x[:, :-1].double().numpy(), -1) for x in (reference, other))
    kl = np.sort(rel_entr(p, q).sum(-1).reshape(-1))
    assert result.reference_perplexity == pytest.approx(ppl[0], rel=1e-5)
    assert result.perplexity == pytest.approx(ppl[1], rel=1e-5)
    assert result.perplexity_increase == pytest.approx(ppl[1] / ppl[0] - 1, rel=1e-4)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert result.kl_p99 == pytest.approx(kl[math.ceil(0.99 * 24) - 1], rel=1e-5)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert result.tokens == 24


def test_a_model_against_itself():
    result = compared(0.0).summary()
    assert (result.kl_mean, result.kl_p99, result.top1_agreement, result.perplexity_increase) == (0, 0, 1, 0)
    assert result.kl_mean_interval == (0, 0)
    assert result.perplexity == result.reference_perplexity


def test_more_noise_costs_more():
    results = [compared(noise).summary() for noise in (0.01, 0.1, 0.4)]
    assert results[0].kl_mean < results[1].kl_mean < results[2].kl_mean
    assert results[0].top1_agreement > results[1].top1_agreement > results[2].top1_agreement


def test_intervals_hold_their_numbers_and_do_not_depend_on_the_run():
    result = compared(0.3, seed=5).summary()
    for name in ("perplexity", "reference_perplexity", "perplexity_increase", "kl_mean", "kl_p99", "top1_agreement"):
        low, high = getattr(result, f"{name}_interval")
        assert low <= getattr(result, name) <= high
        assert low < high
    assert compared(0.3, seed=5).summary() == result
    assert compared(0.3, seed=6).summary() != result
    wide = result.kl_mean_interval
    narrow = compared(0.3, seed=5, confidence=0.5).summary().kl_mean_interval
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_window_bootstrap_is_resampling_windows():
    """The sums over windows against the long way: draw windows, put their positions together, take the statistic."""
    comparison = compared(0.3)
    draw = metrics._Draw([w[0] for w in comparison._windows], 0, 50, 0.95)
    windows = [w[2].double().numpy() for w in comparison._windows]
    kl = torch.cat([w[2] for w in comparison._windows])
    long_way = [np.concatenate([np.tile(w, n) for w, n in zip(windows, times, strict=True)]) for times in draw.times]
    assert draw.mean_interval(kl) == pytest.approx(np.quantile([x.mean() for x in long_way], [0.025, 0.975]))
    ranked = [np.sort(x)[math.ceil(0.9 * x.size) - 1] for x in long_way]
    assert draw.quantile_interval(kl, 0.9) == pytest.approx(np.quantile(ranked, [0.025, 0.975]))


def test_one_window_still_has_an_interval():
    low, high = compared(0.3, windows=1, tokens=200).summary().kl_mean_interval
    assert 0 < low < high


def test_only_numbers_of_positions_are_kept():
    comparison = compared(0.1, windows=3, tokens=20, vocabulary=500)
    assert sum(w.numel() for w in comparison._windows) == 3 * 19 * 4
    assert {w.dtype for w in comparison._windows} == {torch.float32}


def test_the_summary_is_json():
    result = compared(0.1).summary()
    assert list(result.to_dict()) == [
        "perplexity", "perplexity_interval", "reference_perplexity", "reference_perplexity_interval",
        "perplexity_increase", "perplexity_increase_interval", "kl_mean", "kl_mean_interval", "kl_p99",
        "kl_p99_interval", "top1_agreement", "top1_agreement_interval", "tokens",
    ]  # fmt: skip
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_mistakes_in_adding_are_named():
    comparison = Comparison()
    with pytest.raises(DataError, match="Nothing was measured"):
        comparison.summary()
    with pytest.raises(ShapeError, match=r"\(B, T, V\)"):
        comparison.add(torch.zeros(5, 7), torch.zeros(5, 7), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="T ≥ 2"):
        comparison.add(torch.zeros(1, 1, 7), torch.zeros(1, 1, 7), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ShapeError, match="same text"):
        comparison.add(torch.zeros(1, 3, 7), torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.int64))


# ── encoders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_encoder_numbers_by_hand():
    reference = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [9.0, 9.0]]])
    other = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[4.0, 3.0], [-9.0, 7.0]]])
    comparison = EncoderComparison()
    comparison.add(reference, other, mask=torch.tensor([[1, 1], [1, 0]]))
    result = comparison.summary()
    sentence = (0.5 * 0.5 + 1 * 0.5) / math.sqrt((0.25 + 1) * 0.5)  # means (0.5, 1) and (0.5, 0.5)
    assert result.token_cosine == pytest.approx((1 + 1 + 24 / 25) / 3)
    assert result.sentence_cosine == pytest.approx((sentence + 24 / 25) / 2)
    assert result.relative_error == pytest.approx((0 + 1 + 2) / (1 + 4 + 25))
    assert (result.tokens, result.sentences) == (3, 2)
    assert result.to_dict()["token_cosine_interval"] == list(result.token_cosine_interval)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_encoder_against_itself_and_scaled():
    hidden = random_logits(6, 10, 32)
    same, scaled = EncoderComparison(), EncoderComparison()
    same.add(hidden, hidden)
    scaled.add(hidden, 1.5 * hidden, torch.zeros(6, 10, dtype=torch.int64))  # ids are taken and not used
    assert same.summary().relative_error == 0
    assert same.summary().token_cosine == pytest.approx(1)
    assert scaled.summary().token_cosine == pytest.approx(1)
    assert scaled.summary().sentence_cosine == pytest.approx(1)
    assert scaled.summary().relative_error == pytest.approx(0.25)


def test_encoder_intervals_hold_their_numbers():
    hidden = random_logits(20, 10, 32)
    comparison = EncoderComparison(seed=1)
    comparison.add(hidden, hidden + 0.3 * random_logits(20, 10, 32, seed=1))
    result = comparison.summary()
    for name in ("token_cosine", "sentence_cosine", "relative_error"):
        low, high = getattr(result, f"{name}_interval")
        assert low < getattr(result, name) < high
    assert result.sentence_cosine > result.token_cosine or result.relative_error > 0.05


def test_encoder_takes_one_vector_for_a_sentence():
    comparison = EncoderComparison()
    comparison.add(torch.eye(3), torch.eye(3) * 2)
    assert (comparison.summary().tokens, comparison.summary().sentence_cosine) == (3, pytest.approx(1))


def test_encoder_mistakes_are_named():
    with pytest.raises(DataError, match="Nothing was measured"):
        EncoderComparison().summary()
    with pytest.raises(ShapeError, match="mask"):
        EncoderComparison().add(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), mask=torch.ones(2, 4))
