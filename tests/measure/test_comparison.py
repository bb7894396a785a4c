"""Models against their references: the plain formulas, infinite divergences, and mistakes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from arrondi.errors import DataError, ShapeError
from arrondi.measure import Comparison, EncoderComparison, WindowBootstrap


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


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
    draw = WindowBootstrap([w[0] for w in comparison._windows], 0, 50, 0.95)
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


def test_an_infinite_divergence_is_said_as_it_is():
    reference, ids = random_logits(3, 9, 17), torch.randint(17, (3, 9), generator=torch.Generator().manual_seed(1))
    other = reference.clone()
    other[
        1, 4, (int(ids[1, 5]) + 1) % 17
    ] = -math.inf  # excludes a token that the reference has, and that does not come
    comparison = Comparison(resamples=200)
    comparison.add(reference, other, ids)
    result = comparison.summary()
    assert result.kl_mean == math.inf and result.kl_mean_interval == (0.0, math.inf)
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=0.1)
    document = result.to_dict()
    assert document["kl_mean"] is None and document["kl_mean_interval"] == [0.0, None]
    assert document["not_finite"]["kl_mean"] == document["not_finite"]["kl_mean_interval.1"] == "infinity"
    assert json.loads(json.dumps(document, allow_nan=False)) == document


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
