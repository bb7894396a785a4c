"""Blocks of few compiled calls against transformers' own forward of the same blocks."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import arrondi
from arrondi.formats import parse_scheme
from arrondi.kernels import FORCE
from arrondi.native import native
from arrondi.nn import QLinear
from arrondi.runtime.fused import fuse, is_fused
from arrondi.tensor.qtensor import quantize_tensor

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

_SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 4}),
    "qwen2-biases": ("Qwen2ForCausalLM", {}),
    "qwen3-head-norms": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma-one-plus-weight": ("GemmaForCausalLM", {"head_dim": 40, "hidden_activation": "gelu_pytorch_tanh"}),
    "granite-plain": ("GraniteForCausalLM", {}),
}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}, r"^Gemma2DecoderLayer has other parts: post_feedforward_layernorm, pre_feedforward_layernorm\.$"),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}, r"^Gemma3DecoderLayer has other parts: post_feedforward_layernorm, pre_feedforward_layernorm\.$"),
    "phi3": ("Phi3ForCausalLM", {}, r"^Phi3DecoderLayer has other parts: resid_attn_dropout, resid_mlp_dropout\.$"),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}, r"^MixtralSparseMoeBlock has other parts: experts, gate\.$"),
    "granite-multiplier": ("GraniteForCausalLM", {"residual_multiplier": 0.5}, r"^It computes something else than a block"),
    "llama-gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}, r"^Its activation is none of silu, gelu_tanh\.$"),
    "llama-few-rows": ("LlamaForCausalLM", {"intermediate_size": 72}, r"^Layers that read the same activations are joined in tiles of 16 rows, and one has 72 rows\.$"),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 288}, r"^Its heads are 288 wide; even widths up to 256 are known\.$"),
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) * 31 % 512
ROUNDOFF = 1e-5
"""Of logits in float32, in units of the largest: a dozen products one after the other, each good to 2^-20 of what it sums."""


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FORCE, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of these small models more would only wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def built(class_name: str, scheme: str = "w=int4/g32", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose blocks have packed weights, as `arrondi.load` makes it, but not fused."""
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**_SMALL, **changes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(3)  # livelier than the default initialisation, so that errors show in the outputs
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, packed(layer, scheme, dtype))
    return model


def packed(layer: nn.Linear, scheme: str, dtype: torch.dtype) -> QLinear:
    asked = parse_scheme(scheme)
    weight = quantize_tensor(layer.weight.detach().float(), asked.weights)
    return QLinear(weight, layer.bias, activations=asked.inputs and asked.inputs.scheme, dtype=dtype)


def fused(name: str, **changes: Any) -> Any:
    class_name, settings = USUAL[name]
    model = built(class_name, **{**settings, **changes})
    assert set(fuse(model).values()) == {None}
    return model


def linears(model: nn.Module) -> list[QLinear]:
    return [m for m in model.modules() if isinstance(m, QLinear)]


def blocks_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "forward" in vars(m)]


def apart(model: Any) -> Any:
    """The same model with transformers' own forward."""
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        del block.forward
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS} | inputs)).logits.float()  # type: ignore[no-any-return]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# ── which blocks, and what they give ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", USUAL)
def test_blocks_of_the_usual_shape_give_what_transformers_gives(name: str):
    model = built(USUAL[name][0], **USUAL[name][1])
    assert not is_fused(model)
    reasons = fuse(model)
    assert reasons == {"model.layers.0": None, "model.layers.1": None}
    assert is_fused(model)
    assert blocks_of(model) == list(model.model.layers)
    other = apart(model)
    assert blocks_of(other) == [] and not is_fused(other)
    found, wanted = logits(model), logits(other)
    assert 0 < off(found, wanted) < ROUNDOFF  # 0 would mean that transformers' forward ran


