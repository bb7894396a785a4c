"""Folds that are found leave a model's outputs as they were, and those that are expected are found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.model import Fold, InMemory, OnDisk, apply_fold, find_folds
from arrondi.model.flow_routers import tensors_of
from arrondi.model.shapes import usual_inputs
from tests.zoo import make

SHAPES = ((2, 13), (1, 29), (3, 5))
"""Batches and lengths; positions are those that the model counts itself."""


def batches(model: Any, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random inputs of the first kind that the model takes."""
    made = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        ids = torch.randint(2, 96, shape, generator=made)
        usual = [{"input_ids": ids}, *usual_inputs(model, torch.device("cpu"))]
        filled = (
            {
                k: ids if v.dtype == torch.long else torch.randn((len(ids), *v.shape[1:]), generator=made)
                for k, v in u.items()
            }
            for u in usual
        )
        yield next(batch for batch in filled if runs(model, batch))


def runs(model: Any, batch: dict[str, torch.Tensor]) -> bool:
    try:
        model(**batch)
    except Exception:  # it wants other inputs
        return False
    return True


@torch.no_grad()
def change(model: Any, folds: list[Fold], seed: int = 0) -> float:
    """How far outputs move, relative to their largest number, when all folds are applied with random scales; in float64."""
    noise = torch.Generator().manual_seed(seed)
    before, after = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    params = dict(after.named_parameters(remove_duplicate=False))
    for fold in folds:
        assert fold.producer is not None
        scale = torch.empty(fold.producer.count).uniform_(-1.2, 1.1, generator=noise).exp()
        apply_fold(fold, scale, params.__getitem__, lambda name, value: params[name].copy_(value))
    worst = 0.0
    for batch in batches(model, seed):
        given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        outputs = [list(tensors_of([dict(m(**given, **no_cache(m)))])) for m in (before, after)]
        for x, y in zip(*outputs, strict=True):
            if x.is_floating_point():
                worst = max(worst, float((x - y).abs().max() / x.abs().max()))
    return worst


def no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if getattr(model.config, "use_cache", None) else {}


def short(fold: Fold) -> tuple[tuple[str, ...], str]:
    """Consumers and producer of a fold by the last parts of their names."""
    assert fold.producer is not None
    ends = sorted(name.removesuffix(".weight").rpartition(".")[2] for name in fold.consumers)
    return tuple(ends), fold.producer.param.removesuffix(".weight").rpartition(".")[2]


def found(model: Any) -> list[Fold]:
    """The folds of a model, held against what must be true of all."""
    source = InMemory(model)
    folds = find_folds(source)
    named = [name for fold in folds for name in fold.consumers]
    assert len(set(named)) == len(named)
    for fold in folds:
        assert (fold.reason is None) == bool(fold.channels)
        assert all(len(fold.channels) in (0, s.shape[-1]) for s in fold.sites)
    return folds


ATTENTION = {(("k_proj", "q_proj", "v_proj"), "input_layernorm"), (("o_proj",), "v_proj")}
GATED = {(("gate_proj", "up_proj"), "post_attention_layernorm"), (("down_proj",), "up_proj")}
LLAMA = ATTENTION | GATED

EXPECTED: dict[str, set[tuple[tuple[str, ...], str]]] = {
    "llama": LLAMA | {(("lm_head",), "norm")},
    "llama-tied": LLAMA,
    "qwen3": LLAMA | {(("lm_head",), "norm")},
    "gpt2": {(("c_attn",), "ln_1"), (("c_proj",), "c_attn"), (("c_fc",), "ln_2")},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_folds_are_found_and_keep_the_outputs(name: str) -> None:
    model = make(name)
    folds = [fold for fold in found(model) if fold.reason is None]
    assert {short(fold) for fold in folds} == EXPECTED[name]
    assert change(model, folds) < 1e-5


def test_a_fold_that_is_half_applied_shows() -> None:
    model = make("llama")
    folds = [fold for fold in found(model) if fold.reason is None]
    for fold in folds[:3]:
        half = Fold(fold.consumers[:1], fold.producer, fold.channels, None, ())
        assert change(model, [half]) > 1e-2


def test_grouped_heads_repeat_their_channels() -> None:
    folds = {short(fold): fold for fold in found(make("llama"))}
    values = folds[("o_proj",), "v_proj"]
    assert values.channels == tuple(head // 2 * 16 + i for head in range(4) for i in range(16))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_on_disk_has_the_same_folds(name: str, models: Any) -> None:
    ours = {(f.producer, f.channels, f.reason, frozenset(s.param for s in f.sites)) for f in found(make(name))}
    source = OnDisk.open(models(name))
    assert {(f.producer, f.channels, f.reason, frozenset(s.param for s in f.sites)) for f in find_folds(source)} == ours


def test_what_cannot_be_applied_is_refused() -> None:
    folds = found(make("gpt2"))
    none = next(fold for fold in folds if fold.reason is not None)
    some = next(fold for fold in folds if fold.reason is None)
    assert some.producer is not None
    with pytest.raises(SchemeError, match="Nothing can be folded"):
        apply_fold(none, torch.ones(4), lambda name: torch.ones(4), lambda name, value: None)
    for scale in (torch.ones(some.producer.count + 1), torch.zeros(some.producer.count)):
        with pytest.raises(ShapeError, match="positive numbers"):
            apply_fold(some, scale, lambda name: torch.ones(4), lambda name, value: None)


def test_a_module_that_does_not_run_says_so() -> None:
    with pytest.raises(SchemeError, match="does not run on inputs made up"):
        find_folds(InMemory(torch.nn.Sequential(torch.nn.Linear(4, 4))))
