"""Saved activations in few bits: what is exact, what is right on average, and how many bytes are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from arrondi.errors import DataError, SchemeError
from arrondi.training.saved import compress_saved_activations
from arrondi.training.saved_bits import bits_by_sensitivity
from tests.kernels.common import normal


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


def gradients(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Of a loss that is linear in the output, so that nothing else is saved."""
    model.zero_grad()
    if options:
        with compress_saved_activations(**options) as saved:
            y = model(x)
    else:
        saved, y = None, model(x)
    y.backward(normal(*y.shape, seed=9).to(y.dtype))
    return {n: p.grad.clone() for n, p in model.named_parameters()}, saved


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_gradients_of_inputs_are_exact_and_those_of_weights_right_on_average() -> None:
    model, x = mlp(), normal(64, 256)
    wanted, _ = gradients(model, x)
    sums = {n: torch.zeros_like(g) for n, g in wanted.items()}
    draw, errors = torch.Generator().manual_seed(3), []
    for _ in range(64):
        found, _ = gradients(model, x, bits=2, generator=draw)
        errors.append(off(found["0.weight"], wanted["0.weight"]))
        for name, grad in found.items():
            sums[name] += grad / 64
    for name in ("0.bias", "2.bias"):
        (
            torch.testing.assert_close(sums[name], wanted[name], rtol=1e-4, atol=1e-4),
            "they read masks and gradients alone",
        )
    for name in ("0.weight", "2.weight"):
        assert off(sums[name], wanted[name]) < 1.4 * errors[0] / 8, "noise falls with the root of the draws"
    assert 0.2 < errors[0] < 1.0


def test_the_variance_is_the_law_s() -> None:
    """A number between two codes has a sixth of the square of a step on average."""
    torch.manual_seed(0)
    layer, x, slope = nn.Linear(256, 16, bias=False), normal(64, 256), normal(64, 16, seed=9)
    draw, found = torch.Generator().manual_seed(3), []
    for _ in range(60):
        with compress_saved_activations(bits=2, generator=draw):
            y = layer(x)
        found.append(torch.autograd.grad(y, layer.weight, slope)[0])
    steps = (x.amax(1) - x.amin(1)) / 3
    law = float((slope.square().sum(1) * steps.square() / 6).sum() * 256)
    assert float(torch.stack(found).var(0).sum()) == pytest.approx(law, rel=0.1)


def test_more_bits_are_nearer_and_a_generator_decides() -> None:
    model, x = mlp(), normal(64, 256)
    wanted, _ = gradients(model, x)
    errors = [off(gradients(model, x, bits=b)[0]["0.weight"], wanted["0.weight"]) for b in (2, 4, 8)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2]
    first, again, other = (
        gradients(model, x, bits=2, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)
    )
    assert torch.equal(first["0.weight"], again["0.weight"]) and not torch.equal(first["0.weight"], other["0.weight"])


def test_the_bytes_are_the_formula_s() -> None:
    """x and the result of ReLU in 2.125 bits, its mask in one; a tensor of two readers counts once."""
    _, saved = gradients(mlp(), normal(64, 256), bits=2)
    assert saved.plain_bytes == 4 * 64 * (256 + 512)
    assert saved.kept_bytes == int(64 * (256 + 512) * 2.125 / 8) + 64 * 512 // 8
    assert saved.tensors == 2

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(256, 64, bias=False), nn.Linear(256, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x.view(8, 8, 256)).view(64, 64)

    _, saved = gradients(Twice(), normal(64, 256), bits=4)
    assert (saved.tensors, saved.plain_bytes) == (1, 4 * 64 * 256)


def test_a_storage_that_is_gone_is_not_taken_for_a_new_one() -> None:
    """Freed memory is soon used again, at the same place and for the same shape."""
    model = nn.Linear(512, 8, bias=False)
    total = torch.zeros(())
    wanted = torch.zeros(8, 512)
    with compress_saved_activations(bits=8) as saved:
        for n in range(6):
            x = torch.full((64, 512), float(n + 1))
            wanted += 64 * (n + 1)
            total = total + model(x).sum()
            del x
    total.backward()
    assert saved.tensors == 6
    torch.testing.assert_close(model.weight.grad, wanted)


