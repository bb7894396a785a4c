"""Second moments against the plain product, and the same bytes however a stream is cut or shared out."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrondi.calibration import SPANS, SecondMoment, span_of, vech
from arrondi.calibration.moments import CHUNK, moment_bytes
from arrondi.errors import DataError, ShapeError

SIZES = pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 600])  # around and across the panels of 256 rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


# The same bytes for any number of workers and any batches

WINDOWS, LENGTH = 41, 320  # a span is more than one chunk


def windows(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Inputs of a layer, window by window; as behind a router, some of their rows are missing, and one window has none."""
    g = generator(seed)
    made = []
    for i in range(WINDOWS):
        x = torch.randn(LENGTH, n, generator=g) * torch.rand(n, generator=g) * 3
        made.append(x[torch.rand(LENGTH, generator=g) < 0.7] if i != 7 else x[:0])
    return made


def seen_by(stream: list[torch.Tensor], spans: range, batch: int) -> SecondMoment:
    """What one worker learns of its spans, in batches of `batch` rows that end where a span ends."""
    moment = SecondMoment(stream[0].shape[1], first_span=spans.start)
    for span in spans:
        rows = torch.cat([x for i, x in enumerate(stream) if span_of(i, len(stream)) == span] or [stream[0][:0]])
        for part in rows.split(batch):
            moment.update(part, span)
    return moment


def shared_by(workers: int, stream: list[torch.Tensor], batch: int, order: list[int] | None = None) -> SecondMoment:
    bounds = [w * SPANS // workers for w in range(workers + 1)]
    parts = [seen_by(stream, range(a, b), batch) for a, b in itertools.pairwise(bounds)]
    first, *others = [parts[i] for i in order or range(workers)]
    for other in others:
        first.merge(other)
    return first


@pytest.mark.parametrize("n", [48, 257])
def test_workers_and_batches_do_not_change_a_bit(n: int) -> None:
    stream = windows(n)
    alone = shared_by(1, stream, 512)
    wanted = alone.packed.clone()
    whole = torch.cat(stream).double()
    exact = whole.T @ whole
    bound = len(whole) * torch.finfo(torch.float32).eps * (whole.abs().T @ whole.abs())
    assert bool(((alone.matrix(torch.float64) - exact).abs() <= bound).all())
    assert alone.tokens == len(whole)
    for workers, batch in ((1, 1000), (1, 7), (2, 512), (2, 100), (3, 64), (4, 33), (8, 512), (8, 50)):
        found = shared_by(workers, stream, batch)
        assert torch.equal(found.packed.view(torch.int32), wanted.view(torch.int32)), (workers, batch)
        assert found.tokens == alone.tokens
    for order in ([1, 0], [0, 1]):
        assert torch.equal(shared_by(2, stream, 512, order).packed, wanted), "whoever merges"
    assert torch.equal(shared_by(8, stream, 80, [3, 0, 7, 5, 1, 2, 6, 4]).packed, wanted)


def test_the_order_of_the_sum_is_the_documented_one() -> None:
    """Against the tree written down plainly: products of chunks, added within a span, then spans added."""
    stream, n = windows(30, seed=5), 30
    spans = [torch.cat([x for i, x in enumerate(stream) if i * 8 // WINDOWS == s]) for s in range(8)]
    long = [torch.cat([s, s, s, s]) for s in spans]
    assert min(len(s) for s in long) > CHUNK, "or the test shows nothing"
    total = None
    for rows in long:
        span = torch.zeros(n, n)
        for chunk in rows.split(CHUNK):
            span = span + chunk.T @ chunk
        total = span if total is None else total + span
    moment = SecondMoment(n)
    for s, rows in enumerate(long):
        for part in rows.split(77):
            moment.update(part, s)
    assert total is not None
    assert torch.equal(moment.packed, vech(total))


def test_one_worker_holds_two_half_vectors_at_most() -> None:
    moment = SecondMoment(64)
    for span in range(SPANS):
        moment.update(torch.randn(600, 64, generator=generator(span)), span)
        assert len(moment._spans) <= 2
    packed = moment.packed
    assert len(moment._spans) == 1 and moment._waiting.numel() == 0
    assert moment.packed is packed, "no copy"


def test_no_more_memory_is_taken_than_said() -> None:
    """Of what the statistic holds and makes: the largest sum of live tensors over a stream."""
    for n in (64, 700):
        moment, most = SecondMoment(n), 0
        for span in range(SPANS):
            for part in torch.randn(1500, n, generator=generator(span)).split(333):
                moment.update(part, span)
                held = [*moment._spans.values(), moment._waiting]
                most = max(most, sum(t.untyped_storage().nbytes() for t in held))
        panel = 4 * 256 * n
        assert moment_bytes(n) - panel == most
    few = SecondMoment(64)
    few.update(torch.ones(3, 64))
    assert few._waiting.untyped_storage().nbytes() == 3 * 64 * 4, "an expert that few tokens reach holds little"


def test_a_stream_without_spans_is_one_span() -> None:
    x = torch.randn(1500, 20, generator=generator())
    plain, spanned = SecondMoment(20), SecondMoment(20)
    for part in x.split(130):
        plain.update(part)
    spanned.update(x, 0)
    assert torch.equal(plain.packed, spanned.packed)
    late = SecondMoment(20)
    late.update(x, 5)  # an expert that no earlier token reached
    assert torch.equal(late.packed, plain.packed)


def test_batches_are_copied_before_they_wait() -> None:
    moment, x = SecondMoment(3), torch.ones(2, 3)
    moment.update(x)
    x.zero_()
    assert torch.equal(moment.matrix(), torch.full((3, 3), 2.0))


def test_spans_come_in_order() -> None:
    moment = SecondMoment(3, name="x")
    moment.update(torch.ones(1, 3), 2)
    for span in (1, SPANS, -1):
        with pytest.raises(ShapeError, match=rf"x: spans come in order, 2 … 7 may follow, got {span}"):
            moment.update(torch.ones(1, 3), span)
    assert moment.tokens == 1
    with pytest.raises(ShapeError, match="no sample 3 of 3"):
        span_of(3, 3)
