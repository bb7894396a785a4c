"""Which blocks are fused is decided by what their forward computes, whatever the numbers are.

The blocks that differ do so where a few random numbers would not show it: at far positions, at large magnitudes, for long texts, with a
mask or a cache.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from arrondi.native import native
from arrondi.runtime.fuse import fuse, is_fused
from tests.runtime.small import FUSED, IDS, YARN, built, linears, logits, packed

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

MOE = r"Its forward meets a view of \[number of sequences, number of tokens, 64\] as \[-1, 64\]\.$"
_LINEAR: dict[str, Any] = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}}, r"depends on the positions\.$"),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 16}, r"^Its attention is eager"),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16}, r"^The sum after its MLP is of a sum and a product"),
    "phi3": ("Phi3ForCausalLM", {}, r"depends on the width of the rotary positions\.$"),
    "olmo2": ("Olmo2ForCausalLM", {}, r"^The sum after its MLP is of a sum and a product"),
    "cohere": ("CohereForCausalLM", {}, r"meets the operator sub\.$"),
    "helium-pairs": ("HeliumForCausalLM", {"head_dim": 16}, r"depends on the width of the rotary positions\.$"),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}, MOE),
    "granite-multiplier": ("GraniteForCausalLM", {"residual_multiplier": 0.5}, r"^The sum after its MLP is of a sum and a product"),
    "llama-gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}, r"^The last layer of its MLP reads the result of gelu times the result of mlp\.up_proj, not a linear layer times silu or gelu_tanh of another\.$"),
    "llama-few-rows": ("LlamaForCausalLM", {"intermediate_size": 72}, r"^Layers that read the same activations are joined in tiles of 16 rows, and one has 72 rows\.$"),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 288}, r"^Its heads are 288 wide; even widths up to 256 are known\.$"),
    "llama-float16": ("LlamaForCausalLM", {"dtype": torch.float16}, r"^Its linear layers compute in float16"),
    "qwen3.5": ("Qwen3_5ForCausalLM", _LINEAR, r"^Its forward meets "),
    "qwen3-next": ("Qwen3NextForCausalLM", {**_LINEAR, **_EXPERTS}, r"^Its forward meets "),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**_EXPERTS, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}, r"^Its forward meets "),
    "gpt-oss": ("GptOssForCausalLM", {**_EXPERTS, "head_dim": 16}, r"^Its attention is eager"),
    "mamba": ("MambaForCausalLM", {"state_size": 8}, r"^Its "),
    "falcon-h1": ("FalconH1ForCausalLM", {"head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 128}, r"^Its forward meets "),
    "bloom": ("BloomForCausalLM", {"n_head": 4, "n_layer": 2}, r"^Its parts hold 0 configs"),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 2}, r""),
    "opt": ("OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}, r"^Its forward meets the operator layer_norm\.$"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_are_left_alone_and_the_reason_is_one_sentence(name: str):
    class_name, settings, words = OTHERS[name]
    model = built(class_name, **settings)
    blocks, before = list(model.modules()), logits(model, attention_mask=torch.ones_like(IDS))
    for reason in fuse(model).values():
        assert reason is not None and re.search(words, reason), reason
        assert reason.endswith(".") and ". " not in reason[:-1].replace("(", "")
    assert not is_fused(model) and list(model.modules()) == blocks
    assert torch.equal(logits(model, attention_mask=torch.ones_like(IDS)), before)


@pytest.mark.parametrize("name", FUSED)
def test_blocks_of_the_usual_shape_are_fused(name: str):
    model = built(FUSED[name][0], **FUSED[name][1])
    assert not is_fused(model)
    assert fuse(model) == {"model.layers.0": None, "model.layers.1": None}
    assert is_fused(model)


# ── blocks that differ where numbers would not show it ────────────────────────────────────────────────────────────────


class ScaledByPosition(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        far = (kwargs["position_ids"] > 10**6).to(hidden_states.dtype).unsqueeze(-1)
        return super().forward(
            hidden_states * (1 - far), position_embeddings, attention_mask, past_key_values, **kwargs
        )


class Clipped(LlamaMLP):
    def forward(self, x):
        return super().forward(x).clamp(-1e4, 1e4)


class ClippedIfLarge(LlamaMLP):
    def forward(self, x):
        return super().forward(x / 2 if x.abs().max() > 1e4 else x)


class Capped(LlamaMLP):
    def forward(self, x):
        return 1e5 * torch.tanh(super().forward(x) / 1e5)


class LongText(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        long = hidden_states.shape[1] > 100
        return super().forward(hidden_states, *args, **kwargs) * (2 if long else 1)


class LongCache(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        known = 0 if past_key_values is None else past_key_values.get_seq_length()
        return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs) * (
            2 if known > 99 else 1
        )


class KindOfCache(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, past_key_values=None, **kwargs):
        if isinstance(past_key_values, list):
            past_key_values = None
        return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)


class WithMask(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class KindOfMask(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dtype == torch.float32:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class OtherMask(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, attention_mask=None, **kwargs)


class WithCache(LlamaDecoderLayer):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is None:
            hidden_states = hidden_states + hidden_states
        return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)


class WhenCaching(LlamaDecoderLayer):
    def forward(self, hidden_states, use_cache=False, **kwargs):
        return super().forward(hidden_states * (1 if use_cache else 2), use_cache=use_cache, **kwargs)


class Rounded(LlamaMLP):
    def forward(self, x):
        return super().forward(x.to(torch.bfloat16).to(x.dtype))


class Remembering(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        self.last = hidden_states
        return super().forward(hidden_states, *args, **kwargs)


class Counting(LlamaDecoderLayer):
    seen: list[int]

    def forward(self, hidden_states, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), 1]
        return super().forward(hidden_states, *args, **kwargs)


class InPlace(LlamaMLP):
    def forward(self, x):
        y = super().forward(x)
        y *= 1
        return y


class TwoResults(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs), None


class NormOfNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(super().forward(x))


class MeanOfOthers(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.variance_epsilon))


class Demanding(LlamaDecoderLayer):
    def forward(self, hidden_states, *, needed, **kwargs):
        return hidden_states + needed


class Crashing(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        raise KeyError("of a hurried author")


class Catching(LlamaMLP):
    """Falls back to something else when an operator fails."""

    def forward(self, x):
        try:
            return super().forward(x.erf())
        except Exception:
            return super().forward(x)


KINDS: dict[type[nn.Module], str] = {
    ScaledByPosition: "depends on the positions.",
    Clipped: "meets the operator clamp.",
    ClippedIfLarge: "meets the operator abs.",
    Capped: "meets the operator tanh.",
    LongText: "depends on the number of tokens.",
    LongCache: "depends on the cache.",
    KindOfCache: "depends on the cache.",
    WithMask: "What attention is added to is",
    KindOfMask: "depends on the mask.",
    OtherMask: "another mask",
    WithCache: "What attention is added to is",
    WhenCaching: "depends on use_cache.",
    Rounded: "a cast from float32 to bfloat16.",
    Remembering: "It keeps something from one call to the next.",
    Counting: "It keeps something from one call to the next.",
    InPlace: "meets the operator mul_.",
    TwoResults: "gives something else than hidden states.",
    NormOfNorm: "not an RMS norm with a weight.",
    MeanOfOthers: "a mean over something else than the last axis.",
    Demanding: "raises TypeError.",
    Crashing: "raises KeyError.",
    Catching: "meets the operator erf.",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_block_that_differs_in_one_branch_or_operator_is_not_fused(kind: type[nn.Module]):
    model = built("LlamaForCausalLM")
    block = model.model.layers[0]
    (changed,) = [m for m in (block, block.self_attn, block.mlp, block.input_layernorm) if issubclass(kind, type(m))]
    changed.__class__ = kind
    found = fuse(model)
    assert found["model.layers.0"] is not None and KINDS[kind] in found["model.layers.0"], found
    assert found["model.layers.1"] is None
    assert type(block) is type(model.model.layers[0])


class Flipped(LlamaDecoderLayer):
    """The same numbers by another way: other names and orders of sums and factors."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, position_embeddings, attention_mask, **kwargs)[0]
        middle = attended * 1.0 + hidden_states
        n = self.post_attention_layernorm(middle)
        gated = self.mlp.up_proj(n) * nn.functional.silu(self.mlp.gate_proj(n))
        return torch.add(self.mlp.down_proj(gated), middle)