@pytest.mark.parametrize("name", USUAL)
def test_in_bfloat16_they_are_as_near_to_float32_as_transformers(name: str):
    """Fewer roundings to bfloat16 on the way. Which of two sets of roundings ends nearer is chance: hence the tenth."""
    model = fused(name, dtype=torch.bfloat16)
    exact = built(USUAL[name][0], **USUAL[name][1])
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    for one, two in zip(linears(exact), linears(model), strict=True):
        one._buffers.update(two._buffers)  # codes of weights that were rounded to bfloat16 first
    wanted = logits(exact)
    ours, theirs = ((logits(m) - wanted).norm() for m in (model, apart(model)))
    assert ours <= 1.1 * theirs
    assert theirs < 0.1 * wanted.norm()


@pytest.mark.parametrize("scheme", ["W8A8", "w=int8/g32", "w=uint4/g32/asym", "w=nf4/g32", "w=int4/channel/float32"])
def test_schemes(scheme: str):
    model = fused("llama", scheme=scheme)
    wanted = logits(apart(model))
    # Rounded activations may fall on the other side of an edge: one in some hundred numbers, by one step of 127.
    assert off(logits(model), wanted) < (0.02 if "A8" in scheme else ROUNDOFF)


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_keep_their_forward_and_say_why(name: str):
    class_name, settings, words = OTHERS[name]
    model = built(class_name, **settings)
    before = logits(model)
    found = fuse(model)
    assert list(found) == ["model.layers.0", "model.layers.1"]
    for reason in found.values():
        assert reason is not None and re.search(words, reason), reason
        assert reason.endswith(".") and reason[:-1].count(". ") == 0
    assert blocks_of(model) == [] and not is_fused(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}), ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4})],
    ids=["opt", "gpt2"],
)
def test_models_without_such_blocks_are_left_alone(class_name: str, settings: dict[str, Any]):
    model = built(class_name, **settings)
    before = logits(model, attention_mask=torch.ones_like(IDS))
    assert fuse(model) == {}
    assert not is_fused(model)
    assert torch.equal(logits(model, attention_mask=torch.ones_like(IDS)), before)


def test_what_was_fused_is_not_fused_again():
    model = fused("llama")
    before = logits(model)
    assert set(fuse(model).values()) == {"Its forward was replaced already."}
    assert torch.equal(logits(model), before)


def test_a_mixed_recipe_is_not_fused_and_says_so():
    model = built("LlamaForCausalLM")
    attention = model.model.layers[1].self_attn
    attention.q_proj = packed(nn.Linear(64, 64, bias=False), "w=int8/g32", torch.float32)
    before = logits(model)
    assert fuse(model) == {
        "model.layers.0": None,
        "model.layers.1": "Layers that read the same activations have different schemes.",
    }
    assert not is_fused(model)
    assert off(logits(model), before) < ROUNDOFF


def test_layers_that_are_not_quantized_are_not_fused():
    model = built("LlamaForCausalLM")
    model.model.layers[0].mlp.down_proj = nn.Linear(96, 64, bias=False)
    found = fuse(model)
    assert found["model.layers.0"] == "One of its linear layers is a Linear, no QLinear."
    assert found["model.layers.1"] is None