def test_what_is_no_activation_stays() -> None:
    layer = nn.Linear(64, 64)
    layer.weight.requires_grad_(False)
    ids = torch.arange(600) % 50
    with compress_saved_activations(bits=2) as saved:
        x = nn.functional.embedding(ids, nn.Parameter(normal(50, 64)))
        y = layer(x)  # the weight is saved for the input's gradient
        small = (y[:2] * y[:2]).sum()
    assert saved.tensors == 0 and saved.kept_bytes == saved.plain_bytes == 2 * 64 * 4
    small.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_is_exact(inplace: bool) -> None:
    x, y = (normal(40, 300).requires_grad_() for _ in range(2))
    with compress_saved_activations(bits=2):
        z = nn.functional.relu(x * 1.0, inplace)
    z.backward(normal(40, 300, seed=2))
    torch.relu(y).backward(normal(40, 300, seed=2))
    assert torch.equal(x.grad, y.grad)


def test_attention_and_a_loss_keep_what_goes_into_exponentials() -> None:
    """Of logarithms in four bits the exponential would be anything."""
    table, project, x = nn.Linear(64, 128), nn.Linear(64, 192), normal(4, 40, 64)

    def run() -> torch.Tensor:
        table.zero_grad(), project.zero_grad()
        q, k, v = (20 * project(x)).view(4, 40, 3, 4, 16).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 40, 64)
        return nn.functional.cross_entropy(30 * table(y).view(-1, 128), torch.arange(160) % 128)

    run().backward()
    wanted = [p.grad.clone() for p in (project.weight, table.weight)]
    with compress_saved_activations(bits=8):
        loss = run()
    loss.backward()
    assert off(project.weight.grad, wanted[0]) < 0.3 and off(table.weight.grad, wanted[1]) < 0.02


def test_with_checkpoints_and_autocast() -> None:
    model, x = mlp(), normal(64, 256)
    wanted, _ = gradients(model, x)

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    found, _ = gradients(Recomputed(), x, bits=8)
    for name, grad in wanted.items():
        assert off(found[f"model.{name}"], grad) < 0.15, (
            "it is computed again from an input of 8 bits, which may turn a ReLU"
        )
    with torch.autocast("cpu", torch.bfloat16):
        found, saved = gradients(model, x, bits=8)
    assert saved.plain_bytes == 2 * 64 * (256 + 512)
    for name, grad in wanted.items():
        assert off(found[name], grad) < 0.06


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_models_are_compressed_alike() -> None:
    """Graphs save transposed tensors, too, and rely on how they lie in memory."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    x, found = torch.randn(4, 16, 32), []
    for model in (layer, torch.compile(layer, backend="aot_eager")):
        layer.zero_grad()
        with compress_saved_activations(bits=8) as saved:
            loss = model(x).square().mean()
        loss.backward()
        assert saved.tensors > 3
        found.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 0.05


def test_nan_and_infinity_are_not_hidden() -> None:
    model, x = nn.Linear(512, 8), normal(16, 512)
    x[3, 300] = torch.inf
    found, _ = gradients(model, x, bits=4)
    assert not bool(torch.isfinite(found["weight"][:, 256:]).any()) and bool(
        torch.isfinite(found["weight"][:, :256]).all()
    )


class Branches(nn.Module):
    """Of whose two saved inputs the second counts for thirty times the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(256, 64), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x[0]) + 30 * self.other(nn.functional.dropout(x[1], 0.1))


def test_bits_go_where_the_gradient_feels_them() -> None:
    torch.manual_seed(0)
    model, x = Branches(), normal(2, 64, 256)
    bits = bits_by_sensitivity(model, lambda: model(x).sum(), 5)
    assert bits == [2, 8] and all(p.grad is None for p in model.parameters())

    def lost(bits: Any) -> float:
        found = []
        for options in ({}, {"bits": bits}):
            torch.manual_seed(1)
            grads, saved = gradients(model, x, **options)
            found.append(torch.cat([g.flatten() for g in grads.values()]))
        assert bits == 4 or saved.kept_bytes == 64 * 256 * 10 // 8 + 2 * 64 * 4
        return off(found[1], found[0])

    assert lost(bits) < lost(4) / 3


def test_bad_input() -> None:
    for bits in (3, 32, [], [2, 3]):
        with pytest.raises(SchemeError, match="2, 4 or 8 bits, got"):
            compress_saved_activations(bits=bits)
    with pytest.raises(SchemeError, match="from 2 to 8 bits on average"):
        bits_by_sensitivity(mlp(), lambda: torch.zeros(()), 1)
    small = nn.Linear(4, 4)
    with pytest.raises(SchemeError, match="saves nothing"):
        bits_by_sensitivity(small, lambda: small(torch.ones(2, 4)).sum(), 4)


