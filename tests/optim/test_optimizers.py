"""8-bit optimizers: the map, the codes, steps against PyTorch's own optimizers, state dicts both ways."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import arrondi as ar
from arrondi.errors import DataError, SchemeError
from arrondi.formats import dynamic_levels
from arrondi.native import native
from arrondi.optim import Adam8bit, AdamW8bit, Momentum8bit, kernel
from arrondi.optim.blocks import MAPS, Blocks
from arrondi.optim.kernel import cells_of
from arrondi.optim.update import Adam, Momentum
from arrondi.tensor.encoding import encode
from tests.kernels.common import normal

OPTIMIZERS = [(AdamW8bit, torch.optim.AdamW, {}), (Adam8bit, torch.optim.Adam, {"weight_decay": 0.1}), (Momentum8bit, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (Momentum8bit, torch.optim.SGD, {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.01})]  # fmt: skip


def test_the_map_is_the_specification_s() -> None:
    for signed, least in ((True, 5.5e-7), (False, 3.25e-7)):
        levels = dynamic_levels(signed)
        assert len(levels) == len(set(levels)) == 256 and 0.0 in levels and levels[-1] == 1.0
        assert min(v for v in levels if v > 0) == pytest.approx(least)
        decades = [sum(10.0**-i / 10 < v <= 10.0**-i for v in levels[:-1]) for i in range(7)]
        assert decades == [(64 if signed else 128) >> i for i in range(7)]
    assert dynamic_levels()[0] == pytest.approx(-0.99296875, rel=1e-7)


@pytest.mark.parametrize("map", MAPS)
def test_every_value_is_a_fixed_point_and_errors_are_bounded(map: str) -> None:
    values = torch.tensor(MAPS[map].values) * 3.0
    found = Blocks.of(values, map, 256)
    assert torch.equal(found.read(0, 256), values)
    x = torch.logspace(-0.999, 0, 4096)
    error = ((Blocks.of(torch.cat([x, torch.ones(1)]), map, 4097).read(0, 4096) - x) / x).abs()
    assert float(error.max()) < 0.075 and float(error[x > 0.95].max()) < 0.0081


@pytest.mark.parametrize("map", MAPS)
def test_cells_find_what_bucketize_finds(map: str) -> None:
    """Around every threshold, and for numbers of every size."""
    format, cells = MAPS[map], cells_of(MAPS[map])
    levels = torch.tensor(format.values, dtype=torch.float64)
    middle = ((levels[1:] + levels[:-1]) / 2).float()
    near = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))]
    x = torch.cat([*near, normal(4096) / 5, torch.logspace(-30, 0, 999), -torch.logspace(-30, 0, 999)]).clamp(-1, 1)
    bits = x.view(torch.int32)
    count = cells.codes.numel() // 2
    place = ((bits & 0x7FFFFFFF) >> 16).sub(cells.first).clamp(0, count - 1) + (bits < 0) * count
    found = cells.codes[place] + (x > cells.thresholds[place])
    assert torch.equal(found.to(torch.uint8), encode(x, format))


def test_small_squares_are_not_lost() -> None:
    """The specification: log-normal numbers of log-deviation 2; a linear map makes 39 % of them 0."""
    v = (normal(1 << 16) * 2).exp() * 1e-6
    found = Blocks.of(v, "dynamic8-unsigned", 256).read(0, v.numel())
    assert int((found == 0).sum()) == 0
    assert float(((found - v) / v).abs().mean()) == pytest.approx(0.028, abs=0.004)


def pair(ours: type, theirs: type, options: dict[str, Any], shape: tuple[int, ...], **own: Any) -> tuple[Any, Any]:
    made = []
    for kind, more in ((ours, own), (theirs, {})):
        p = nn.Parameter(normal(*shape))
        made.append((p, kind([p], lr=1e-2, **options, **more)))
    return made[0], made[1]


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMIZERS)
def test_float32_states_are_pytorch_s_own_to_the_bit(ours: type, theirs: type, options: dict[str, Any]) -> None:
    (p, mine), (q, other) = pair(ours, theirs, options, (32, 8))
    for step in range(5):
        p.grad = q.grad = normal(32, 8, seed=step)
        mine.step(), other.step()
        assert torch.equal(p, q)


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMIZERS)
def test_the_first_step_is_exact_and_later_ones_follow(ours: type, theirs: type, options: dict[str, Any]) -> None:
    """What a step moves by is of this step's own float32 state, so nothing is rounded before the second."""
    (p, mine), (q, other) = pair(ours, theirs, options, (130, 70))
    moved = torch.zeros(())
    for step in range(12):
        before = q.detach().clone()
        p.grad, q.grad = (normal(130, 70, seed=step) * 0.1 for _ in range(2))
        mine.step(), other.step()
        moved = moved + (q.detach() - before).norm()
        assert float((p - q).detach().norm()) < (2e-6 if step == 0 else 0.03) * float(moved)


