"""What is lost comes back: the invariants of error feedback, the specification's experiment, seeds."""

from __future__ import annotations

import pickle

import pytest
import torch

from arrondi.distributed.feedback import Feedback, Memory, Sender, generator_for
from arrondi.distributed.parcel import Layout, Parcel, Piece
from arrondi.tensor.blocks import BlockCodec


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sum_of_what_was_sent_and_the_error_is_the_sum_of_gradients(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parcel, memory = Parcel(BlockCodec(bits, 64), 256), Memory("ef")
    sender = Sender(memory, "bucket")
    sent, wanted = torch.zeros(2, 256, dtype=torch.float64), torch.zeros(2, 256, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.randn(2, 256, generator=generator)
        sent += parcel.decode(sender("worker", gradient, parcel))
        wanted += gradient
    kept = memory.load("bucket/worker", sent)
    assert float((sent + kept - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert float((sent - wanted).abs().max()) > 0.1


def test_errors_follow_their_parameters_into_other_buckets() -> None:
    """The same two parameters in the other order, as when DDP forms its buckets anew."""
    memory = Memory("ef")
    parcel = Parcel(BlockCodec(2, 64), 128)
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    layout = Layout((Piece(64, True), Piece(192, True)), 64)
    Sender(memory, "ab", None, layout, [("a", 64), ("b", 192)])("worker", layout.share(x, 2), parcel)
    errors = {name: memory.load(name, torch.empty(n)).clone() for name, n in (("a", 64), ("b", 192))}
    assert all(bool(e.abs().max() > 0) for e in errors.values())
    swapped = Layout((Piece(192, True), Piece(64, True)), 64)
    sender = Sender(memory, "ba", None, swapped, [("b", 192), ("a", 64)])
    assert torch.equal(sender.errors(x), torch.cat((errors["b"], errors["a"])))


def test_loco_keeps_a_moving_average_in_eight_bits_and_forgets() -> None:
    memory = Memory("loco", beta=0.8, reset=3)
    lost = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    memory.save("w", None, lost)
    first = memory.load("w", lost)
    assert float((first - 0.2 * lost).abs().max()) < 0.2 * float(lost.abs().max()) / 100
    memory.save("w", first, lost)
    assert float((memory.load("w", lost) - 0.36 * lost).abs().max()) < 0.36 * float(lost.abs().max()) / 50
    assert memory.held["w"].dtype == torch.uint8 and memory.held["w"].nbytes < 1.1 * 1000
    assert pickle.loads(pickle.dumps(memory)).held.keys() == {"w"}
    for step in range(3):
        assert memory.held
        memory.tick(step)
    assert not memory.held


def quadratic(kind: Feedback | None, steps: int = 1000) -> float:
    """Loss of four unlike workers on a noisy quadratic of condition 300; None: nothing is compressed."""
    generator = torch.Generator().manual_seed(0)
    size, workers = 64, 4
    curvature = torch.logspace(0, -2.5, size)
    centres = torch.randn(workers, size, generator=generator) * 3
    centres -= centres.mean(dim=0)
    x = torch.ones(size)
    parcel = Parcel(BlockCodec(1, size), size)
    sender = Sender(Memory(kind or "none"), "all workers")  # a row for each
    losses = []
    for step in range(steps):
        gradients = curvature * (x - centres) + 0.3 * torch.randn(workers, size, generator=generator)
        if kind is not None:
            gradients = parcel.decode(sender("worker", gradients, parcel))
        x = x - 0.1 * (1 - step / steps) * gradients.mean(dim=0)
        losses.append(float(0.5 * (curvature * x * x).sum()))
    return sum(losses[-100:]) / 100


def test_signs_with_error_feedback_train_like_full_precision() -> None:
    full, fed, bare = quadratic(None), quadratic("ef"), quadratic("none")
    print(full, fed, bare)
    assert fed < 1.1 * full, (full, fed, bare)
    assert bare > 1.2 * fed, (full, fed, bare)


def test_no_two_seeds_are_alike() -> None:
    cpu = torch.device("cpu")
    what = [(0, 0, "a", 0), (0, 0, "a", 1), (0, 1, "a", 0), (0, 0, "b", 0), (1, 0, "a", 0)]
    draws = {float(torch.rand(1, generator=generator_for(cpu, *w))) for w in what}
    assert len(draws) == len(what)
    assert float(torch.rand(1, generator=generator_for(cpu, *what[0]))) in draws


def test_ranks_with_noise_of_their_own_average_it_away() -> None:
    """Stochastic rounding of sixteen ranks that have the same gradient: the error of the mean falls by √16; with one seed it would not."""
    codec, x = BlockCodec(4, 64, rounding="stochastic"), torch.randn(4096, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    own, shared = (
        torch.stack([codec.decode(codec.encode(x, generator_for(cpu, seed(r))), 4096) for r in range(16)]).mean(dim=0)
        for seed in (lambda r: r, lambda r: 0)
    )
    assert float((shared - x).norm() / (own - x).norm()) == pytest.approx(4, rel=0.1)