def without(name: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        part, _, attribute = name.rpartition(".")
        delattr(block.get_submodule(part), attribute)

    return change


def layer_in_bfloat16(block: Any) -> None:
    block.mlp.up_proj = packed(nn.Linear(64, 96, bias=False), "w=int4/g32", torch.bfloat16)


def wider_values(block: Any) -> None:
    block.self_attn.v_proj = packed(nn.Linear(64, 48, bias=False), "w=int4/g32", torch.float32)


def layer_norm(block: Any) -> None:
    block.input_layernorm = nn.LayerNorm(64)


def scattered_groups(block: Any) -> None:
    block.mlp.down_proj.order = torch.arange(96)


def eager(block: Any) -> None:
    block.self_attn.config = copy.copy(block.self_attn.config)
    block.self_attn.config._attn_implementation = "eager"


def demanding(block: Any) -> None:
    class Demanding(type(block)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, *, needed: torch.Tensor, **_: Any) -> torch.Tensor:
            return x + needed

    block.__class__ = Demanding


def two_results(block: Any) -> None:
    class TwoResults(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return super().forward(*args, **kwargs), None

    block.__class__ = TwoResults


REASONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a part less": (without("mlp.act_fn"), "LlamaMLP lacks parts: act_fn."),
    "no scaling": (without("self_attn.scaling"), "LlamaAttention lacks attributes: scaling."),
    "two types": (layer_in_bfloat16, "Its linear layers compute in different types."),
    "wider values": (wider_values, "Its keys and values have different shapes."),
    "layer norm": (layer_norm, "LayerNorm has not exactly a weight of 64 numbers and an eps, as an RMS norm does."),
    "eager": (eager, "Its attention is eager, which is not among the functions that all models share."),
    "demanding": (demanding, "Its forward, called as that of a usual block, raises TypeError."),
    "two results": (two_results, "Its forward gives something else than hidden states."),
    "scattered groups": (scattered_groups, "A layer rounds or reorders its activations before the compiled product."),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_refusal_names_what_it_met(name: str):
    model = built("LlamaForCausalLM")
    change, words = REASONS[name]
    change(model.model.layers[0])
    assert fuse(model) == {"model.layers.0": words, "model.layers.1": None}


@pytest.mark.parametrize("scheme", ["w=int4/g32", "W8A8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_small_differences_count_in_every_type(dtype: torch.dtype, scheme: str):
    model = built("GraniteForCausalLM", scheme=scheme, dtype=dtype, residual_multiplier=0.98)
    assert set(fuse(model).values()) == {"It computes something else than a block of the usual shape."}

    class Louder(transformers.models.granite.modeling_granite.GraniteRMSNorm):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.01 * super().forward(x)  # type: ignore[no-any-return]

    model = built("GraniteForCausalLM", scheme=scheme, dtype=dtype)
    model.model.layers[0].input_layernorm = Louder(64).to(dtype)
    assert fuse(model) == {"model.layers.0": "Louder computes something else than an RMS norm.", "model.layers.1": None}


def test_comparing_leaves_no_trace():
    """Not even where the blocks are compared in float32 and compute in bfloat16."""
    model = built("GraniteForCausalLM", dtype=torch.bfloat16, residual_multiplier=0.98)
    before = logits(model)
    fuse(model)
    assert {m.meta.dtype for m in linears(model)} == {torch.bfloat16}
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=int8/channel,a=int8/token"])
def test_a_block_that_adds_nothing_is_fused_too(scheme: str):
    """As those with which a deeper model starts to be trained."""
    model = built("LlamaForCausalLM", scheme)
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        linear.packed_scale.zero_()
    assert set(fuse(model).values()) == {None}


def test_float16_is_not_fused():
    model = built("LlamaForCausalLM", dtype=torch.float16)
    assert set(fuse(model).values()) == {"Its linear layers compute in float16; float32 and bfloat16 are known."}


# ── calls of many kinds ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma-one-plus-weight"])
def test_padding(name: str):
    model = fused(name)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    seen = mask.bool()
    found, wanted = (logits(m, attention_mask=mask)[seen] for m in (model, apart(model)))
    assert 0 < off(found, wanted) < ROUNDOFF
    assert off(logits(model)[seen], wanted) > 1e-3  # the mask matters


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", None),
        ("llama", "static"),
        ("mistral-window", None),
        ("mistral-window", "static"),
        ("qwen3-head-norms", None),
    ],
    ids=["llama", "llama-static-cache", "mistral-window", "mistral-window-static-cache", "qwen3-head-norms"],
)
def test_generated_tokens(name: str, cache: str | None):
    model = fused(name)
    prompts = IDS[:, :7]
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found, wanted = (
        m.generate(prompts, attention_mask=mask, cache_implementation=cache, **options) for m in (model, apart(model))
    )
    assert found.shape == (2, 19)
    assert torch.equal(found, wanted)


def test_a_cache_holds_what_transformers_puts_there():
    model = fused("qwen3-head-norms")
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS, use_cache=True).past_key_values for m in (model, apart(model)))
    for layer in range(2):
        for part in ("keys", "values"):
            ours, theirs = (getattr(cache.layers[layer], part) for cache in (found, wanted))
            assert off(ours, theirs) < ROUNDOFF


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_that_transformers_can_record(implementation: str):
    model = fused("llama")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        found, wanted = (m(input_ids=IDS, output_hidden_states=True) for m in (model, apart(model)))
    assert len(found.hidden_states) == len(wanted.hidden_states) == 3
    assert all(off(a, b) < ROUNDOFF for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
    if implementation == "eager":
        with torch.no_grad():
            seen = model(input_ids=IDS, output_attentions=True).attentions
        assert [a.shape for a in seen] == [(2, 4, 12, 12)] * 2


def test_blocks_are_of_few_calls_again_after_something_was_recorded():
    model = fused("llama")
    before, own = logits(model), logits(apart(model))
    for _ in range(2):
        with torch.no_grad():
            model.set_attn_implementation("eager")
            assert len(model(input_ids=IDS, output_attentions=True).attentions) == 2
            model.set_attn_implementation("sdpa")
            assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 3
        assert torch.equal(logits(model), before) and not torch.equal(before, own)
    # A hook of somebody else beside those is seen.
    seen: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    assert not torch.equal(logits(model), before)
    assert seen == [1]


@pytest.mark.parametrize("inner", ["self_attn", "mlp.act_fn", "mlp.up_proj", "input_layernorm"])
def test_a_hook_inside_fires(inner: str):
    model = fused("llama")
    without, seen = logits(model), []
    module = model.get_submodule(f"model.layers.1.{inner}")
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *_: seen.append(1))
        assert off(logits(model), without) < ROUNDOFF
        handle.remove()
    assert len(seen) == 2
    assert torch.equal(logits(model), without)
    assert len(seen) == 2


