"""Intervals: their coverage, the long way round, and values that are infinite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arrondi.errors import DataError
from arrondi.measure import WindowBootstrap, block_bootstrap, intervals, perplexity


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

    monkeypatch.setattr(intervals, "_RESAMPLED", 120)
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


@pytest.mark.parametrize("windows", [1, 6])
def test_an_infinite_value_is_in_the_resamples_that_drew_its_window(windows: int):
    """The sums against the long way: put the drawn windows together and take the mean and the quantile."""
    generator = np.random.default_rng(0)
    values = [torch.from_numpy(generator.random(24)) for _ in range(windows)]
    values[-1][7] = math.inf
    draw = WindowBootstrap(values, 3, 50, 0.95)
    parts = np.split(torch.cat(values).numpy(), np.flatnonzero(np.diff(draw.window_of)) + 1)
    long_way = [np.concatenate([np.tile(w, n) for w, n in zip(parts, times, strict=True)]) for times in draw.times]
    means = np.sort([x.mean() for x in long_way])
    assert math.isinf(means[-1]) and math.isfinite(means[0])
    assert draw.mean(torch.cat(values)) == math.inf
    found = draw.mean_interval(torch.cat(values))
    assert found == (pytest.approx(means[1]), math.inf)  # of 50, one lies below and one above 95 %
    tails = np.sort([np.sort(x)[math.ceil(0.99 * x.size) - 1] for x in long_way])
    assert draw.quantile_interval(torch.cat(values), 0.99) == (tails[1], tails[-2])


def test_a_value_that_is_no_number_makes_none_of_them_up():
    values = [torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 1.0])]
    draw = WindowBootstrap(values, 0, 50, 0.95)
    whole = torch.cat(values)
    found = [draw.mean(whole), *draw.mean_interval(whole), draw.quantile(whole, 0.5), *draw.quantile_interval(whole, 0.5)]  # fmt: skip
    assert all(math.isnan(x) for x in found)
