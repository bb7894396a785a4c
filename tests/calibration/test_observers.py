"""Observers: a contract for all of them, then each against an independent way to find its range.

The second way is, by kind: `torch.sort` (percentile), `numpy.histogram` (histogram), a blind search over fake-quantized
samples and the exact optima of the density (mse, cosine), the definition written out as loops (kl).
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, optimize
from scipy.special import ndtri
from scipy.stats import norm

from arrondi.calibration import NEEDS_GRID, OBSERVERS, Observer, get_observer, histogram_filter
from arrondi.calibration.range_rules import _divergences
from arrondi.errors import DataError, SchemeError, ShapeError
from arrondi.formats.optimal import optimal_uniform
from tests.cases import each_once

INT8 = {"qmin": -128, "qmax": 127, "symmetric": True}
KINDS = pytest.mark.parametrize("kind", list(OBSERVERS))
PER_CHANNEL = ["min-max", "moving-average", "percentile", "mse", "cosine"]
ORDERLESS = ["min-max", "percentile", "histogram", "mse", "cosine"]  # what they keep depends on the values alone


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of short operations: on a busy machine, waiting for a second thread would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str, **options: object) -> Observer:
    return get_observer(kind)(**(INT8 if kind in NEEDS_GRID else {}), **options)


def observed(observer: Observer, *batches: torch.Tensor) -> tuple[float, float]:
    for batch in batches:
        observer.observe(batch)
    low, high = observer.range()
    return float(low), float(high)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=generator(seed))


def laplace(n: int, seed: int = 0) -> torch.Tensor:
    g = generator(seed)
    return torch.empty(n).exponential_(generator=g) * torch.sign(torch.rand(n, generator=g) - 0.5)


def share(x: torch.Tensor, low: float, high: float) -> float:
    """Share of the values in [low, high], ends included."""
    return float(((x.double() >= low) & (x.double() <= high)).double().mean())


def fake_quantized(x: torch.Tensor, low: float, high: float, qmin: int, qmax: int, symmetric: bool) -> np.ndarray:
    """x̂ on the grid of a range, by the affine rule written out: divide, round, add the zero point, clip, and back."""
    values = x.double().numpy()
    low, high = (low, high) if symmetric else (min(low, 0.0), max(high, 0.0))
    scale = (high - low) / (qmax - qmin)
    zero = 0 if symmetric else min(max(round(qmin - low / scale), qmin), qmax)
    return ((np.round(values / scale) + zero).clip(qmin, qmax) - zero) * scale


def cosine_between(x: torch.Tensor, y: np.ndarray) -> float:
    values = x.double().numpy()
    return float(values @ y / np.sqrt((values @ values) * max(y @ y, 1e-300)))


finite_floats = st.floats(-(2.0**60), 2.0**60, width=32)
samples = arrays(np.float32, st.integers(1, 200), elements=finite_floats)


# What holds for every kind


@KINDS
def test_range_is_float64_ordered_and_inside_the_data_or_symmetric(kind):
    x = gaussian(5000) + 0.5
    observer = make(kind)
    before = x.clone()
    observer.observe(x.reshape(5, 10, 100))
    low, high = observer.range()
    assert low.shape == high.shape == () and low.dtype == high.dtype == torch.float64
    assert -float(x.abs().max()) <= float(low) < float(high) <= float(x.abs().max())
    assert observer.seen == 5000 and observer.kind == kind
    assert torch.equal(x, before)


@KINDS
def test_range_can_be_asked_twice_and_batches_can_follow(kind):
    observer = make(kind)
    x = gaussian(4000)
    first = observed(observer, x)
    assert observed(observer) == first
    later = observed(observer, 3 * x)
    assert later[1] > first[1]


@KINDS
def test_nothing_observed_is_an_error(kind):
    observer = make(kind, name="layers.0.act")
    with pytest.raises(DataError, match=r"layers\.0\.act: no values were observed"):
        observer.range()
    observer.observe(torch.zeros(0, 3))
    with pytest.raises(DataError, match="no values were observed"):
        observer.range()


@pytest.mark.parametrize(
    ("kind", "dtype"), each_once(OBSERVERS, [torch.float16, torch.bfloat16, torch.float32, torch.float64]), ids=str
)
def test_non_finite_values_name_the_tensor_and_change_nothing(kind, dtype):
    clean, dirty = make(kind), make(kind, name="fc1.input")
    x = gaussian(1000).to(dtype)
    y = x.clone()
    y[3], y[7], y[9] = math.nan, math.inf, -math.inf
    dirty.observe(x)
    with pytest.raises(DataError, match=r'fc1\.input: 3 of 1000 values are NaN or infinite.*nan_policy="omit"'):
        dirty.observe(y)
    assert observed(dirty) == observed(clean, x) and dirty.seen == 1000


@pytest.mark.parametrize(
    ("kind", "dtype"), each_once(OBSERVERS, [torch.float16, torch.bfloat16, torch.float32]), ids=str
)
def test_omitting_drops_and_counts_them(kind, dtype):
    x = gaussian(1000).to(dtype)
    dirty = torch.cat((x, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)))[
        torch.randperm(1003, generator=generator())
    ]
    observer = make(kind, nan_policy="omit")
    observer.observe(torch.tensor([math.nan, math.inf], dtype=dtype))  # nothing but them
    observer.observe(dirty)
    assert observer.omitted == 5 and observer.seen == 1000
    assert observed(observer) == observed(make(kind), x)


@KINDS
def test_what_would_be_infinite_in_float32_counts_as_infinite(kind):
    with pytest.raises(DataError, match="1 of 2 values"):
        make(kind).observe(torch.tensor([1.0, 1e300], dtype=torch.float64))


@KINDS
def test_frozen_observers_do_not_move(kind):
    observer = make(kind)
    first = observed(observer, gaussian(100))
    observer.frozen = True
    assert observed(observer, torch.full((10,), 50.0)) == first and observer.seen == 100


@pytest.mark.parametrize(("kind", "value"), each_once(OBSERVERS, [3.0, -3.0, 1e-38, -(2.0**100)]))
def test_a_constant_gives_a_range_that_reaches_it(kind, value):
    low, high = observed(make(kind), torch.full((20,), value))
    constant = float(torch.tensor(value))
    assert low <= high
    assert min(abs(low - constant), abs(high - constant)) <= 0.01 * abs(constant)  # mse may prefer a rounder step


@KINDS
def test_all_zeros_give_zero(kind):
    low, high = observed(make(kind), torch.zeros(5, 5), torch.zeros(3))
    assert low == high == 0


@KINDS
def test_float16_bfloat16_and_integers_are_taken_at_their_values(kind):
    x = (gaussian(3000) * 10).round()
    expected = observed(make(kind), x)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64):
        assert observed(make(kind), x.to(dtype)) == expected


@pytest.mark.parametrize("kind", ORDERLESS)
def test_batches_can_be_cut_and_ordered_anyhow(kind):
    x = torch.cat((gaussian(3000), 1e3 * gaussian(30, 1), 1e-3 * gaussian(300, 2)))
    expected = observed(make(kind), x)
    shuffled = x[torch.randperm(len(x), generator=generator())]
    assert observed(make(kind), *shuffled.split(123)) == expected
    assert observed(make(kind), *x.sort().values.split([1, 5, 3324])) == expected
    assert observed(make(kind), *x.sort(descending=True).values.split(1000)) == expected


@pytest.mark.parametrize("kind", ORDERLESS)
@pytest.mark.parametrize("axis", [None, 1])
def test_merged_observers_equal_one_that_saw_it_all(kind, axis):
    if axis is not None and kind not in PER_CHANNEL:
        return
    x = gaussian(4000).reshape(1000, 4) * torch.tensor([1.0, 1e-4, 30.0, 1e4])
    a, b, joint, empty = (make(kind, axis=axis) for _ in range(4))
    for observer, part in ((a, x[:300]), (b, x[300:] * 2), (joint, x[:300]), (joint, x[300:] * 2)):
        observer.observe(part)
    kept = [v.clone() for v in b.range()]
    a.merge(b)
    a.merge(empty)
    empty.merge(a)
    for observer in (a, empty):
        assert observer.seen == 4000
        assert all(torch.equal(u, v) for u, v in zip(observer.range(), joint.range(), strict=True))
    assert all(torch.equal(u, v) for u, v in zip(b.range(), kept, strict=True))


@pytest.mark.parametrize("axis", [None, 0])
def test_merging_leaves_the_other_observer_alone(axis):
    """Beside 1e20 the small values would count as zero; in their own observer they must not."""
    large, small = make("percentile", p=0.3, axis=axis), make("percentile", p=0.3, axis=axis)
    assert observed(small, torch.tensor([[1e-20, 2e-20, 3e-20]])) == pytest.approx((2e-20, 2e-20), rel=2**-8, abs=0)
    large.observe(torch.tensor([[1e20]]))
    large.merge(small)
    assert observed(small) == pytest.approx((2e-20, 2e-20), rel=2**-8, abs=0)
    assert int(large.state.counts.sum()) == 4 and int(large.state.counts[0, large.state.half]) == 3


def test_kinds_that_depend_on_order_refuse_to_merge():
    for kind in ("moving-average", "kl"):
        with pytest.raises(SchemeError, match=f"cannot merge a {kind} observer"):
            make(kind).merge(make(kind))
    with pytest.raises(SchemeError, match="cannot merge a mse observer into a min-max one"):
        make("min-max").merge(make("mse"))
    a, b = make("min-max", axis=0), make("min-max", axis=0)
    a.observe(torch.ones(2, 3))
    b.observe(torch.ones(3, 3))
    with pytest.raises(ShapeError, match="cannot merge 3 channels into 2"):
        a.merge(b)


@pytest.mark.parametrize(("kind", "factor"), each_once(OBSERVERS, [2.0**-20, 4.0, 2.0**30]))
def test_scaling_by_a_power_of_two_scales_the_range_exactly(kind, factor):
    x = laplace(3000) + 0.25
    low, high = observed(make(kind), x)
    assert observed(make(kind), x * factor) == (low * factor, high * factor)


@pytest.mark.parametrize(("kind", "factor"), each_once(OBSERVERS, [3.0, 0.7]))
def test_scaling_by_anything_scales_the_range(kind, factor):
    x = gaussian(20000)
    low, high = observed(make(kind), x)
    scaled = observed(make(kind), x * factor)
    assert scaled == pytest.approx(
        (low * factor, high * factor), rel=0.03
    )  # the flat bottoms of mse and kl move a little


@KINDS
def test_state_does_not_grow_with_the_data(kind):
    def numbers(observer: Observer) -> int:
        owners = [observer, *([observer.state] if observer.state is not None else [])]
        values = [getattr(owner, slot) for owner in owners for slot in type(owner).__slots__]
        return sum(v.numel() for v in values if isinstance(v, torch.Tensor))

    observer = make(kind)
    observer.observe(gaussian(1000))
    first = numbers(observer)
    assert first <= 2 * 48 * 1024 + 4
    for seed in range(1, 30):
        observer.observe(gaussian(5000, seed))
    assert numbers(observer) <= max(first, 4 * 2048 + 2)


@KINDS
def test_autograd_does_not_follow(kind):
    low, _ = [v.requires_grad for v in (lambda o: (o.observe(gaussian(50).requires_grad_()), o.range())[1])(make(kind))]
    assert not low


# Channels


@pytest.mark.parametrize(
    ("kind", "place"), each_once(PER_CHANNEL, [(0, (4, 600, 2)), (1, (300, 4, 4)), (-1, (1200, 4))]), ids=str
)
def test_each_channel_has_the_range_it_would_have_alone(kind, place):
    axis, shape = place
    gains = torch.tensor([1.0, 1e-3, 50.0, 1e3])
    x = gaussian(4800).reshape(shape)
    x = (x.movedim(axis, -1) * gains + gains / 2).movedim(-1, axis)
    observer = make(kind, axis=axis)
    for part in x.split(x.shape[0] if axis == 0 else x.shape[0] // 3):
        observer.observe(part)
    low, high = observer.range()
    assert low.shape == high.shape == (4,) and low.dtype == torch.float64
    exact = kind in ("min-max", "moving-average")
    for channel in range(4):
        alone = make(kind)
        for part in x.split(x.shape[0] if axis == 0 else x.shape[0] // 3):
            alone.observe(part.select(axis, channel))
        expected = tuple(float(v) for v in alone.range())
        # mse and cosine have flat bottoms and coarser cells here; the others differ by half a cell at most
        tolerance = 0 if exact else 0.03 if kind in NEEDS_GRID else 2**-8
        assert (float(low[channel]), float(high[channel])) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", ["histogram", "kl"])
def test_kinds_without_channels_say_so(kind):
    with pytest.raises(SchemeError, match=f"{kind} has no per-channel form, got axis=0"):
        make(kind, axis=0)


def test_the_axis_must_exist_and_keep_its_size():
    observer = make("min-max", axis=1, name="x")
    with pytest.raises(ShapeError, match=r"x: axis 1 does not exist in shape \(3,\)"):
        observer.observe(torch.zeros(3))
    observer.observe(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"x: axis 1 had size 3, got shape \(2, 4\)"):
        observer.observe(torch.zeros(2, 4))


@pytest.mark.parametrize("kind", PER_CHANNEL)
def test_a_channel_without_finite_values_is_named(kind):
    observer = make(kind, axis=0, nan_policy="omit", name="x")
    x = gaussian(30).reshape(3, 10)
    x[1] = math.nan
    observer.observe(x)
    with pytest.raises(DataError, match=r"x: no finite values in channels \[1\]"):
        observer.range()
    x[1] = 7.0
    observer.observe(x)
    low, high = observer.range()
    assert max(abs(float(low[1])), abs(float(high[1]))) == pytest.approx(7.0, rel=0.01)
    assert observer.omitted == 10 and observer.seen == 50


def test_names_are_looked_up_kindly():
    with pytest.raises(SchemeError, match=r"Unknown observer 'minmax'\. Did you mean 'min-max'"):
        get_observer("minmax")
    with pytest.raises(SchemeError, match="Unknown nan_policy 'ignore'"):
        make("min-max", nan_policy="ignore")
    with pytest.raises(DataError, match="complex64"):
        make("min-max").observe(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "call, message",
    [
        (partial(make, "moving-average", momentum=1.0), "momentum must be in"),
        (partial(make, "percentile", p=99.99), "a share, not a per cent"),
        (partial(make, "histogram", keep=99), "a share, not a per cent"),
        (partial(make, "histogram", bins=1), "at least 2 bins"),
        (partial(make, "kl", stride=0), "stride of at least 1"),
        (partial(make, "mse", exponent=0), "exponent must be positive"),
        (partial(OBSERVERS["mse"], qmin=1, qmax=5, symmetric=False), "qmin ≤ 0 ≤ qmax"),
        (partial(OBSERVERS["mse"], qmin=-5, qmax=0, symmetric=True), "needs positive codes"),
    ],
)
def test_impossible_options_are_refused(call, message):
    with pytest.raises(SchemeError, match=message):
        call()


# Min-max and moving average


@settings(deadline=None)
@given(batches=st.lists(samples, min_size=1, max_size=4))
def test_min_max_is_exact(batches):
    everything = np.concatenate(batches)
    assert observed(make("min-max"), *map(torch.from_numpy, batches)) == (everything.min(), everything.max())


def test_moving_average_starts_from_the_first_batch():
    """From zero, momentum 0.99 would have reached only 63 % of a constant after 100 steps."""
    batch = torch.tensor([-2.0, 5.0])
    observer = make("moving-average", momentum=0.99)
    assert observed(observer, batch) == (-2.0, 5.0)
    assert observed(observer, *[batch] * 99) == pytest.approx((-2.0, 5.0), rel=1e-12)


@settings(deadline=None)
@given(
    ends=st.lists(st.tuples(st.floats(-100, 0), st.floats(0, 100)), min_size=1, max_size=20),
    momentum=st.floats(0, 0.999),
)
def test_moving_average_is_the_weighted_sum_of_the_batch_extremes(ends, momentum):
    weights = np.array([(1 - momentum) * momentum ** (len(ends) - 1 - i) for i in range(len(ends))])
    weights[0] = momentum ** (len(ends) - 1)  # the first batch stands for everything before it
    low, high = observed(
        make("moving-average", momentum=momentum), *(torch.tensor(e, dtype=torch.float64) for e in ends)
    )
    assert (low, high) == pytest.approx(tuple(weights @ np.array(ends)), rel=1e-9, abs=1e-9)


# Percentile


@settings(deadline=None)
@given(x=samples, p=st.sampled_from([0.5, 0.9, 0.99, 0.9999, 1.0]))
def test_percentile_is_the_order_statistic_to_half_a_cell(x, p):
    """Values below 2^-48 of the greatest may count as zero, and so may the smaller half of the denormal numbers."""
    n, ordered = len(x), np.sort(x.astype(np.float64))
    slack = np.abs(ordered).max() * 2.0**-47 + 2.0**-135
    out = math.floor((1 - p) / 2 * n + 1e-9)
    low, high = observed(make("percentile", p=p), torch.from_numpy(x))
    assert low == pytest.approx(ordered[out], rel=2**-11, abs=slack)
    assert high == pytest.approx(ordered[n - 1 - out], rel=2**-11, abs=slack)
    magnitudes = np.sort(np.abs(ordered))
    expected = magnitudes[n - 1 - math.floor((1 - p) * n + 1e-9)]
    low, high = observed(make("percentile", p=p, symmetric=True), torch.from_numpy(x))
    assert low == -high and high == pytest.approx(expected, rel=2**-11, abs=slack)


def test_percentile_is_exact_for_bfloat16():
    x = gaussian(20000).bfloat16()
    ordered = x.double().sort().values
    assert observed(make("percentile", p=0.9), x) == (float(ordered[1000]), float(ordered[18999]))


def test_percentile_treats_both_ends_alike():
    x = laplace(10001)
    low, high = observed(make("percentile", p=0.99), x)
    assert observed(make("percentile", p=0.99), -x) == (-high, -low)


def test_percentile_of_a_gaussian_is_its_quantile():
    low, high = observed(make("percentile", p=0.95), gaussian(400_000))
    assert (low, high) == pytest.approx((ndtri(0.025), ndtri(0.975)), rel=0.01)


@pytest.mark.parametrize("outlier", [1e6, 1e12])
def test_percentile_keeps_its_resolution_beside_outliers(outlier):
    x = gaussian(100_000)
    clean = observed(make("percentile", p=0.99), x)
    assert observed(make("percentile", p=0.99), torch.tensor([outlier]), x, torch.tensor([-outlier])) == pytest.approx(
        clean, rel=2**-9
    )


# Histogram filter


def filtered_with_numpy(x: np.ndarray, keep: float, bins: int) -> tuple[float, float]:
    """One pass of the two pointers over numpy.histogram, without refinement."""
    counts, edges = np.histogram(x, bins=bins)
    budget, left, right = math.floor((1 - keep) * x.size + 1e-9), 0, bins - 1
    while left < right:
        side = left if counts[left] <= counts[right] else right
        if counts[side] > budget:
            break
        budget -= counts[side]
        left, right = (left + 1, right) if side == left else (left, right - 1)
    return float(edges[left]), float(edges[right + 1])


FAMILIES = {
    "gaussian": lambda n: gaussian(n),
    "uniform": lambda n: torch.rand(n, generator=generator()),
    "relu": lambda n: gaussian(n).relu(),
    "two-modes": lambda n: torch.cat((gaussian(n // 2) * 0.1 - 3, gaussian(n - n // 2, 1) + 2)),
    "constant": lambda n: torch.full((n,), 2.5),
}
FAMILY = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.mark.parametrize("keep, kept", [(0.90, (3, 6)), (0.91, (3, 7)), (0.97, (1, 9)), (0.995, (0, 10))])
def test_the_filter_by_hand(keep, kept):
    """Bins of width one over 0 … 10 with 1 2 0 30 30 30 4 0 1 1 values, 99 in all; at 0.90 nine may go.

    On the tie the left 1 goes (8 may still go), then on the right 1 (7), 1 (6) and the empty bin; now 2 on the left is
    lighter than 4 (4), the empty bin after it, and the 4 on the right (0). Bins 3, 4 and 5 stay. At 0.91 eight may go
    and the 4 is one too many; at 0.97 two may go, one from each end; at 0.995 none.
    """
    counts = [1, 2, 0, 30, 30, 30, 4, 0, 1, 1]
    x = torch.cat([torch.full((c,), i + 0.5) for i, c in enumerate(counts)])
    x[0], x[-1] = 0.0, 10.0
    assert histogram_filter(x, keep=keep, bins=10, max_refine=0) == kept


def test_equal_end_bins_drop_the_left_one_first():
    x = torch.tensor([0.0] + [5.0] * 8 + [10.0])
    assert histogram_filter(x, keep=0.85, bins=10, max_refine=0)[1] == 10.0
    assert histogram_filter(x, keep=0.85, bins=10, max_refine=0)[0] == pytest.approx(5.0)


@pytest.mark.parametrize(("family", "n", "keep"), each_once(FAMILIES, [50, 5000, 100_000], [0.9, 0.99]))
def test_the_filter_keeps_at_least_the_share(family, n, keep):
    x = FAMILIES[family](n)
    assert share(x, *histogram_filter(x, keep=keep)) >= keep
    assert share(x, *observed(make("histogram", keep=keep), x)) >= keep


@pytest.mark.parametrize("family", ["gaussian", "uniform", "relu", "two-modes"])
def test_the_filter_does_not_keep_much_more_than_the_share(family):
    x = FAMILIES[family](100_000)
    positive = x[x != 0]
    assert share(positive, *histogram_filter(positive)) <= 0.9915
    assert share(positive, *observed(make("histogram"), x)) <= 0.9915


@FAMILY
def test_one_pass_agrees_with_numpy_histogram(family):
    x = FAMILIES[family](30_000)
    if family == "constant":
        assert histogram_filter(x) == (2.5, 2.5)
        return
    for keep, bins in ((0.99, 100), (0.95, 512)):
        expected = filtered_with_numpy(x.double().numpy(), keep, bins)
        assert histogram_filter(x, keep=keep, bins=bins, max_refine=0) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(x=samples, keep=st.sampled_from([0.5, 0.9, 0.99]), bins=st.sampled_from([2, 16, 2048]))
@example(x=np.array([1e-45, 1e-45], np.float32), keep=0.5, bins=16)
@example(x=np.array([0.0] * 199 + [1e-30], np.float32), keep=0.99, bins=2048)
@example(x=np.array([1.0] * 199 + [1.0000001], np.float32), keep=0.99, bins=2048)
def test_the_share_is_kept_whatever_the_data(x, keep, bins):
    tensor = torch.from_numpy(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        low, high = histogram_filter(tensor, keep=keep, bins=bins)
        assert float(x.min()) <= low <= high <= float(x.max())
        assert share(tensor, low, high) >= keep
        low, high = observed(make("histogram", keep=keep, bins=bins, drop_zeros=False), tensor)
        assert float(x.min()) <= low <= high <= float(x.max())
        assert share(tensor, low, high) >= keep


@pytest.mark.parametrize("outliers", [(1e6,), (1e6, -1e6), (1e12, -1e9)])
def test_outliers_do_not_move_the_filter(outliers):
    x = torch.cat((gaussian(100_000), torch.tensor(outliers)))
    for low, high in (
        histogram_filter(x),
        observed(make("histogram"), x),
        observed(make("histogram"), *x.split(20_000)),
    ):
        assert (low, high) == pytest.approx((-2.6, 2.6), abs=0.12)


def test_relu_data_with_an_outlier_does_not_collapse():
    x = torch.cat((gaussian(20_000).relu(), torch.tensor([1e6])))
    low, high = observed(make("histogram"), x)
    assert low == 0.0 and high == pytest.approx(2.6, abs=0.1)


def test_sparse_data_needs_its_zeros_dropped():
    """99.5 % zeros: with them the filter would keep zero alone, which it refuses to do."""
    x = torch.cat((torch.zeros(19_900), gaussian(100).abs() + 0.5))
    low, high = observed(make("histogram"), x)
    assert low == 0.0 and 1.5 < high <= float(x.max())
    with pytest.warns(UserWarning, match="fc1: the histogram filter would keep 0 alone of 0 … "):
        assert observed(make("histogram", drop_zeros=False, name="fc1"), x) == (0.0, float(x.max()))
    signed = torch.cat((x, -x))
    low, high = observed(make("histogram", drop_zeros=True), signed)
    assert low < -1.5 and high > 1.5


def test_a_budget_below_one_value_is_min_max():
    x = gaussian(50)
    assert histogram_filter(x) == (float(x.min()), float(x.max()))
    assert observed(make("histogram"), x) == (float(x.min()), float(x.max()))


def test_all_axes_count_as_values():
    x = gaussian(60_000)
    assert histogram_filter(x.reshape(3, 20_000)) == histogram_filter(x)
    assert observed(make("histogram"), x.reshape(20_000, 3)) == observed(make("histogram"), x)


def test_the_filter_does_not_see_the_order():
    x = torch.cat((gaussian(10_000), torch.tensor([1e9])))
    assert histogram_filter(x[torch.randperm(len(x), generator=generator())]) == histogram_filter(x)


@settings(deadline=None)
@given(factor=st.floats(1e-20, 1e20), seed=st.integers(0, 20))
def test_the_filter_scales_with_the_data_to_rounding(factor, seed):
    x = laplace(500, seed).double()
    low, high = histogram_filter(x, keep=0.9, bins=64)
    assert histogram_filter(x * factor, keep=0.9, bins=64) == pytest.approx(
        (low * factor, high * factor), rel=1e-12, abs=0
    )


def test_counts_stand_for_repeated_values():
    values, counts = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([2, 50, 47, 1])
    repeated = values.repeat_interleave(counts)
    assert histogram_filter(values, counts, keep=0.95) == histogram_filter(repeated, keep=0.95)


def test_the_filter_needs_values():
    with pytest.raises(DataError, match="fc1: the histogram filter got no values"):
        histogram_filter(torch.zeros(0), name="fc1")


# Mean squared error


LATTICE = torch.from_numpy(ndtri((np.arange(400_000) + 0.5) / 400_000))
"""Quantiles of a Gaussian at equal steps of probability: a sample without noise, for the optimum of the density."""


def full_grid_optimum(bits: int) -> float:
    """a*/σ with scale 2a/2^b and codes -2^(b-1) … 2^(b-1) - 1 for N(0, 1), by quadrature of the density."""
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))

    def error(scale: float) -> float:
        borders = np.concatenate(([-9.0], (codes[1:] + codes[:-1]) / 2 * scale, [9.0]))
        nodes, weights = np.polynomial.legendre.leggauss(24)
        half = np.diff(borders) / 2
        x = (borders[1:] + borders[:-1])[:, None] / 2 + half[:, None] * nodes
        if bits < 8:  # the two end cells are wide: give them to the adaptive rule
            inner = slice(1, -1)
            ends = [(borders[0], borders[1], codes[0]), (borders[-2], borders[-1], codes[-1])]
        else:
            inner, ends = slice(None), []
        total = ((x - codes[:, None] * scale) ** 2 * norm.pdf(x) * weights * half[:, None])[inner].sum()
        for low, high, code in ends:
            total += integrate.quad(lambda t, c=code: (t - c * scale) ** 2 * norm.pdf(t), low, high, epsabs=1e-14)[0]
        return float(total)

    return (
        float(
            optimize.minimize_scalar(
                error, bounds=(1 / 2**bits, 5 / 2**bits * 2), method="bounded", options={"xatol": 1e-9}
            ).x
        )
        * 2**bits
        / 2
    )


# bits: optimal clip of N(0, 1) with restricted codes, and with full codes and scale 2a/2^b
PUBLISHED = {2: (1.22, 2.10), 3: (1.95, 2.40), 4: (2.46, 2.69)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_finds_the_optimal_clips_of_a_gaussian(bits):
    top = 2 ** (bits - 1) - 1
    _, restricted = observed(OBSERVERS["mse"](qmin=-top, qmax=top, symmetric=True), LATTICE)
    _, full = observed(OBSERVERS["mse"](qmin=-top - 1, qmax=top, symmetric=True), LATTICE)
    full *= 2**bits / (2**bits - 1)  # our range (-a, a) has scale 2a/(2^b - 1), the table's 2a/2^b
    tolerance = 0.005 if bits < 8 else 0.01  # 400,000 points end at 4.7σ, which the 8-bit optimum at 3.9σ notices
    assert restricted == pytest.approx(optimal_uniform("gaussian", 2**bits - 1).max_level, rel=tolerance)
    assert full == pytest.approx(full_grid_optimum(bits), rel=tolerance)
    if bits in PUBLISHED:
        assert (restricted, full) == pytest.approx(PUBLISHED[bits], rel=0.02)


GRIDS = {
    "int4-full": {"qmin": -8, "qmax": 7, "symmetric": True},
    "int4-narrow": {"qmin": -7, "qmax": 7, "symmetric": True},
    "uint4-symmetric": {"qmin": 0, "qmax": 15, "symmetric": True},
    "int4-asymmetric": {"qmin": -8, "qmax": 7, "symmetric": False},
    "uint8-asymmetric": {"qmin": 0, "qmax": 255, "symmetric": False},
}
SHAPES = {
    "gaussian": lambda: gaussian(4000),
    "shifted-laplace": lambda: laplace(4000) + 1.5,
    "relu": lambda: gaussian(4000).relu(),
    "positive": lambda: gaussian(4000).abs() + 4,
    "outliers": lambda: torch.cat((gaussian(4000), 30 * gaussian(4, 1))),
    "bfloat16": lambda: gaussian(4000).bfloat16(),
}


def best_ends(x: torch.Tensor, grid: dict[str, Any], loss: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The range with the least loss on the samples, of 496 factors; the widest range is written out for its grid."""
    low, high = float(x.min()), float(x.max())
    if grid["symmetric"]:
        low, high = (0.0, high) if grid["qmin"] == 0 else (-max(-low, high), max(-low, high))
    low, high = min(low, 0.0), max(high, 0.0)
    ends = [(f * low, f * high) for f in np.linspace(1.0, 0.01, 496)]
    return min(ends, key=lambda e: loss(fake_quantized(x, *e, **grid)))


