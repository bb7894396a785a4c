"""What fused blocks compute, beside transformers' own forward of the same blocks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from arrondi.native import native
from arrondi.runtime.fuse import fuse
from tests.runtime.small import FUSED, IDS, ROUNDOFF, apart, built, fused, linears, logits, off

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

LONGEST = 128
"""Positions of the small models; the one with YaRN was made for 8."""
CALLS = [  # magnitude, cache, sequences, tokens, mask, first position
    (1.0, None, 1, 7, False, 0),
    (1e-3, "dynamic", 1, 1, False, 100),
    (1e3, "dynamic", 3, 5, True, 60),
    (1e-3, None, 3, 7, True, 100),
    (1e3, "static", 1, 1, True, 60),
    (1.0, "static", 3, 5, True, 0),
    (1e3, None, 1, 1, False, 127),
    (1.0, "dynamic", 3, 1, False, 127),
]
"""Every two values of different columns meet where they can."""
EVERY_CALL = [
    call
    for call in itertools.product(
        (1e-3, 1.0, 1e3), (None, "dynamic", "static"), (1, 3), (1, 5), (False, True), (0, 60, 122)
    )
    if call[1] != "static" or call[4]  # transformers gives static caches a mask
]


def arguments(model: Any, call: tuple[Any, ...], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hidden states and what a model calls its blocks with: positions that jump, a cache that holds other tokens."""
    magnitude, kind, batch, length, masked, first = call
    generator = torch.Generator().manual_seed(1)
    hidden = magnitude * torch.randn(batch, length, 64, generator=generator)
    jumps = torch.randint(1, 2 if first + length >= LONGEST else 3, (batch, length), generator=generator)
    positions = (jumps.cumsum(1) - 1 + first).clamp_max(LONGEST - 1)
    known = 0 if kind is None else 9
    cache = None
    if kind is not None:
        config = copy.deepcopy(model.config)
        config.layer_types = ["full_attention"] * 2
        config.sliding_window = None
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
        heads, width = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        for layer in range(2):
            cache.update(*(torch.randn(batch, heads, known, width, generator=generator).to(dtype) for _ in "kv"), layer)
    mask = None
    if masked:
        seen = 32 if kind == "static" else known + length
        mask = torch.rand(batch, 1, length, seen, generator=generator) > 0.3
        mask[..., known + length :] = False
        mask[..., 0] = True
    return hidden.to(dtype), {
        "attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": kind is not None,
        "position_embeddings": model.model.rotary_emb(hidden.to(dtype), positions) if "pos_emb" not in vars(model.model)["_modules"] else model.model.pos_emb(hidden.to(dtype), positions),
    }  # fmt: skip


@torch.no_grad()
def added(block: Any, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    found = block(hidden, **copy.deepcopy(given))
    assert found.dtype == hidden.dtype
    return (found.double() - hidden.double()).float()


def check(name: str, calls: list[tuple[Any, ...]]) -> None:
    model = fused(name)
    other, same = apart(model), True
    for call in calls:
        hidden, given = arguments(model, call, torch.float32)
        for block, original in zip(model.model.layers, other.model.layers, strict=True):
            found, wanted = added(block, hidden, given), added(original, hidden, given)
            same &= torch.equal(found, wanted)
            rounding = 4 * 2.0**-24 * float(hidden.abs().max())  # of sums with what came in
            assert float((found - wanted).abs().max()) < ROUNDOFF * float(wanted.abs().max()) + rounding, call
    assert not same  # that would mean that transformers' forward ran


@pytest.mark.parametrize("name", FUSED)
def test_every_kind_of_call_gives_what_transformers_gives(name: str):
    check(name, CALLS)


@pytest.mark.full
@pytest.mark.parametrize("name", FUSED)
def test_every_call_gives_what_transformers_gives(name: str):
    check(name, EVERY_CALL)


@pytest.mark.parametrize("name", FUSED)
def test_in_bfloat16_they_are_as_near_to_float32_as_transformers(name: str):
    """Fewer roundings to bfloat16 on the way. Which of two sets of roundings ends nearer is chance: hence the tenth."""
    model = fused(name, dtype=torch.bfloat16)
    other = apart(model)
    exact = built(FUSED[name][0], **FUSED[name][1])
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    for one, two in zip(linears(exact), linears(model), strict=True):
        one._buffers.update(two._buffers)  # codes of weights that were rounded to bfloat16 first
    errors = torch.zeros(2)
    for call in CALLS:
        hidden, given = arguments(model, call, torch.bfloat16)
        real = {**given, "position_embeddings": tuple(t.float() for t in given["position_embeddings"])}
        real["past_key_values"] = in_float32(given["past_key_values"])
        blocks = zip(exact.model.layers, model.model.layers, other.model.layers, strict=True)
        for reference, *both in blocks:
            wanted = added(reference, hidden.float(), real)
            off_by = torch.stack([(added(b, hidden, given) - wanted).norm() / wanted.norm() for b in both])
            assert off_by[0] < 1.5 * off_by[1] + 1e-3
            errors += off_by
    assert errors[0] <= 1.1 * errors[1]


def in_float32(cache: Any) -> Any:
    cache = copy.deepcopy(cache)
    for layer in () if cache is None else cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    return cache


@pytest.mark.parametrize("scheme", ["W8A8", "w=int8/g32", "w=uint4/g32/asym", "w=nf4/g32", "w=int4/channel/float32"])
def test_schemes(scheme: str):
    model = fused("llama", scheme=scheme)
    wanted = logits(apart(model))
    # Rounded activations may fall on the other side of an edge: one in some hundred numbers, by one step of 127.
    assert off(logits(model), wanted) < (0.02 if "A8" in scheme else ROUNDOFF)


def test_a_block_of_another_scheme_beside_fused_ones():
    model = built("LlamaForCausalLM", num_hidden_layers=3)
    model.model.layers[1] = built("LlamaForCausalLM", "w=int8/g32").model.layers[1]
    model.model.layers[1].mlp.up_proj = built("LlamaForCausalLM").model.layers[1].mlp.up_proj
    before = logits(model)
    assert [reason is None for reason in fuse(model).values()] == [True, False, True]
    assert off(logits(model), before) < ROUNDOFF


@pytest.mark.parametrize("others", [("q",), ("k",), ("v",), ("q", "v")])
def test_schemes_of_q_k_and_v_may_differ(others: tuple[str, ...]):
    model = built("LlamaForCausalLM", num_hidden_layers=2)
    other = built("LlamaForCausalLM", "w=int8/g32")
    for name in others:
        setattr(
            model.model.layers[1].self_attn, f"{name}_proj", getattr(other.model.layers[1].self_attn, f"{name}_proj")
        )
    before = logits(model)
    assert set(fuse(model).values()) == {None}
    assert off(logits(model), before) < ROUNDOFF


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
    [("llama-yarn", None), ("llama", "static"), ("mistral-window", None), ("mistral-window", "static"), ("qwen3-head-norms", None)],
)  # fmt: skip
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
    for layer, part in itertools.product(range(2), ("keys", "values")):
        ours, theirs = (getattr(cache.layers[layer], part) for cache in (found, wanted))
        assert off(ours, theirs) < ROUNDOFF
