"""Reservoirs against their promise: bounded, whole rows, every row equally often."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from arrondi.calibration import Reservoir
from arrondi.errors import DataError, ShapeError


def numbered(start: int, stop: int) -> torch.Tensor:
    """Rows that say which they are: (k, -k)."""
    k = torch.arange(start, stop, dtype=torch.float32)
    return torch.stack((k, -k), dim=1)


def test_a_short_stream_is_kept_whole_and_in_order():
    reservoir = Reservoir(10)
    reservoir.observe(numbered(0, 4))
    reservoir.observe(numbered(4, 10))
    assert reservoir.seen == 10 and torch.equal(reservoir.rows(), numbered(0, 10))


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=12), capacity=st.integers(1, 30), seed=st.integers(0, 1000))
def test_it_is_bounded_distinct_and_whole_rows_however_the_stream_is_cut(cuts, capacity, seed):
    total = sum(cuts)
    reservoir, at_once = Reservoir(capacity, seed=seed), Reservoir(capacity, seed=seed)
    at_once.observe(numbered(0, total))
    start = 0
    for size in cuts:
        reservoir.observe(numbered(start, start + size))
        start += size
    assert reservoir.seen == total
    if total == 0:
        return
    rows = reservoir.rows()
    assert rows.shape == (min(total, capacity), 2)
    kept = rows[:, 0].tolist()
    assert len(set(kept)) == len(kept) and set(kept) <= set(range(total))
    assert torch.equal(rows[:, 1], -rows[:, 0])
    assert torch.equal(rows, at_once.rows())


def inclusion_p_value(counts: np.ndarray, trials: int, capacity: int) -> float:
    """χ² of how often each of N rows was kept. Rows of one sample exclude each other, hence the factor (N-1)/(N-k)."""
    n = len(counts)
    expected = trials * capacity / n
    statistic = float(((counts - expected) ** 2 / expected).sum()) * (n - 1) / (n - capacity)
    return float(stats.chi2.sf(statistic, n - 1))


def test_every_row_is_kept_equally_often():
    counts = np.zeros(60)
    for seed in range(1500):
        reservoir = Reservoir(12, seed=seed)
        for part in numbered(0, 60).split(17):
            reservoir.observe(part)
        counts[reservoir.rows()[:, 0].long().numpy()] += 1
    assert counts.sum() == 1500 * 12
    assert inclusion_p_value(counts, 1500, 12) > 1e-3


def test_the_first_rows_have_no_advantage():
    """One place and four rows: every row must hold it a quarter of the time, also those that came with the first."""
    counts = np.zeros(4)
    for seed in range(2000):
        reservoir = Reservoir(1, seed=seed)
        for part in numbered(0, 4).split([2, 1, 1]):
            reservoir.observe(part)
        counts[int(reservoir.rows()[0, 0])] += 1
    assert inclusion_p_value(counts, 2000, 1) > 1e-3


def test_merged_reservoirs_weigh_rows_by_what_each_side_saw():
    """20 and 100 rows: were the sides weighed equally, the first 20 would be kept five times as often."""
    counts = np.zeros(120)
    for seed in range(1500):
        a, b = Reservoir(12, seed=2 * seed), Reservoir(12, seed=2 * seed + 1)
        a.observe(numbered(0, 20))
        b.observe(numbered(20, 90))
        a.merge(b)
        a.observe(numbered(90, 120))  # and goes on as if it had seen it all
        assert a.seen == 120
        kept = a.rows()[:, 0].long().numpy()
        assert len(set(kept)) == 12
        counts[kept] += 1
    assert inclusion_p_value(counts, 1500, 12) > 1e-3


def test_merging_short_streams_keeps_everything():
    a, b, empty = Reservoir(10), Reservoir(10, seed=3), Reservoir(10)
    a.observe(numbered(0, 3))
    b.observe(numbered(3, 7))
    empty.merge(a)
    empty.merge(b)
    empty.merge(Reservoir(10))
    assert empty.seen == 7 and sorted(empty.rows()[:, 0].tolist()) == list(range(7))
    assert torch.equal(b.rows(), numbered(3, 7))


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    reservoir = Reservoir(3)
    reservoir.observe(numbered(0, 100))
    other = Reservoir(3, seed=1)
    other.observe(numbered(0, 9))
    reservoir.merge(other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_rows_keep_their_type_and_any_leading_shape(dtype):
    reservoir = Reservoir(100)
    x = torch.arange(2 * 3 * 4).reshape(2, 3, 4).to(dtype)
    reservoir.observe(x)
    assert reservoir.rows().dtype == dtype and torch.equal(reservoir.rows(), x.reshape(6, 4))


def test_reservoir_errors_name_the_tensor():
    reservoir = Reservoir(4, name="fc1")
    with pytest.raises(DataError, match="fc1: the reservoir is empty"):
        reservoir.rows()
    with pytest.raises(DataError, match="fc1: 2 of 6 values are NaN or infinite"):
        reservoir.observe(torch.tensor([[0.0, math.nan, math.inf], [1, 2, 3]]))
    assert reservoir.seen == 0
    reservoir.observe(torch.full((2, 3), 3e38))  # finite, though its sum is not
    with pytest.raises(ShapeError, match="fc1: rows have 2 features, earlier ones had 3"):
        reservoir.observe(torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="reservoirs of 4 and 5 rows"):
        reservoir.merge(Reservoir(5))
    with pytest.raises(ShapeError, match="capacity=0"):
        Reservoir(0)
    with pytest.raises(ShapeError, match="got a scalar"):
        reservoir.observe(torch.tensor(1.0))
