"""Small models made to mislead: what may be folded is found, numbers agree, and what reads an activation otherwise forbids it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from arrondi.model import Fold, InMemory, Inputs, apply_fold, find_folds

N, M = 6, 10
"""Widths outside and inside."""


class Plain(nn.Module):
    """A model of layers whose forward is `function(model, x)`."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.norm, self.layer_norm = nn.RMSNorm(N), nn.LayerNorm(N)
        self.up, self.gate, self.down = nn.Linear(N, M), nn.Linear(N, M), nn.Linear(M, N)
        self.shift, self.factor, self.table = (nn.Parameter(torch.zeros(n)) for n in (M, M, (M, M)))
        self.wide, self.narrow = nn.Linear(2 * M, N), nn.Linear(M - 4, N)
        self.stack = nn.Parameter(torch.zeros(2, N, M))
        self.other, self.down2, self.both = nn.Linear(N, N), nn.Linear(M, N), nn.Linear(N, 2 * M)
        made = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) + x.mean()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def own(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.up(x)) + m.other(Own.apply(m.up(x))[..., :N])


def stored(m: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(*x.shape[:-1], M)
    out[..., ::2] = m.up(x)[..., ::2]
    out[..., 1::2] = m.up(x)[..., 1::2]
    return m.down(out)


def half_stored(m: Any, x: torch.Tensor) -> torch.Tensor:
    out = x.new_ones(*x.shape[:-1], M)
    out[..., :5] = m.up(x)[..., :5]
    return m.down(out)


def changed(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    y += 1
    return m.down(y)


def in_place_of_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    y[..., 3].exp_()
    return m.down(y)


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    heads = [f(x).unflatten(-1, (2, 5)).transpose(1, 2) for f in (m.up, m.gate, m.up)]
    return m.down(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def own_values(m: Any, x: torch.Tensor) -> torch.Tensor:
    values = m.up(x).unflatten(-1, (2, 5)).transpose(1, 2)
    scores = m.gate(x).unflatten(-1, (2, 5)).transpose(1, 2)
    return m.down((torch.softmax(scores @ scores.mT, -1) @ values).transpose(1, 2).flatten(2))


def handmade_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True).add(1e-5).rsqrt()
    return m.up(m.layer_norm.weight * y + m.layer_norm.bias)


def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.up(x)) + m.down(m.gate(x))


def flipped(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.up(x)) + m.down2(m.up(x).flip(-1))


def parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.both(x).chunk(2, -1)
    return m.down(first) + m.down2(second.exp() * x.mean() + torch.relu(second) * 0)


def two_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.both(x).chunk(2, -1)
    return m.down(first) + m.down2(torch.relu(second))


def added_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.norm.weight.sub_(1)
    m.norm.weight.add_(1)
    return m.up(m.norm(x))


def rows_differ(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    return m.down(torch.stack([y[:, t].roll(t, -1) for t in range(y.shape[1])], 1))


def biased_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.up(x) + m.shift) + m.other(m.shift[:N] * x)


def weight_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.up(m.norm(x)) + m.norm.weight.sum()


def both_offsets(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.up(x * (1 + m.norm.weight)) + m.gate(x * m.norm.weight)


def matrices(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.up(m.norm(x)) + torch.einsum("btn,enm->btm", m.norm(x), m.stack)


FOLDS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, str]]] = {
    "a norm": (lambda m, x: m.up(m.norm(x)) + m.gate(m.norm(x)), {"up gate": "norm"}),
    "one and a norm": (lambda m, x: m.up(x * (1.0 + m.norm.weight)), {"up": "norm"}),
    "a norm with a bias": (lambda m, x: m.up(m.layer_norm(x)), {"up": "layer_norm"}),
    "a norm written out": (handmade_norm, {"up": "layer_norm"}),
    "rows": (lambda m, x: m.down(m.up(x)), {"down": "up"}),
    "through relu": (lambda m, x: m.down(torch.relu(m.up(x))), {"down": "up"}),
    "through a clamp at zero": (lambda m, x: m.down(m.up(x).clamp(min=0)), {"down": "up"}),
    "through a leaky relu": (lambda m, x: m.down(functional.leaky_relu(m.up(x))), {"down": "up"}),
    "gated": (lambda m, x: m.down(torch.sigmoid(m.gate(x)) * m.up(x)), {"down": "up"}),
    "divided": (lambda m, x: m.down(m.up(x) / m.gate(x).exp()), {"down": "up"}),
    "a bias that comes later": (lambda m, x: m.down(torch.relu(m.up(x)) * m.factor + m.shift), {"down": "factor"}),
    "other order": (lambda m, x: m.down(m.up(x)[..., [3, 1, 2, 0, 9, 8, 7, 6, 5, 4]]), {"down": "up"}),
    "repeated": (lambda m, x: m.wide(m.up(x).repeat(1, 1, 2)), {"wide": "up"}),
    "a part": (lambda m, x: m.narrow(m.up(x)[..., 4:] * m.up(x)[..., :1].exp()), {"narrow": "up"}),
    "written piece by piece": (stored, {"down": "up"}),
    "masked": (lambda m, x: m.down(m.up(x).masked_fill(x[..., :1] > 0, 0.0)), {"down": "up"}),
    "summed over tokens": (lambda m, x: m.down(m.up(x).mean(1)), {"down": "up"}),
    "two parts of one": (two_parts, {"down": "both", "down2": "both"}),
    "a part of one": (parts, {"down": "both"}),
    "values of attention": (own_values, {"down": "up"}),
    "twice": (lambda m, x: m.down(m.up(x)) + m.down(m.up(x + 1)), {"down": "up"}),
    "values that are queries too": (attention, {}),
    "through gelu": (lambda m, x: m.down(functional.gelu(m.up(x))), {}),
    "through a clamp": (lambda m, x: m.down(m.up(x).clamp(max=1)), {}),
    "through an integer": (lambda m, x: m.down(m.up(x).long().to(x.dtype)), {}),
    "residual": (lambda m, x: m.other(m.norm(x)) + m.norm(x), {}),
    "returned": (lambda m, x: torch.cat([m.other(m.norm(x)), m.norm(x)]), {}),
    "scripted": (lambda m, x: m.down(m.up(x)) + m.other(scripted(m.up(x))[..., :N]), {}),
    "a function of its own": (own, {}),
    "chosen by": (lambda m, x: m.down(m.up(x)) * m.up(x).argmax(-1, keepdim=True), {}),
    "compared": (lambda m, x: m.down(m.up(x)) * (m.up(x) > 0.5).float().mean(), {}),
    "a number of it": (lambda m, x: m.down(m.up(x)) * m.up(x).max().item(), {}),
    "squared": (lambda m, x: m.down(m.up(x) * m.up(x)), {}),
    "normalised": (lambda m, x: m.down(m.up(x) / m.up(x).norm()), {}),
    "changed": (changed, {}),
    "changed in place": (in_place_of_a_view, {}),
    "one half": (half_stored, {}),
    "joined": (lambda m, x: m.wide(torch.cat([m.up(x), m.gate(x).exp()], -1)), {}),
    "two inputs": (twice, {}),
    "two orders": (flipped, {}),
    "rows differ": (rows_differ, {}),
    "a bias of two": (biased_twice, {}),
    "a norm's weight elsewhere": (weight_twice, {}),
    "two offsets": (both_offsets, {}),
    "a weight elsewhere": (lambda m, x: m.down(m.up(x)) * m.up.weight.norm(), {}),
    "a consumer elsewhere": (lambda m, x: m.down(m.up(x)) + m.down.weight.sum(), {}),
    "a weight that is changed": (added_in_place, {}),
    "a scaled weight": (lambda m, x: functional.linear(m.up(x), m.down.weight * m.factor), {}),
    "matrices of no layer": (matrices, {}),
    "a table": (lambda m, x: m.down(m.up(x)) + m.other((m.up(x) @ m.table.exp())[..., :N]), {}),
}


