"""Folds that are found leave a model's outputs as they were, and those that are expected are found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from arrondi.errors import SchemeError, ShapeError
from arrondi.model import Fold, InMemory, OnDisk, apply_fold, find_folds
from arrondi.model.flow_routers import tensors_of
from arrondi.model.shapes import usual_inputs
from tests.zoo import DECODER, TWO, make, perturb

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
            assert bool(x.isfinite().all())
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


HEAD = {(("lm_head",), "norm")}
ATTENTION = {(("k_proj", "q_proj", "v_proj"), "input_layernorm"), (("o_proj",), "v_proj")}
DOWN = {(("down_proj",), "up_proj")}
LLAMA = ATTENTION | DOWN | {(("gate_proj", "up_proj"), "post_attention_layernorm")}
GEMMA = ATTENTION | DOWN | {(("gate_proj", "up_proj"), "pre_feedforward_layernorm")}
STACKED = {((f"down_proj[{i}]",), "gate_up_proj") for i in range(4)}
STACK = tuple(f"gate_up_proj[{i}]" for i in range(4))
ROUTED = STACKED | {(("gate", *STACK), "post_attention_layernorm")}
SHARED = STACKED | DOWN
LATENT = {
    (("kv_a_proj_with_mqa", "q_a_proj"), "input_layernorm"),
    (("q_b_proj",), "q_a_layernorm"),
    (("kv_b_proj",), "kv_a_layernorm"),
    (("o_proj",), "kv_b_proj"),
}
EIGHT = tuple(f"gate_up_proj[{i}]" for i in range(8))
POST_NORM = {(("dense",), "value")}

EXPECTED: dict[str, set[tuple[tuple[str, ...], str]]] = {
    "llama": LLAMA | HEAD,
    "llama-heads": LLAMA | HEAD,
    "llama-tied": LLAMA,
    "qwen2": LLAMA | HEAD,
    "qwen3": LLAMA | HEAD,
    "qwen3.5": LLAMA | HEAD | {(("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z"), "input_layernorm"), (("out_proj",), "norm")},
    "qwen3-next": ATTENTION | HEAD | SHARED | {
        (("in_proj_ba", "in_proj_qkvz"), "input_layernorm"),
        (("out_proj",), "norm"),
        (("gate", "gate_proj", *STACK, "shared_expert_gate", "up_proj"), "post_attention_layernorm"),
    },
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi": {(("fc1", "k_proj", "q_proj", "v_proj"), "input_layernorm"), (("dense",), "v_proj"), (("lm_head",), "final_layernorm")},
    "phi3-fused-qkv": HEAD | {
        (("qkv_proj",), "input_layernorm"),
        (("o_proj",), "qkv_proj"),
        (("gate_up_proj",), "post_attention_layernorm"),
        (("down_proj",), "gate_up_proj"),
    },
    "gpt2": {(("c_attn",), "ln_1"), (("c_proj",), "c_attn"), (("c_fc",), "ln_2")},
    "opt": {
        (("k_proj", "q_proj", "v_proj"), "self_attn_layer_norm"),
        (("out_proj",), "v_proj"),
        (("fc1",), "final_layer_norm"),
        (("fc2",), "fc1"),
    },
    "bert": POST_NORM,
    "deepseek-v3": HEAD | LATENT | DOWN | {((f"down_proj[{i}]",), "gate_up_proj") for i in range(8)} | {
        (("gate_proj", "up_proj"), "post_attention_layernorm"),
        (("gate", "gate_proj", *EIGHT, "up_proj"), "post_attention_layernorm"),
    },
    "mixtral": ATTENTION | ROUTED | HEAD,
    "qwen3-moe": ATTENTION | ROUTED | HEAD,
    "vit": {(("k_proj", "q_proj", "v_proj"), "layernorm_before"), (("o_proj",), "v_proj"), (("fc1",), "layernorm_after")},
}  # fmt: skip
"""Model → consumers and producer of every fold that can be made, by the last parts of their names."""

BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-heads": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3.5": (
        "Qwen3_5ForCausalLM",
        {**TWO, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
    "phi": ("PhiForCausalLM", TWO),
}  # fmt: skip
"""Models that only these tests need."""


def built(name: str) -> Any:
    """A small model, every parameter and stored buffer perturbed."""
    if name not in BUILT:
        return make(name)
    cls, settings = getattr(transformers, BUILT[name][0]), BUILT[name][1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(cls(cls.config_class(**settings))).eval()


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_folds_are_found_and_keep_the_outputs(name: str) -> None:
    model = built(name)
    folds = [fold for fold in found(model) if fold.reason is None]
    assert {short(fold) for fold in folds} == EXPECTED[name]
    assert change(model, folds) < 1e-5


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_that_read_the_same_activation_are_in_one_fold(name: str) -> None:
    """Held against the inputs that hooks see: the same tensor, or one that lies in the same place."""
    model = built(name)
    readers: dict[Any, list[str]] = {}
    inputs: list[torch.Tensor] = []

    def hook(module: Any, args: Any) -> None:
        inputs.append(args[0])  # kept, so that no place is used again
        where = args[0].data_ptr(), args[0].numel()
        readers.setdefault(where, []).extend(names_of[module])

    names_of: dict[Any, list[str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and type(module).__name__ in ("Linear", "Conv1D"):
            names_of.setdefault(module, []).append(f"{path}.weight")
            module.register_forward_pre_hook(hook)
    next(batches(model, 0))
    with torch.no_grad():
        readers.clear(), model(**next(batches(model, 0)))
    together = {fold.consumers: fold for fold in found(built(name))}
    for names in readers.values():
        own = [fold for consumers, fold in together.items() if set(names) & set(consumers)]
        assert len(own) == 1 or {n for n in names if "lm_head" in n or "wte" in n or "embed" in n}
        assert all(set(names) <= set(fold.consumers) for fold in own if len(names) > 1)


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