def test_a_hook_on_all_modules_fires_inside():
    model = fused("llama")
    without, seen = logits(model), []
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda module, *_: seen.append(module))
        try:
            assert off(logits(model), without) < ROUNDOFF
        finally:
            handle.remove()
    for module in model.model.layers.modules():
        assert seen.count(module) == (0 if module is model.model.layers else 2)
    assert torch.equal(logits(model), without)


def test_a_hook_on_a_block_changes_what_comes_out():
    model = fused("llama")
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(torch.ones(2, 12, 64)))
    model.model.layers[1].register_forward_hook(lambda module, args, output: torch.ones_like(output))
    assert torch.equal(logits(model), wanted)


def test_gradients_of_the_embeddings():
    model = fused("llama")
    grads = []
    for m in (model, apart(model)):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        m(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    assert grads[1].abs().max() > 0
    assert torch.equal(grads[0], grads[1])


def test_gradients_of_a_norm_alone():
    model = fused("llama")
    other, grads = apart(model), []
    for m in (model, other):
        weight = m.model.layers[1].input_layernorm.weight.requires_grad_()
        m(input_ids=IDS).logits.square().sum().backward()
        grads.append(weight.grad)
    assert grads[0] is not None and grads[1].abs().max() > 0
    assert off(grads[0], grads[1]) < ROUNDOFF


def test_dropout_in_training():
    model = fused("llama", attention_dropout=0.5).train()
    found = []
    for m in (model, apart(model)):
        torch.manual_seed(1)
        found.append(logits(m))
    assert torch.equal(found[0], found[1])
    assert off(logits(model.eval()), found[0]) > 0.01


def doubled(parameter: nn.Parameter) -> None:
    parameter.mul_(2)


def doubled_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(2)  # which is counted nowhere, and seen when several tokens are computed


def other_data(parameter: nn.Parameter) -> None:
    parameter.data = 2 * parameter.data  # elsewhere in memory


@pytest.mark.parametrize("change", [doubled, doubled_data, other_data])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", ["input_layernorm.weight"]),
        ("gemma-one-plus-weight", ["post_attention_layernorm.weight"]),
        ("qwen3-head-norms", ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]),
        ("qwen2-biases", ["self_attn.v_proj.bias", "self_attn.k_proj.bias"]),
        ("llama-biases", ["mlp.down_proj.bias", "mlp.gate_proj.bias", "self_attn.o_proj.bias"]),
    ],
    ids=["norm", "norm-one-plus", "head-norms", "joined-biases", "biases"],
)
def test_numbers_changed_in_place_count_at_the_next_call(
    name: str, changed: list[str], dtype: torch.dtype, change: Callable[[nn.Parameter], None]
):
    model = fused(name, dtype=dtype)
    before = logits(model)
    with torch.no_grad():
        for part in changed:
            change(model.model.layers[0].get_parameter(part))
    other = apart(model)
    assert off(before, logits(other)) > 0.02
    one = IDS[:1, 1:2]
    for ids in (IDS, one) if change is doubled_data else (one, IDS):
        found, wanted = (logits(m, input_ids=ids) for m in (model, other))
        assert off(found, wanted) < (ROUNDOFF if dtype == torch.float32 else 2.0**-5)
        assert ids is one or not torch.equal(found, wanted)  # still of few calls