@pytest.mark.skipif(native is None or not hasattr(native, "step_adam"), reason="the extension is not compiled")
@pytest.mark.parametrize("count", [1, 255, 256, 5000, 70001])
def test_the_kernel_is_its_reference(path: str, count: int) -> None:
    for block in (256, 100):
        rules = [
            (Adam(1e-2, 0.9, 0.999, 1e-8, 0.01, True, 3), kernel.step_adam),
            (Adam(1e-2, 0.8, 0.99, 1e-6, 0.1, False, 1), kernel.step_adam),
            (Momentum(1e-2, 0.9, 0.1, 0.01, False, 1), kernel.step_momentum),
            (Momentum(1e-2, 0.9, 0.0, 0.0, True, 2), kernel.step_momentum),
        ]
        for rule, step in rules:
            p, g = normal(count), normal(count, seed=1) * 0.1
            states = [Blocks.of(normal(count, seed=2) ** 3 * 1e-2, "dynamic8", block)]
            if isinstance(rule, Adam):
                states.append(Blocks.of((normal(count, seed=3) * 2).exp() * 1e-4, "dynamic8-unsigned", block))
            q, twins = p.clone(), copy.deepcopy(states)
            values = [s.read(0, count) for s in twins]
            rule(q, g, *values)
            for state, value in zip(twins, values, strict=True):
                state.write(0, value)
            step(rule, p, g, *states)
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            for mine, twin in zip(states, twins, strict=True):
                torch.testing.assert_close(mine.scale, twin.scale, rtol=1e-6, atol=0)
                assert float((mine.codes != twin.codes).float().mean()) < 1e-3, (
                    "PyTorch may add a product in one rounding"
                )
                torch.testing.assert_close(mine.read(0, count), twin.read(0, count), rtol=0.1, atol=1e-9)


def test_without_the_kernel_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(kernel, "takes", lambda p, states: False)
        p = nn.Parameter(normal(90, 90))
        optimizer = AdamW8bit([p], lr=1e-2)
        for step in range(6):
            p.grad = normal(90, 90, seed=step)
            optimizer.step()
        found.append(p.detach().clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 96), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 64))