@pytest.mark.parametrize("case", FOLDS)
@torch.no_grad()
def test_what_can_be_folded(case: str) -> None:
    function, expected = FOLDS[case]
    model = Plain(function).eval()
    noise = torch.Generator().manual_seed(1)
    source = InMemory(model)
    source.run_as_whole(source.facts)
    folds = find_folds(source, Inputs.of(torch.randn(2, 4, N, generator=noise)))
    good = [fold for fold in folds if fold.reason is None]
    assert {tuple(sorted(end(c) for c in f.consumers)): end(f.producer.param) for f in good if f.producer} == {
        tuple(sorted(names.split())): made for names, made in expected.items()
    }
    after = copy.deepcopy(model).double()
    params = dict(after.named_parameters())
    for fold in good:
        scaled(fold, params, noise)
    for shape in ((3, 5, N), (1, 9, N)):
        x = torch.randn(shape, generator=noise)
        wanted = copy.deepcopy(model).double()(x.double())
        assert torch.allclose(after(x.double()), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("case", [c for c, (_, expected) in FOLDS.items() if not expected])
def test_what_is_not_folded_has_a_reason(case: str) -> None:
    model = Plain(FOLDS[case][0]).eval()
    source = InMemory(model)
    source.run_as_whole(source.facts)
    folds = find_folds(source, Inputs.of(torch.randn(2, 4, N, generator=torch.Generator().manual_seed(1))))
    assert folds and all(fold.reason for fold in folds)


def end(name: str) -> str:
    parts = [part for part in name.split(".") if part not in ("weight", "bias")]
    return parts[-1]


def scaled(fold: Fold, params: dict[str, torch.Tensor], noise: torch.Generator) -> None:
    assert fold.producer is not None
    scale = torch.empty(fold.producer.count).uniform_(-1.2, 1.1, generator=noise).exp()
    apply_fold(fold, scale, params.__getitem__, lambda name, value: params[name].copy_(value))