def test_what_was_made_in_inference_mode_runs_outside():
    with torch.inference_mode():
        model = fused("qwen2-biases")
        wanted = logits(model)
    assert torch.equal(logits(model), wanted)


def test_packed_numbers_changed_in_place_count_at_the_next_call():
    model = fused("llama")
    before = logits(model)
    model.model.layers[0].self_attn.v_proj.packed_scale.mul_(3)
    found, wanted = logits(model), logits(apart(model))
    assert off(before, wanted) > 0.05
    assert 0 < off(found, wanted) < ROUNDOFF  # still of few calls


class Doubled(nn.Module):
    """As adapters do: a layer in the place of a layer, with that one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.act_fn", "mlp", "post_attention_layernorm"])
def test_a_part_that_is_replaced_counts_at_the_next_call(part: str):
    model = fused("llama")
    other, before = apart(model), logits(model)
    for m in (model, other):
        name = f"model.layers.0.{part}"
        m.set_submodule(name, Doubled(m.get_submodule(name)))
    wanted = logits(other)
    assert off(before, wanted) > 0.01
    assert off(logits(model), wanted) < ROUNDOFF


@pytest.mark.parametrize("part", ["self_attn", "mlp", "mlp.act_fn", "self_attn.v_proj", "input_layernorm"])
def test_a_forward_that_is_replaced_counts_at_the_next_call(part: str):
    model = fused("llama")
    other, before = apart(model), logits(model)
    for m in (model, other):
        module = m.get_submodule(f"model.layers.0.{part}")
        module.forward = twice(module.forward)
    wanted = logits(other)
    assert off(before, wanted) > 0.01
    assert off(logits(model), wanted) < ROUNDOFF
    # As accelerate takes its own away: what was there before, now as an attribute of the layer.
    module = model.get_submodule(f"model.layers.0.{part}")
    module.forward = module.forward.__wrapped__
    assert torch.equal(logits(model), before)


def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    return found


def test_a_forward_that_was_replaced_before_is_kept():
    model = built("LlamaForCausalLM")
    mlp, seen = model.model.layers[1].mlp, []
    forward = mlp.forward
    mlp.forward = lambda x: (seen.append(1), forward(x))[1]
    assert fuse(model) == {
        "model.layers.0": None,
        "model.layers.1": "The forward of its LlamaMLP was replaced.",
    }
    logits(model)
    assert seen == [1]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str):
    model = fused("qwen2-biases")
    wanted = logits(model)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert is_fused(copied)
    assert all(b.forward.block is b for b in blocks_of(copied))
    for _ in range(2):
        assert torch.equal(logits(copied), wanted)
    # Each has numbers of its own.
    with torch.no_grad():
        for m in copied.modules():
            if isinstance(m, QLinear):
                m.packed_scale.zero_()
    assert not torch.equal(logits(copied), wanted)
    assert torch.equal(logits(model), wanted)


def test_another_type_goes_through_transformers():
    model = fused("llama")
    model.bfloat16()
    other = apart(model)
    assert torch.equal(logits(model), logits(other))


def test_an_exported_block_is_made_of_operators_that_can_be_traced():
    class Called(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return self.block(x, position_embeddings=(cos, sin))  # type: ignore[no-any-return]

    model = fused("llama")
    called = Called(model.model.layers[0])
    x, later = torch.randn(2, 1, 5, 64)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        exported = torch.export.export(called, (x, *positions), strict=False)
        assert str(exported.graph).count("arrondi.linear") == 7
        assert off(exported.module()(later, *positions), called(later, *positions)) < ROUNDOFF


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def bytes_of_codes() -> int:
    """Of all storages of bytes that live in this process."""
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def test_packed_weights_lie_side_by_side_and_only_once():
    model = built("LlamaForCausalLM", scheme="w=uint4/g32/asym")
    logits(model)
    before, mine = bytes_of_codes(), sum(m.weight_nbytes for m in linears(model))
    assert before >= sum(m.packed_codes.numel() + m.packed_zero.numel() for m in linears(model))
    assert set(fuse(model).values()) == {None}
    logits(model)
    assert bytes_of_codes() == before
    assert sum(m.weight_nbytes for m in linears(model)) == mine
    for block in model.model.layers:
        together = [getattr(block.self_attn, f"{x}_proj") for x in "qkv"], [block.mlp.gate_proj, block.mlp.up_proj]
        for group in together:
            for name in ("packed_codes", "packed_scale", "packed_zero"):
                parts = [getattr(m, name) for m in group]
                assert len({p.untyped_storage().data_ptr() for p in parts}) == 1
                assert parts[0].untyped_storage().nbytes() == sum(p.numel() * p.element_size() for p in parts)
                ends = [p.data_ptr() + p.numel() * p.element_size() for p in parts]
                assert [p.data_ptr() for p in parts[1:]] == ends[:-1]


def saved(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model, file)
    return file.tell()


@pytest.mark.parametrize("size", [lambda model: len(pickle.dumps(model)), saved], ids=["pickle", "torch.save"])
def test_a_pickle_holds_every_packed_weight_once(size: Callable[[nn.Module], int]):
    model = built("Qwen2ForCausalLM", scheme="w=uint4/g32/asym", hidden_size=256, intermediate_size=512)
    before = size(model)
    fuse(model)
    logits(model)
    assert size(model) < before + 2048  # of names


def test_a_fused_block_is_freed_with_its_last_user():
    model = fused("llama")
    logits(model)
    block = weakref.ref(model.model.layers[0])
    forward = model.model.layers[0].forward
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="Keep the block"):
        forward(torch.ones(1, 1, 64))


def test_layers_of_a_fused_block_still_compute_alone():
    model = built("Qwen2ForCausalLM")
    x = torch.randn(3, 64)
    layers = [m for m in linears(model) if m.in_features == 64]
    before = [m(x) for m in layers]
    weights = [m.dequantize() for m in layers]
    fuse(model)
    assert all(torch.equal(m(x), y) for m, y in zip(layers, before, strict=True))
    assert all(torch.equal(m.dequantize(), w) for m, w in zip(layers, weights, strict=True))


# ── what load() makes of it ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def checkpoint(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "out"
    arrondi.quantize_model(models("llama"), out, arrondi.Recipe.simple("W4A16", group_size=32))
    return out


def test_a_loaded_model_is_fused(checkpoint: Path):
    model = arrondi.load(checkpoint)
    assert is_fused(model) and len(blocks_of(model)) == 3
    assert 0 < off(logits(model), logits(apart(model))) < ROUNDOFF


def test_the_reference_kernel_is_not_fused_and_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = logits(arrondi.load(checkpoint))
    monkeypatch.setenv(FORCE, "reference")
    model = arrondi.load(checkpoint)
    assert blocks_of(model) == [] and not is_fused(model)
    assert off(logits(model), wanted) < 10 * ROUNDOFF
    for reason in fuse(model).values():
        assert reason is not None and reason.startswith("A layer runs on the kernel reference, and only native")


def test_autocast_and_a_norm_that_was_replaced_take_the_models_own_forward():
    model = fused("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = logits(model), logits(apart(model))
    assert torch.equal(found, wanted)
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(3 * norm.weight.detach(), requires_grad=False)
    assert off(logits(model), logits(apart(model))) < ROUNDOFF


def test_a_copy_whose_part_was_replaced_takes_its_own_forward():
    model = copy.deepcopy(fused("llama"))
    torch.manual_seed(1)
    model.model.layers[0].mlp.down_proj = nn.Linear(96, 64, bias=False)
    assert off(logits(model), logits(apart(model))) < ROUNDOFF