def trained(model: nn.Module, make: Callable[[nn.Module], Any], steps: int = 150) -> tuple[float, Any]:
    draw, optimizer = torch.Generator().manual_seed(1), make(model)
    losses = []
    for _ in range(steps):
        ids = torch.randint(64, (128,), generator=draw)
        loss = nn.functional.cross_entropy(model(ids), (ids * 7 + 3) % 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20, optimizer


def test_it_trains_as_float32_states_do() -> None:
    wanted, _ = trained(small(), lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3))
    found, optimizer = trained(small(), lambda m: AdamW8bit(m, lr=3e-3))
    assert found < 1.15 * wanted + 0.01
    kinds = [type(optimizer.state[p]["exp_avg"]).__name__ for p in optimizer.param_groups[0]["params"]]
    assert kinds == ["Tensor", "Blocks", "Tensor", "Blocks", "Tensor"], "embeddings and small tensors keep float32"
    assert optimizer.state_nbytes == sum(
        2 * (n + 4 * -(-n // 256)) if k == "Blocks" else 8 * n
        for k, n in zip(kinds, [p.numel() for p in optimizer.param_groups[0]["params"]], strict=True)
    )


@pytest.mark.parametrize(("ours", "theirs", "options"), OPTIMIZERS[:3])
def test_state_dicts_go_both_ways(ours: type, theirs: type, options: dict[str, Any]) -> None:
    model = small()
    _, other = trained(model, lambda m: theirs(m.parameters(), lr=1e-3, **options), steps=5)
    mine = ours(model.parameters(), lr=1e-3, **options)
    mine.load_state_dict(other.state_dict())
    stored = io.BytesIO()
    torch.save(mine.state_dict(), stored)
    stored.seek(0)
    again = ours(model.parameters(), lr=1.0, **options)
    again.load_state_dict(torch.load(stored, weights_only=True))
    back = theirs(model.parameters(), lr=1.0, **options)
    back.load_state_dict(again.state_dict(bits=32))
    assert again.param_groups[0]["lr"] == back.param_groups[0]["lr"] == 1e-3
    for p in model.parameters():
        for name in ours.maps:
            value, rounded = other.state[p][name], back.state[p][name]
            assert float((value - rounded).norm()) <= 0.02 * float(value.norm())
            packed = again.state[p][name]
            if isinstance(packed, Blocks):
                assert torch.equal(packed.codes, mine.state[p][name].codes)
                assert again.state_dict()["state"][1][name]["block"] == 256
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    mine.step(), again.step(), back.step()


def test_groups_closures_layouts_and_types() -> None:
    p, q = (
        nn.Parameter(normal(8, 16, 8, 8).to(memory_format=torch.channels_last)),
        nn.Parameter(normal(80, 80).bfloat16()),
    )
    r = nn.Parameter(normal(80, 80))
    optimizer = AdamW8bit(
        [{"params": [p, q]}, {"params": [r], "lr": 0.0, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((x.float() ** 2).sum() for x in (p, q, r))
        loss.backward()
        return loss

    before, kept = float(optimizer.step(closure).detach()), r.detach().clone()
    assert float(optimizer.step(closure).detach()) < before and torch.equal(r, kept)
    assert p.is_contiguous(memory_format=torch.channels_last) and q.dtype == torch.bfloat16
    step = (normal(8, 16, 8, 8) - p.detach()).abs()
    assert float(step.max()) < 0.0205, "no number moved as another should"


@pytest.mark.parametrize("ours", [AdamW8bit, Momentum8bit])
def test_copies_and_pickles_go_on_alike(ours: type) -> None:
    model = nn.Sequential(nn.Embedding(100, 50), nn.Linear(50, 90))
    optimizer = ours(model, block=128)

    def go(net: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        net(torch.arange(9)).square().sum().backward()
        optimizer.step()
        return net[1].weight.detach()

    go(model, optimizer)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    wanted = go(model, optimizer)
    for twin, other in twins:
        assert torch.equal(go(twin, other), wanted)
        other.load_state_dict(other.state_dict())  # embeddings are still known
        assert other.state_nbytes == optimizer.state_nbytes


def test_states_of_small_half_tensors_are_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        p = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = AdamW8bit([p], lr=1e-2, weight_decay=0.0)
        for step in range(3):
            p.grad = torch.tensor([0.0, 1e-4], dtype=dtype).repeat(4)
            optimizer.step()
            assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
            assert (p[::2] == 1).all() and torch.allclose(
                p[1::2].float(), torch.tensor(1 - (step + 1) * 1e-2), atol=9e-3
            )


def test_nan_and_infinity_are_not_hidden() -> None:
    for bad in (torch.nan, torch.inf):
        p = nn.Parameter(normal(5000))
        optimizer = AdamW8bit([p])
        p.grad = normal(5000)
        p.grad[300] = bad
        optimizer.step()
        assert not torch.isfinite(p[300]) and bool(torch.isfinite(p[:300]).all())
        p.grad = normal(5000)
        optimizer.step()
        assert int((~torch.isfinite(p)).sum()) in range(1, 257)


def test_bad_input() -> None:
    layer = nn.Embedding(100, 100, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(DataError, match="SparseAdam"):
        AdamW8bit(layer.parameters()).step()
    with pytest.raises(SchemeError, match="betas"):
        AdamW8bit([nn.Parameter(torch.ones(2))], betas=(0.9, 1.0))
    with pytest.raises(SchemeError, match="lr"):
        AdamW8bit([nn.Parameter(torch.ones(2))], lr=math.nan)
    complex_one = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    complex_one.grad = complex_one.detach()
    with pytest.raises(DataError, match="complex64: give it"):
        AdamW8bit([complex_one]).step()
    with pytest.raises(SchemeError, match="nesterov"):
        Momentum8bit([nn.Parameter(torch.ones(2))], momentum=0.0, nesterov=True)
    p = nn.Parameter(normal(5000))
    p.grad = torch.ones(5000)
    optimizer, other = AdamW8bit([p]), torch.optim.AdamW([p], amsgrad=True)
    optimizer.step()
    with pytest.raises(SchemeError, match="amsgrad"):
        optimizer.load_state_dict(other.state_dict())
    state = optimizer.state_dict()
    with pytest.raises(DataError, match="of this model"):
        AdamW8bit([nn.Parameter(normal(6000))]).load_state_dict(state)
    state["state"][0]["exp_avg"]["map"] = "linear8"
    with pytest.raises(SchemeError, match="linear8"):
        optimizer.load_state_dict(state)


def test_it_is_reached_from_the_package() -> None:
    assert ar.optim.AdamW8bit is AdamW8bit


def test_nothing_moves_before_it_is_refused() -> None:
    table, p = nn.Embedding(100, 100, sparse=True), nn.Parameter(normal(5000))
    table(torch.tensor([1])).sum().backward()
    p.grad, before = torch.ones(5000), p.detach().clone()
    optimizer = AdamW8bit([p, table.weight])
    with pytest.raises(DataError, match="SparseAdam"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


def test_states_of_other_kinds_of_optimizers() -> None:
    """SGD's says nothing of betas; Adam takes over how AdamW decays, as PyTorch's does."""
    p, q = (nn.Parameter(normal(32, 8)) for _ in range(2))
    with pytest.raises(DataError, match="finds no 'betas'"):
        AdamW8bit([p]).load_state_dict(torch.optim.SGD([p], 0.1, momentum=0.9).state_dict())
    mine, other = Adam8bit([p]), torch.optim.Adam([q])
    for optimizer, parameter in ((mine, p), (other, q)):
        optimizer.load_state_dict(torch.optim.AdamW([parameter], 1e-2, weight_decay=0.5).state_dict())
        parameter.grad = normal(32, 8, seed=1)
        optimizer.step()
    assert torch.equal(p, q)