class Functional(LlamaRMSNorm):
    def forward(self, x):
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)


class Rooted(LlamaRMSNorm):
    def forward(self, x):
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.variance_epsilon) * self.weight


@pytest.mark.parametrize("kind", [Flipped, Functional, Rooted], ids=lambda kind: kind.__name__)
def test_the_same_block_written_otherwise_is_fused(kind: type[nn.Module]):
    model = built("LlamaForCausalLM")
    for block in model.model.layers:
        (changed,) = [m for m in (block, block.input_layernorm) if issubclass(kind, type(m))]
        changed.__class__ = kind
    before = logits(model)
    assert set(fuse(model).values()) == {None}
    assert float((logits(model) - before).abs().max()) < 1e-5 * float(before.abs().max())


# ── parts that do not fit ─────────────────────────────────────────────────────────────────────────────────────────────


def without(name: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        part, _, attribute = name.rpartition(".")
        delattr(block.get_submodule(part), attribute)

    return change


def layer_in_bfloat16(block: Any) -> None:
    block.mlp.up_proj = packed(nn.Linear(64, 96, bias=False), "w=int4/g32", torch.bfloat16)


def eight_bits(block: Any) -> None:
    block.mlp.gate_proj = packed(nn.Linear(64, 96, bias=False), "w=int8/g32", torch.float32)


def not_quantized(block: Any) -> None:
    block.mlp.down_proj = nn.Linear(96, 64, bias=False)


def layer_norm(block: Any) -> None:
    block.input_layernorm = nn.LayerNorm(64)


def scattered_groups(block: Any) -> None:
    block.mlp.down_proj.order = torch.arange(96)


def eager(block: Any) -> None:
    config = copy.copy(block.self_attn.config)
    config._attn_implementation = "eager"
    for module in block.modules():
        if "config" in vars(module):
            module.config = config


def two_configs(block: Any) -> None:
    block.mlp.config = copy.copy(block.mlp.config)


def more_parameters(block: Any) -> None:
    block.mlp.scale = nn.Parameter(torch.ones(3))


def more_buffers(block: Any) -> None:
    block.register_buffer("layer_scalar", torch.ones(1))


def hooked(block: Any) -> None:
    block.mlp.act_fn.register_forward_hook(lambda *_: None)


def replaced_forward(block: Any) -> None:
    block.mlp.forward = lambda x: x


def used_twice(block: Any) -> None:
    block.mlp.gate_proj = block.mlp.up_proj


PARTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a part less": (without("mlp.act_fn"), "Its forward, called as that of a usual block, raises AttributeError."),
    "no scaling": (
        without("self_attn.scaling"),
        "Its forward, called as that of a usual block, raises AttributeError.",
    ),
    "two types": (layer_in_bfloat16, "Its linear layers compute in different types."),
    "mixed": (eight_bits, "Layers that read the same activations have different schemes."),
    "not quantized": (not_quantized, "Its forward meets a linear layer that is not quantized, mlp.down_proj."),
    "layer norm": (layer_norm, "Its forward meets the operator layer_norm."),
    "scattered groups": (scattered_groups, "A layer rounds or reorders its activations before the compiled product."),
    "eager": (eager, "Its attention is eager; known are sdpa and arrondi."),
    "two configs": (two_configs, "Its parts hold 2 configs, of which one would name the attention function."),
    "parameter": (more_parameters, "It holds mlp.scale, which the usual block has not."),
    "buffer": (more_buffers, "It holds layer_scalar, which the usual block has not."),
    "hook": (hooked, "Its SiLUActivation has hooks."),
    "forward": (replaced_forward, "The forward of its LlamaMLP was replaced."),
    "used twice": (used_twice, "One of its linear layers is used twice."),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_refusal_names_what_it_met(name: str):
    model = built("LlamaForCausalLM")
    change, words = PARTS[name]
    change(model.model.layers[0])
    assert fuse(model) == {"model.layers.0": words, "model.layers.1": None}
    assert not is_fused(model)


def test_the_trial_leaves_no_trace():
    model = built("GraniteForCausalLM", dtype=torch.bfloat16, residual_multiplier=0.98)
    before = logits(model)
    held = [{**vars(m), **m._parameters, **m._buffers} for m in model.modules()]
    table = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS}
    assert None not in fuse(model).values()
    for module, attributes in zip(model.modules(), held, strict=True):
        now = {**vars(module), **module._parameters, **module._buffers}
        assert now.keys() == attributes.keys() and all(now[name] is value for name, value in attributes.items())
    assert {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS} == table
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=int8/channel,a=int8/token"])
def test_a_block_that_adds_nothing_is_fused_too(scheme: str):
    """As those with which a deeper model starts to be trained."""
    model = built("LlamaForCausalLM", scheme)
    for linear in linears(model):
        linear.packed_scale.zero_()
    assert set(fuse(model).values()) == {None}
