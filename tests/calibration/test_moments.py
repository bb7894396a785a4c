"""Half-vectors against identities, second moments against the plain product, reservoirs against their promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from arrondi.calibration import Reservoir, SecondMoment, unvech, vech
from arrondi.errors import DataError, ShapeError

SIZES = pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 600])  # around and across the panels of 256 rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    a = torch.randn(n, n, generator=generator(seed), dtype=dtype)
    return a + a.T


# Half-vectors


def test_vech_lists_the_lower_triangle_row_by_row():
    a = torch.tensor([[1.0, -1, -1], [2, 3, -1], [4, 5, 6]])
    assert vech(a).tolist() == [1, 2, 3, 4, 5, 6]


@SIZES
def test_entry_i_j_is_at_i_i_plus_1_over_2_plus_j(n):
    a = symmetric(n)
    packed = vech(a)
    i, j = np.tril_indices(n)
    np.testing.assert_array_equal(packed.numpy(), a.numpy()[i, j])
    np.testing.assert_array_equal(packed.numpy()[i * (i + 1) // 2 + j], a.numpy()[i, j])


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_unpack_of_pack_is_the_identity_bit_for_bit(n, dtype):
    a = (symmetric(n) * 100).to(dtype)
    restored = unvech(vech(a))
    assert restored.dtype == dtype and torch.equal(restored, a) and torch.equal(restored, restored.T)
    assert torch.equal(vech(restored), vech(a))


def test_unpack_keeps_negative_zeros_and_nan_payloads():
    packed = torch.tensor([0.0, -0.0, 0.0, -0.0, math.nan, -0.0])
    bits = packed.view(torch.int32)
    assert torch.equal(vech(unvech(packed)).view(torch.int32), bits)
    full = unvech(packed)
    assert torch.equal(full.T.contiguous().view(torch.int32), full.view(torch.int32))


def test_batches_are_packed_matrix_by_matrix():
    batch = torch.stack([symmetric(5, seed) for seed in range(6)]).reshape(2, 3, 5, 5)
    packed = vech(batch)
    assert packed.shape == (2, 3, 15)
    assert torch.equal(packed[1, 2], vech(batch[1, 2]))
    assert torch.equal(unvech(packed), batch)


def test_duplication_matrix_identities():
    """vec A = D vech A; D'D = 1 on diagonal entries, 2 elsewhere; D D⁺ = (I + K)/2 (Magnus and Neudecker 1980)."""
    n, m = 6, 21
    duplication = torch.stack([unvech(e).reshape(-1) for e in torch.eye(m, dtype=torch.float64)], dim=1)
    weights = vech(torch.full((n, n), 2.0, dtype=torch.float64) - torch.eye(n, dtype=torch.float64))
    a = symmetric(n, dtype=torch.float64)
    assert torch.equal(duplication @ vech(a), a.reshape(-1))
    assert torch.equal(duplication.T @ duplication, torch.diag(weights))
    commutation = torch.eye(n * n, dtype=torch.float64).reshape(n, n, n * n).transpose(0, 1).reshape(n * n, n * n)
    expected = (torch.eye(n * n, dtype=torch.float64) + commutation) / 2
    assert torch.allclose(duplication @ torch.linalg.pinv(duplication), expected, atol=1e-12)


@settings(deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_packed_dot_is_the_frobenius_product(n, seed):
    a, b = symmetric(n, seed, torch.float64), symmetric(n, seed + 1, torch.float64)
    weights = vech(2 - torch.eye(n, dtype=torch.float64))  # off-diagonal entries count twice
    assert torch.allclose((weights * vech(a) * vech(b)).sum(), (a * b).sum(), rtol=1e-12, atol=1e-12)
    assert torch.allclose((weights.sqrt() * vech(a)).norm(), a.norm(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3)])
def test_vech_refuses_what_is_not_square(shape):
    with pytest.raises(ShapeError, match=r"square matrix, got shape \("):
        vech(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (2,), (5, 4)])
def test_unvech_refuses_lengths_that_are_not_triangular(shape):
    with pytest.raises(ShapeError, match=r"n\(n\+1\)/2 entries"):
        unvech(torch.zeros(shape))


# Second moments