class Attended(nn.Module):
    """Attention with large logits, as trained models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.attention.in_proj_weight.data *= 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Composed(nn.Module):
    """A layer and a function written by hand."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(64, 128), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer(x))


def stable(x: torch.Tensor) -> torch.Tensor:
    y = (x - x.amax(-1, keepdim=True)).exp()
    return y / y.sum(-1, keepdim=True)


UNFORGIVING = {
    "attention": Attended,
    "softmax": lambda: Composed(stable),
    "logarithm": lambda: Composed(lambda x: (4 * x).softmax(-1).log()),
    "quotient": lambda: Composed(lambda x: x / (5 * x).exp()),
    "root": lambda: Composed(lambda x: (x.sigmoid() ** 4).sqrt()),
    "group norm": lambda: nn.Sequential(Scaled(), nn.GroupNorm(32, 64)),
    "batch norm": lambda: nn.Sequential(Scaled(), nn.Flatten(1, 2), nn.BatchNorm1d(4096)),
}


class Scaled(nn.Linear):
    """Channels whose sizes lie four decades apart."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.weight.data *= torch.logspace(-3, 1, 64)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).transpose(1, 2)


@pytest.mark.parametrize("what", UNFORGIVING)
def test_gradients_that_divide_compare_or_take_exponentials_stay_near(what: str) -> None:
    """With statistics, maxima, denominators and logarithms in few bits they would be off by orders of magnitude, or NaN."""
    torch.manual_seed(0)
    model = UNFORGIVING[what]()
    x = normal(64, 64, 64) if what == "group norm" else normal(16, 64, 64)
    wanted, _ = gradients(model, x)
    found, saved = gradients(model, x, bits=4)
    assert saved.kept_bytes < saved.plain_bytes
    assert off(*(torch.cat([g.flatten() for g in grads.values()]) for grads in (found, wanted))) < 0.5


def test_one_tensor_is_the_same_for_all_who_saved_it() -> None:
    """Softmax may keep its result in codes; when a logarithm needs it as it is, both have it, and it is counted once."""
    x = normal(64, 128).requires_grad_()
    with compress_saved_activations(bits=2) as saved:
        y = (4 * x).softmax(-1).log()
    assert saved.plain_bytes == saved.kept_bytes == 4 * 64 * 128
    slope = normal(64, 128, seed=1)
    (found,) = torch.autograd.grad(y, x, slope)
    (wanted,) = torch.autograd.grad((4 * x).log_softmax(-1), x, slope)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_graphs_that_nobody_goes_back_through_are_freed() -> None:
    gone = []
    for function in (torch.exp, torch.sigmoid, lambda x: x[:2, :2].exp()):
        x = normal(64, 256).requires_grad_()
        with compress_saved_activations(bits=8):
            y = function(x * 1.0)
        gone.append(StorageWeakRef(y.untyped_storage()))
        del y
    assert all(storage.expired() for storage in gone)


def test_what_is_changed_in_place_is_not_hidden() -> None:
    """PyTorch does not look at what hooks gave back."""
    for function in (lambda x: x.exp().mul_(2), lambda x: x[:2, :2].sigmoid().mul_(2)):
        x = normal(64, 256).requires_grad_()
        with compress_saved_activations(bits=8):
            y = function(x)
        with pytest.raises(DataError, match="changed in place"):
            y.sum().backward()


def test_a_whole_training_under_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a step is forgotten with it."""
    monkeypatch.setattr("arrondi.training.saved._ROOM", 8)
    model, x = mlp(), normal(64, 256)
    with compress_saved_activations(bits=2) as saved:
        for _ in range(20):
            model(x + 1).sum().backward()
        assert len(saved._storages) <= 9 and len(saved._alive) <= 9 and len(saved._counted) <= 9
    assert saved.tensors == 40


def test_a_list_of_bits_begins_anew_with_every_entry() -> None:
    model, x = mlp(), normal(64, 256)
    saved, kept = compress_saved_activations(bits=[8, 2]), [0]
    for _ in range(3):
        with saved:
            model(x).sum().backward()
        kept.append(saved.kept_bytes)
    assert kept[1] == kept[2] - kept[1] == kept[3] - kept[2]


def test_sparse_tensors_stay() -> None:
    layer = nn.Linear(64, 64)
    with compress_saved_activations(bits=2):
        y = torch.sparse.mm(torch.eye(40).to_sparse(), layer(normal(40, 64)))
    y.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
