"""Folds that are found leave a model's outputs as they were, and those that are expected are found."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.errors import SchemeError, ShapeError
from arrondi.model import Fold, InMemory, OnDisk, apply_fold, find_folds
from arrondi.model.build import configs_in
from arrondi.model.flow_routers import tensors_of
from arrondi.model.shapes import usual_inputs
from tests.model.test_flow_models import small
from tests.zoo import DECODER, TWO, ZOO, make, of_transformers, perturb, save

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
    for part in configs_in(model.config):
        part._experts_implementation = "eager"
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


GENERIC = {
    "vocab_size": 128,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What configs of decoders call their sizes."""


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


FURTHER = {
    "t5": 20, "whisper": 16, "mamba": 4, "mamba2": 5, "jamba": 12, "rwkv": 5, "gpt-oss": 7, "llama4": 7, "gemma3n": 20,
    "falcon": 4, "modernbert": 7, "recurrent-gemma": 10, "minicpm3": 12, "falcon-h1": 9, "zaya": 18, "hunyuan": 17,
    "dinov2-swiglu": 8, "clip": 13, "olmo-hybrid": 7, "minimax": 11, "hrm": 8,
    "bloom": 6, "cohere": 6, "codegen": 5, "gpt_neox": 7, "gptj": 5, "granite": 9, "mistral": 9, "mpt": 6, "olmo2": 5,
    "stablelm": 9, "starcoder2": 6, "persimmon": 7,
}  # fmt: skip
"""Model of the zoo, or kind of transformers → folds that can be made in it."""


@pytest.mark.parametrize("name", FURTHER)
def test_no_fold_of_any_model_changes_its_outputs(name: str) -> None:
    model = make(name) if name in ZOO else small(name, **GENERIC)
    folds = [fold for fold in found(model) if fold.reason is None]
    assert change(model, folds) < 1e-5
    assert len(folds) == FURTHER[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_that_read_the_same_activation_are_in_one_fold(name: str) -> None:
    """Held against the inputs that hooks see: the same tensor, or one that lies in the same place."""
    model = built(name)
    batch = next(batches(model, 0))
    kept: list[torch.Tensor] = []
    readers: dict[Any, set[str]] = {}

    def hook(name: str, x: torch.Tensor) -> None:
        kept.append(x)  # so that no place is used again
        readers.setdefault((x.data_ptr(), x.numel()), set()).add(name)

    for path, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(lambda m, args, name=f"{path}.weight": hook(name, args[0]))
    with torch.no_grad():
        model(**batch)
    folds = find_folds(InMemory(model))
    sited = {site.tensor for fold in folds for site in fold.sites}
    assert readers
    for names in readers.values():
        own = [fold for fold in folds if names & set(fold.consumers)]
        assert len(own) == bool(names & sited)
        assert all(names & sited <= set(fold.consumers) for fold in own)
        assert names <= sited or names <= {"lm_head.weight"}  # which is tied, and has another name


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phi3-fused-qkv"])
def test_a_model_on_disk_has_the_same_folds(name: str, models: Any) -> None:
    """Files may hold experts one by one, and name things otherwise; scales go into the parameters of the model all the same."""
    source = OnDisk.open(models(name))
    folds = find_folds(source)
    stored = set(source.checkpoint.names)
    assert all(site.tensor in stored for fold in folds for site in fold.sites)
    good = [fold for fold in folds if fold.reason is None]
    assert {(f.producer, f.channels) for f in good} == {
        (f.producer, f.channels) for f in found(make(name)) if not f.reason
    }
    assert change(of_transformers(name, models(name)), good) < 1e-5


def test_names_with_and_without_the_prefix_give_the_same_folds(models: Any, tmp_path: Path) -> None:
    save(make("llama-tied").model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    short_names, names = (find_folds(OnDisk.open(p)) for p in (tmp_path, models("llama-tied")))
    assert {(f.producer, f.channels, f.reason) for f in short_names} >= {
        (f.producer, f.channels, f.reason) for f in names if f.unit
    }
    consumers = {c for f in short_names for c in f.consumers if f.unit is not None}
    assert consumers == {c.removeprefix("model.") for f in names for c in f.consumers if f.unit is not None}
    assert "layers.0.mlp.down_proj.weight" in consumers


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
