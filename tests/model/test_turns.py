"""What of a model can be rotated, found by following its tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.model import InMemory, Inputs, OnDisk
from arrondi.model.turns import Turn, Turns, find_turns


class Residual(nn.Module):
    """x + out(act(inside(norm(x)))), between two layers that are no part of it."""

    def __init__(self, norm: nn.Module, change: Callable[[Any, torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 16), norm, nn.Linear(16, 3)
        self.inside, self.out, self.scale = nn.Linear(16, 24), nn.Linear(24, 16), nn.Parameter(torch.ones(16))
        self.register_buffer("places", torch.ones(16))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        added = self.out(torch.relu(self.inside(self.norm(x))))
        x = x + (added if self.change is None else self.change(self, added))
        return self.head(x)


def turns_of(model: nn.Module) -> Turns:
    return find_turns(InMemory(model.eval()), Inputs((torch.randn(2, 7, 5),)))


def sides(turn: Turn) -> set[tuple[str, int]]:
    return {(p.param, p.axis) for p in turn.parts}


STREAM = {("first.weight", 0), ("first.bias", 0), ("inside.weight", 1), ("out.weight", 0), ("out.bias", 0), ("head.weight", 1)}  # fmt: skip


def test_every_reader_and_writer_of_hidden_states_is_turned() -> None:
    (turn,) = turns_of(Residual(nn.RMSNorm(16))).others
    assert sides(turn) == STREAM and not turn.ones
    (taken,) = turn.taken
    assert taken.gain.weight == "norm.weight" and taken.readers == (("inside.weight", 1),)
    (turn,) = turns_of(Residual(nn.LayerNorm(16))).others
    assert sides(turn) == STREAM and turn.ones
    assert turn.taken[0].gain.bias == "norm.bias" and turn.taken[0].biases == ("inside.bias",)


def test_the_parts_of_a_product_and_of_a_sum_of_axes_are_told_apart() -> None:
    """Values of attention, head by head, in one matrix with queries and keys."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(5, 12 + 6 + 6), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).split((12, 6, 6), -1)
            q, k, v = (t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (q.sin(), k.sin(), v))
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))  # two heads share one
            return self.out((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2))

    (turn,) = turns_of(Attention()).others
    assert turn.size == 3
    assert {p.param: p.channels.tolist() for p in turn.parts} == {
        "qkv.weight": [[18, 19, 20], [21, 22, 23]],
        "qkv.bias": [[18, 19, 20], [21, 22, 23]],
        "out.weight": [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda m, x: x * m.scale,  # a scale for each channel before the sum
        lambda m, x: m.norm(x),  # a norm with a gain before the sum
        lambda m, x: x + m.places,  # a buffer cannot be turned
        lambda m, x: x.relu(),
        lambda m, x: x * torch.sigmoid(x),
        lambda m, x: x.flip(-1),
        lambda m, x: x.roll(1, -1),
        lambda m, x: x.cumsum(-1),
        lambda m, x: x * x,
    ],
    ids=["scale", "norm", "buffer", "relu", "gate", "flip", "roll", "cumsum", "square"],
)
def test_what_commutes_with_no_turn_stops_it(change: Any) -> None:
    for turn in turns_of(Residual(nn.RMSNorm(16), change)).others:
        assert ("head.weight", 1) not in sides(turn)


@pytest.mark.parametrize(
    "change, ones",
    [
        (lambda m, x: 0.3 * x - x / 4, False),
        (
            lambda m, x: x * torch.sigmoid(x.square().mean(-1, keepdim=True)),
            False,
        ),  # a length is a length in every basis
        (lambda m, x: x / x.norm(dim=-1, keepdim=True), False),
        (lambda m, x: x - x.mean(-1, keepdim=True), True),
        (lambda m, x: x + 1, True),
        (lambda m, x: x + m.scale, False),  # a vector that is stored is turned along
    ],
    ids=["numbers", "length", "norm", "mean", "one", "vector"],
)
def test_what_commutes_with_turns_does_not(change: Any, ones: bool) -> None:
    (turn,) = turns_of(Residual(nn.RMSNorm(16), change)).others
    assert sides(turn) >= STREAM and turn.ones is ones