@pytest.mark.parametrize(("grid", "shape", "exponent"), each_once(GRIDS, SHAPES, [2.0, 2.4]))
def test_mse_is_as_good_as_a_blind_search_on_the_samples(grid, shape, exponent):
    x = SHAPES[shape]()

    def loss(y: np.ndarray) -> float:
        return float((np.abs(x.double().numpy() - y) ** exponent).mean())

    found = observed(OBSERVERS["mse"](**GRIDS[grid], exponent=exponent), x)
    best = best_ends(x, GRIDS[grid], loss)
    assert loss(fake_quantized(x, *found, **GRIDS[grid])) <= 1.02 * loss(fake_quantized(x, *best, **GRIDS[grid]))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("value", [3.0, 1 + 2**-9 - 2**-20])
def test_a_value_on_the_grid_costs_nothing(kind, value):
    """Wherever it lies in its cell: a cell is cut to the values that were observed."""
    assert observed(OBSERVERS[kind](qmin=-127, qmax=127, symmetric=True), torch.full((9,), value)) == (-value, value)


@pytest.mark.parametrize("top", [1.0, 1 + 2**-9, 1 + 2**-8])
def test_two_values_on_three_levels_meet_in_their_mean(top):
    """Also where the greatest value lies on the border of a cell, which it then has to itself."""
    x = torch.tensor([0.6] * 100 + [top] * 100)
    assert observed(OBSERVERS["mse"](qmin=-1, qmax=1, symmetric=True), x)[1] == pytest.approx(
        (0.6 + top) / 2, rel=0.002
    )