@SIZES
def test_moment_is_the_sum_of_outer_products(n):
    """Small whole numbers make every float32 sum exact, so the panels must give the product to the last bit."""
    x = torch.randint(-8, 9, (64, n), generator=generator()).float()
    moment = SecondMoment(n)
    moment.update(x)
    exact = x.double().T @ x.double()
    assert moment.tokens == 64 and moment.packed.dtype == torch.float32 and moment.packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(moment.matrix(torch.float64), exact)
    assert torch.equal(moment.packed, vech(exact).float())
    assert torch.equal(moment.diagonal(), exact.diagonal().float())
    assert moment.trace == float(exact.trace())
    assert moment.matrix().dtype == torch.float32 and torch.equal(moment.matrix(), moment.matrix().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_accumulated_in_float32(dtype):
    """1000 rows of 300 whose squares overflow float16 and whose sum bfloat16 cannot hold."""
    x = torch.full((10, 100, 3), 300.0, dtype=dtype)
    moment = SecondMoment(3)
    moment.update(x)
    assert moment.tokens == 1000
    assert torch.equal(moment.matrix(), torch.full((3, 3), 9e7))


def test_streaming_equals_one_shot():
    x = torch.randn(500, 330, generator=generator())
    once, streamed = SecondMoment(330), SecondMoment(330)
    once.update(x)
    for part in x.split([1, 0, 99, 300, 100]):
        streamed.update(part)
    exact = x.double().T @ x.double()
    bound = 500 * torch.finfo(torch.float32).eps * (x.double().abs().T @ x.double().abs())  # of any order of summation
    assert streamed.tokens == once.tokens == 500
    for moment in (once, streamed):
        assert bool(((moment.matrix(torch.float64) - exact).abs() <= bound).all())


def test_merge_equals_joint_and_leaves_the_other_alone():
    x = torch.randint(-8, 9, (90, 300), generator=generator()).float()
    a, b, joint = SecondMoment(300, name="a"), SecondMoment(300, name="b"), SecondMoment(300)
    a.update(x[:30])
    b.update(x[30:])
    joint.update(x)
    before = b.packed.clone()
    both = a + b
    assert both.name == "a" and both.tokens == 90 and torch.equal(both.packed, joint.packed)
    assert a.tokens == 30  # the sum is a new one
    a.merge(b)
    assert a.tokens == 90 and torch.equal(a.packed, joint.packed)
    assert b.tokens == 60 and torch.equal(b.packed, before)


def test_the_same_input_gives_the_same_bits():
    x = torch.randn(300, 350, generator=generator())
    packed = []
    for _ in range(3):
        moment = SecondMoment(350)
        moment.update(x)
        packed.append(moment.packed)
    assert torch.equal(packed[0], packed[1]) and torch.equal(packed[0], packed[2])


@settings(deadline=None)
@given(tokens=st.integers(1, 40), n=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_moment_is_positive_semidefinite(tokens, n, seed):
    moment = SecondMoment(n)
    moment.update(torch.randn(tokens, n, generator=generator(seed)))
    eigenvalues = torch.linalg.eigvalsh(moment.matrix(torch.float64))
    assert float(eigenvalues.min()) >= -1e-6 * float(eigenvalues.max())


def test_state_is_half_a_matrix_and_restores():
    moment = SecondMoment(40, name="fc1")
    moment.update(torch.randn(9, 40, generator=generator()))
    restored = SecondMoment.from_packed(moment.packed, moment.tokens, name="fc1")
    assert restored.n == 40 and restored.tokens == 9 and torch.equal(restored.packed, moment.packed)
    restored.update(torch.ones(1, 40))
    assert not torch.equal(restored.packed, moment.packed)  # a copy
    assert repr(moment) == "SecondMoment(n=40, tokens=9, name='fc1')"


@pytest.mark.parametrize("place", [0, 259])  # in the first panel, and in the last
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_refused_before_anything_is_added(bad, place):
    moment = SecondMoment(260, name="layers.3.mlp.down_proj")
    x = torch.randn(20, 260, generator=generator())
    moment.update(x)
    before = moment.packed.clone()
    x[7, place] = bad
    with pytest.raises(DataError, match=r"layers\.3\.mlp\.down_proj: 1 of 5200 values are NaN or infinite"):
        moment.update(x)
    assert torch.equal(moment.packed, before) and moment.tokens == 20


def test_overflowing_sums_are_refused():
    moment = SecondMoment(2, name="x")
    with pytest.raises(DataError, match=r"x: squares of values up to 1e\+20 overflow float32"):
        moment.update(torch.tensor([[1e20, 1.0]]))
    moment.update(torch.tensor([[1.5e19, 0.0]]))
    with pytest.raises(DataError, match="overflow"):  # each batch is fine, their sum is not
        moment.update(torch.tensor([[1.5e19, 0.0]]))
    assert moment.tokens == 1 and math.isfinite(moment.trace)


def test_wrong_shapes_and_types_are_refused():
    moment = SecondMoment(3, name="x")
    with pytest.raises(ShapeError, match=r"x: the last axis must have 3 features, got shape \(4, 2\)"):
        moment.update(torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="got shape"):
        moment.update(torch.tensor(1.0))
    with pytest.raises(DataError, match=r"got torch\.int64"):
        moment.update(torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ShapeError, match="cannot add a moment of 4 features to one of 3"):
        moment.merge(SecondMoment(4))
    with pytest.raises(ShapeError, match="at least one feature"):
        SecondMoment(0)
    with pytest.raises(ShapeError, match=r"expected n\(n\+1\)/2 numbers"):
        SecondMoment.from_packed(torch.zeros(4), 1)
    assert moment.tokens == 0


def test_autograd_does_not_follow():
    x = torch.randn(4, 3, generator=generator(), requires_grad=True)
    moment = SecondMoment(3)
    moment.update(x)
    assert not moment.packed.requires_grad


# Reservoirs


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