def test_halves_that_change_places_are_followed() -> None:
    swapped = lambda m, x: torch.cat((x[..., 8:], x[..., :8]), -1)  # noqa: E731
    first, second = turns_of(Residual(nn.RMSNorm(16), swapped)).others
    assert sides(first) == sides(second) == STREAM
    found = [{p.param: p.channels.tolist() for p in turn.parts} for turn in (first, second)]
    low, high = [[*range(8)]], [[*range(8, 16)]]
    assert [(f["head.weight"], f["out.weight"]) for f in found] == [(low, high), (high, low)]
    (turn,) = turns_of(Residual(nn.RMSNorm(16), lambda m, x: x + swapped(m, x))).others
    assert turn.size == 8 and len(turn.parts) == 2 * len(STREAM), "both halves alike"
    assert [p.channels.tolist() for p in turn.parts if p.param == "head.weight"] == [low, high]


def test_a_gain_that_is_used_otherwise_is_not_taken_over() -> None:
    class Twice(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.norm.weight.sum()

    assert turns_of(Twice(nn.RMSNorm(16))).others
    model = Residual(nn.RMSNorm(16), lambda m, x: x + m.norm.weight)
    assert not turns_of(model).others, "the vector would be both ones and what it was"
    model = Residual(nn.RMSNorm(16), lambda m, x: x + 0 * torch.nn.functional.linear(x, m.inside.weight).sum())
    assert not turns_of(model).others, "the weight reads the same states with and without the gain"


def test_experts_that_are_not_reached_are_what_the_others_are() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleList([nn.Linear(16, 9), nn.Linear(9, 16)]) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside, out = self.experts[1]
            return x + out(inside(x).relu())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.blocks = nn.Linear(5, 16), nn.Linear(16, 3), nn.ModuleList([Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks[0](self.first(x)))

    (turn,) = turns_of(Model()).stream
    assert {s for s in sides(turn) if "experts" in s[0]} == {
        (f"blocks.0.experts.{i}.{n}", a) for i in range(3) for n, a in (("0.weight", 1), ("1.weight", 0), ("1.bias", 0))
    }


@pytest.mark.parametrize(
    "name, ones, others",
    [("llama", False, 3), ("gpt2", True, 3), ("qwen2-moe", False, 3), ("deepseek-v3", False, 6), ("mamba", False, 0)],
)
def test_models_whose_hidden_states_can_be_turned(
    name: str, ones: bool, others: int, models: Callable[..., Path]
) -> None:
    turns = find_turns(OnDisk.open(models(name)))
    assert [t.ones for t in turns.stream] == [ones] and turns.stream[0].size == 64 and not turns.why
    assert len(turns.others) == others


@pytest.mark.parametrize(
    "name, why",
    [
        ("gemma2", "post_feedforward_layernorm.weight scales its channels before a sum"),
        ("bert", "embeddings.LayerNorm.weight scales its channels before a sum"),
        ("xglm", "the buffer model.embed_positions.weights is a part of it"),
        ("t5-encoder", "final_layer_norm.weight scales its channels before it is what the model gives"),
        ("qwen2.5-vl", "no input that was tried reaches model.visual.patch_embed.proj.weight"),
    ],
)
def test_models_whose_hidden_states_stay(name: str, why: str, models: Callable[..., Path]) -> None:
    turns = find_turns(OnDisk.open(models(name)))
    assert not turns.stream and why in turns.why
    assert turns.others, "values of attention can be turned all the same"


def test_a_model_that_does_not_run_is_one_sentence() -> None:
    with pytest.raises(SchemeError, match="does not run on inputs made up from its config"):
        find_turns(InMemory(Residual(nn.RMSNorm(16))), Inputs((torch.randn(2, 4),)))