def test_asymmetric_codes_halve_the_step_of_one_sided_data():
    """ReLU of a Gaussian: a quarter of the squared error of a symmetric grid, about one more bit."""
    x = gaussian(100_000).relu()
    errors = []
    for symmetric in (True, False):
        grid = {"qmin": -128, "qmax": 127, "symmetric": symmetric}
        low, high = observed(OBSERVERS["mse"](**grid), x)
        errors.append(float(((x.double().numpy() - fake_quantized(x, low, high, **grid)) ** 2).mean()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_mse_narrows_with_fewer_bits_and_min_max_never_beats_it():
    x = laplace(50_000)
    clips = [
        observed(OBSERVERS["mse"](qmin=-(2 ** (b - 1)), qmax=2 ** (b - 1) - 1, symmetric=True), x)[1]
        for b in (2, 3, 4, 6, 8)
    ]
    assert clips == sorted(clips) and clips[-1] <= float(x.abs().max())


# Kullback-Leibler divergence


def divergence_by_definition(counts: np.ndarray, end: int, levels: int) -> float:
    """D(p ‖ q) after `end` bins, step by step."""
    raw = counts[:end].astype(float)
    p = raw.copy()
    p[-1] += counts[end:].sum()
    group = np.arange(end) * levels // end
    occupied = np.bincount(group, weights=raw > 0, minlength=levels)
    mass = np.bincount(group, weights=raw, minlength=levels)
    q = np.where(raw > 0, (mass / np.maximum(occupied, 1))[group], 0)
    p[p == 0] = 1e-4
    q[q == 0] = 1e-4
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


@given(
    counts=arrays(np.int64, st.integers(10, 60), elements=st.one_of(st.just(0), st.integers(0, 1000))),
    levels=st.integers(2, 9),
)
@settings(deadline=None)
def test_all_divergences_are_those_of_the_definition(counts, levels):
    """The fast form takes every sum from running sums; bins may be empty anywhere, also before a clipped tail."""
    counts[0] += 1
    ends = torch.arange(levels, len(counts) + 1)
    fast = _divergences(torch.from_numpy(counts).double(), ends, levels).tolist()
    assert fast == pytest.approx([divergence_by_definition(counts, int(e), levels) for e in ends], rel=1e-9, abs=1e-12)


def threshold_by_definition(x: torch.Tensor, bins: int, levels: int, empty_first: bool = False) -> float:
    magnitudes = x.double().abs().numpy()
    amax = magnitudes.max()
    counts = np.histogram(magnitudes, bins=bins, range=(0, amax))[0]
    if empty_first:
        counts[0] = 0
    divergences = {end: divergence_by_definition(counts, end, levels) for end in range(levels, bins + 1)}
    least = min(divergences.values())
    best = max(end for end, d in divergences.items() if d <= least + 1e-13)
    return float(amax) if best == bins else float((best + 0.5) * amax / bins)


INT4 = {"qmin": -8, "qmax": 7, "symmetric": True}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["gaussian", "laplace", "sparse-tail", "relu"])
def test_kl_is_its_definition(shape, seed):
    x = {
        "gaussian": lambda: gaussian(3000, seed),
        "laplace": lambda: laplace(3000, seed),
        "sparse-tail": lambda: torch.cat((gaussian(500, seed), 20 * gaussian(10, seed + 9))),
        "relu": lambda: gaussian(3000, seed).relu(),
    }[shape]()
    relu = shape == "relu"
    _, high = observed(OBSERVERS["kl"](**INT4, bins=96), x)
    assert high == pytest.approx(threshold_by_definition(x, 96, 8, empty_first=relu), rel=1e-12)
    _, high = observed(OBSERVERS["kl"](qmin=0, qmax=15, symmetric=False, bins=64), x.abs())
    assert high == pytest.approx(threshold_by_definition(x, 64, 16, empty_first=relu), rel=1e-12)


@pytest.mark.parametrize("shape", ["gaussian", "laplace"])
def test_kl_is_its_definition_at_full_size(shape):
    x = {"gaussian": gaussian, "laplace": laplace}[shape](20_000)
    assert observed(make("kl"), x)[1] == pytest.approx(threshold_by_definition(x, 2048, 128), rel=1e-12)


DIRECTION_SEEDS = range(4)


@pytest.mark.parametrize("seed", DIRECTION_SEEDS)
def test_kl_direction_on_clean_data(seed):
    """Uniform stays at absmax; the others clip less than a third of it, at or beyond what the mean squared error would.

    The threshold is noisy, for it is decided in the sparse tail: over seeds it moves between 4.1σ and 4.5σ for Gaussian
    data of this size, and between 9 and 13 for Laplace data of scale 1.
    """
    n = 200_000
    uniform = torch.rand(n, generator=generator(seed)) * 2 - 1
    assert observed(make("kl"), uniform) == (-float(uniform.abs().max()), float(uniform.abs().max()))
    for x, mse_clip in ((gaussian(n, seed), 3.92), (laplace(n, seed), 6.99 * math.sqrt(2))):
        kl, mse, absmax = observed(make("kl"), x)[1], observed(make("mse"), x)[1], float(x.abs().max())
        assert mse == pytest.approx(mse_clip, rel=0.1)
        assert 0.9 * mse < kl <= absmax and kl > 0.67 * absmax
    x = gaussian(n, seed).relu()
    assert 0.67 * float(x.max()) < observed(make("kl"), x)[1] <= float(x.max())


@pytest.mark.parametrize("seed", DIRECTION_SEEDS)
def test_kl_ignores_rare_large_values_which_mse_keeps(seed):
    x = gaussian(200_000, seed)
    outliers = 60 + 10 * torch.rand(20, generator=generator(seed)) * torch.tensor([1.0, -1.0] * 10)
    x = torch.cat((x, outliers))
    assert observed(make("kl"), x)[1] < 0.15 * float(x.abs().max())
    assert observed(make("mse"), x)[1] > 0.6 * float(x.abs().max())


def test_a_kept_bin_of_zeros_ruins_the_kl_search():
    x = gaussian(200_000).relu()
    dropped, kept = observed(make("kl"), x)[1], observed(make("kl", drop_zeros=False), x)[1]
    assert kept < 0.7 * dropped


def test_kl_bins_are_appended_as_the_range_grows():
    """The first batch fixes the width, so a stream equals one pass with as many more bins."""
    x = gaussian(20_000)
    limit = float(x.abs().max()) / 2
    head, tail = x[x.abs() <= limit], x[x.abs() > limit]
    width = float(head.abs().max()) / 96
    bins = math.ceil(float(x.abs().max()) / width)
    _, high = observed(OBSERVERS["kl"](**INT4, bins=96), head, tail)
    counts = np.histogram(x.double().abs().numpy(), bins=bins, range=(0, bins * width))[0]
    found = {end: divergence_by_definition(counts, end, 8) for end in range(8, bins + 1)}
    assert high == pytest.approx((min(found, key=found.__getitem__) + 0.5) * width, rel=1e-9)


@pytest.mark.parametrize("growth", [3.9, 4.1, 40.0, 1e9])
def test_kl_merges_pairs_of_bins_but_loses_no_count(growth):
    observer = make("kl")
    x = gaussian(5000)
    observer.observe(x)
    width = observer.state.width
    observer.observe(growth * x)
    state = observer.state
    assert int(state.counts.sum()) == 10_000 and len(state.counts) <= 4 * 2048
    doublings = math.log2(state.width / width)
    assert doublings == round(doublings) == max(0, math.ceil(math.log2(growth / 4)))
    both = torch.cat((x, growth * x)).double().abs()
    expected = np.histogram(both.numpy(), bins=len(state.counts), range=(0, len(state.counts) * state.width))[0]
    assert int(np.abs(state.counts.numpy() - expected).sum()) <= 4  # a value on a border may fall on either side


def test_kl_zeros_before_the_first_value_are_counted():
    late, at_once = make("kl"), make("kl")
    x = gaussian(3000)
    assert observed(late, torch.zeros(70), x) == observed(at_once, torch.cat((torch.zeros(70), x)))
    assert int(late.state.counts.sum()) == 3070


def test_kl_stride_tests_fewer_thresholds():
    x = gaussian(50_000)
    width = float(x.abs().max()) / 2048
    _, high = observed(make("kl", stride=16), x)
    end = high / width - 0.5
    assert high == float(x.abs().max()) or (2048 - round(end)) % 16 == 0


def test_kl_of_an_asymmetric_grid_cuts_the_observed_range():
    x = gaussian(100_000)
    x = torch.cat((x[x > -2], torch.tensor([40.0] * 5)))
    low, high = observed(OBSERVERS["kl"](qmin=-128, qmax=127, symmetric=False), x)
    assert low == float(x.min()) and high < 10
    assert observed(OBSERVERS["kl"](qmin=-(2**15), qmax=2**15 - 1, symmetric=True), x) == (
        -40,
        40,
    )  # more codes than bins


# Cosine


@pytest.mark.parametrize(
    ("grid", "shape"),
    each_once(
        ["int4-full", "int4-asymmetric", "uint8-asymmetric"], ["gaussian", "shifted-laplace", "relu", "outliers"]
    ),
)
def test_cosine_is_as_good_as_a_blind_search_on_the_samples(grid, shape):
    x = SHAPES[shape]()
    found = observed(OBSERVERS["cosine"](**GRIDS[grid]), x)
    best = fake_quantized(x, *best_ends(x, GRIDS[grid], lambda y: -cosine_between(x, y)), **GRIDS[grid])
    magnitude = float(np.linalg.norm(best)) / float(x.double().norm())
    assert abs(abs(magnitude - 1) - 0.02) > 0.001  # the case is clear
    if abs(magnitude - 1) < 0.02:
        ours = fake_quantized(x, *found, **GRIDS[grid])
        assert 1 - cosine_between(x, ours) <= 1.02 * (1 - cosine_between(x, best))
    else:
        assert found == observed(OBSERVERS["mse"](**GRIDS[grid]), x)


def test_cosine_falls_back_where_the_magnitude_is_wrong():
    """Values 1 and, one in a hundred, 10 on -1, 0, 1: below a step of 2 all directions are the same, so the widest
    wins; its length is 1.35 times too great. The clip must be that of mse, the mean magnitude 1.09."""
    grid = {"qmin": -1, "qmax": 1, "symmetric": True}
    x = torch.cat((torch.ones(9900), torch.full((100,), 10.0)))
    assert cosine_between(x, fake_quantized(x, -1.9, 1.9, **grid)) > cosine_between(
        x, fake_quantized(x, -10, 10, **grid)
    )
    assert observed(OBSERVERS["cosine"](**grid), x) == pytest.approx((-1.09, 1.09), rel=0.002)


def test_cosine_is_its_own_criterion_where_the_magnitude_holds():
    """5 bits on Laplace data: not the clip of mse, and a better cosine than it."""
    grid = {"qmin": -15, "qmax": 15, "symmetric": True}
    x = laplace(100_000)
    ours, theirs = observed(OBSERVERS["cosine"](**grid), x), observed(OBSERVERS["mse"](**grid), x)
    assert ours != theirs
    assert cosine_between(x, fake_quantized(x, *ours, **grid)) > cosine_between(x, fake_quantized(x, *theirs, **grid))
