"""A fused block as a module: what takes the original's forward, what a copy is, what can be asked of it, and how it ends."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import arrondi
from arrondi.kernels import FORCE
from arrondi.native import native
from arrondi.nn import QLinear
from arrondi.runtime.fuse import fuse, is_fused, unfuse
from arrondi.runtime.fused_block import FusedBlock
from tests.runtime.small import FUSED, IDS, ROUNDOFF, apart, built, fused, linears, logits, off

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")


# ── fuse and unfuse ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_unfuse_puts_the_original_blocks_back():
    model = built("Qwen2ForCausalLM")
    before, blocks, modules = logits(model), list(model.model.layers), list(model.modules())
    fuse(model)
    assert all(isinstance(b, FusedBlock) for b in model.model.layers) and not torch.equal(logits(model), before)
    unfuse(model)
    assert not is_fused(model) and list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))
    assert torch.equal(logits(model), before)
    unfuse(model)
    assert set(fuse(model).values()) == {None}


def test_what_was_fused_is_not_fused_again():
    model = fused("llama")
    before, blocks = logits(model), list(model.model.layers)
    assert fuse(model) == {}
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))
    assert torch.equal(logits(model), before)


def test_a_block_that_two_lists_share_is_replaced_in_both():
    model = built("LlamaForCausalLM")
    model.model.again = nn.ModuleList([model.model.layers[0]])
    assert set(fuse(model).values()) == {None}
    assert model.model.again[0] is model.model.layers[0]
    unfuse(model)
    assert type(model.model.again[0]) is LlamaDecoderLayer and model.model.again[0] is model.model.layers[0]


def test_a_fused_block_answers_as_the_original():
    model = built("MinistralForCausalLM", **FUSED["ministral-windows"][1])
    for block in model.model.layers:
        block.attention_type = "sliding_attention"  # as models write it on their blocks and read it there
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    wanted = [(b.attention_type, b.self_attn.layer_idx, b.hidden_size, b.self_attn.config) for b in model.model.layers]
    kinds, originals = [type(b) for b in model.model.layers], list(model.model.layers)
    assert set(fuse(model).values()) == {None}
    found = [(b.attention_type, b.self_attn.layer_idx, b.hidden_size, b.self_attn.config) for b in model.model.layers]
    assert found == wanted
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    for block, original, kind in zip(model.model.layers, originals, kinds, strict=True):
        assert isinstance(block, kind) and block.mlp is original.mlp
        assert type(block).__name__ == f"Fused{kind.__name__}"
    assert not any(p.requires_grad for p in model.model.layers.parameters())


def test_training_mode_goes_through():
    model = fused("llama").train()
    unfuse(model)
    assert all(m.training for m in model.modules())


# ── calls that ask for more ───────────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize("inner", ["", "self_attn", "mlp.act_fn", "mlp.up_proj", "input_layernorm"])
def test_a_hook_fires(inner: str):
    model = fused("llama")
    without, seen = logits(model), []
    module = model.get_submodule(f"model.layers.1.{inner}".removesuffix("."))
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


def test_autocast_takes_the_models_own_forward():
    model = fused("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(apart(model)))


def test_arguments_that_are_not_known_go_to_the_original():
    model = fused("llama")
    block, original = model.model.layers[0], apart(model).model.layers[0]
    seen: list[dict[str, Any]] = []
    attention = type(block.self_attn).forward
    x, positions = torch.randn(1, 3, 64), torch.arange(3)[None]
    given = {"position_embeddings": model.model.rotary_emb(x, positions), "position_ids": positions}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block.self_attn), "forward", lambda *a, **k: (seen.append(k), attention(*a, **k))[1])
        assert torch.equal(block(x, is_causal=False, **given), original(x, is_causal=False, **given))
        assert [k["is_causal"] for k in seen] == [False, False]
        positional = block(x, None, positions, None, False, given["position_embeddings"])
        assert torch.equal(positional, block(x, **given)) and len(seen) == 2


def test_positions_that_do_not_fit_are_an_error_as_in_the_original():
    model = fused("llama")
    x, positions = torch.randn(2, 3, 64), torch.arange(4).expand(5, 4)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        model.model.layers[0](x, position_embeddings=model.model.rotary_emb(x, positions))


def test_an_exported_block_is_made_of_operators_that_can_be_traced():
    class Called(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return self.block(x, position_embeddings=(cos, sin))

    model = fused("llama")
    called = Called(model.model.layers[0])
    x, later = torch.randn(2, 1, 5, 64)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        exported = torch.export.export(called, (x, *positions), strict=False)
        assert str(exported.graph).count("arrondi.linear") == 7
        assert off(exported.module()(later, *positions), called(later, *positions)) < ROUNDOFF


# ── changes while fused ───────────────────────────────────────────────────────────────────────────────────────────────


class Doubled(nn.Module):
    """As adapters do: a layer in the place of a layer, with that one inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.act_fn", "mlp", "post_attention_layernorm"])
def test_a_part_that_is_replaced_counts_at_the_next_text(part: str):
    model = fused("llama")
    other, before = apart(model), logits(model)
    for m in (model, other):
        name = f"model.layers.0.{part}"
        m.set_submodule(name, Doubled(m.get_submodule(name)))
    wanted = logits(other)
    assert off(before, wanted) > 0.01
    assert off(logits(model), wanted) < ROUNDOFF


def test_a_parameter_that_is_replaced_counts_at_the_next_text():
    model = fused("llama")
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(3 * norm.weight.detach(), requires_grad=False)
    assert off(logits(model), logits(apart(model))) < ROUNDOFF


@pytest.mark.parametrize("part", ["self_attn", "mlp", "mlp.act_fn", "self_attn.v_proj", "input_layernorm"])
def test_a_forward_that_is_replaced_counts_at_the_next_text(part: str):
    model = fused("llama")
    other, before = apart(model), logits(model)
    for m in (model, other):
        module = m.get_submodule(f"model.layers.0.{part}")
        module.forward = twice(module.forward)
    wanted = logits(other)
    assert off(before, wanted) > 0.01
    assert off(logits(model), wanted) < ROUNDOFF


def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def found(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    return found


@pytest.mark.parametrize("name", ["gemma-one-plus-weight", "qwen3-head-norms", "llama-biases"])
def test_loading_a_state_counts_at_the_next_call(name: str):
    model = fused(name)
    before = logits(model)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    found, wanted = logits(model), logits(apart(model))
    assert off(before, wanted) > 0.01
    assert 0 < off(found, wanted) < ROUNDOFF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_type_goes_through_transformers(dtype: torch.dtype):
    model = fused("llama").to(dtype)
    other = apart(model)
    assert torch.equal(logits(model), logits(other))
    assert 0 < off(logits(model.float()), logits(other.float())) < ROUNDOFF


def test_shared_memory_counts_at_the_next_call():
    model = fused("qwen2-biases")
    before = logits(model)
    model.share_memory()
    assert torch.equal(logits(model), before)


def test_what_was_made_in_inference_mode_runs_outside():
    with torch.inference_mode():
        model = fused("qwen2-biases")
        wanted = logits(model)
    assert torch.equal(logits(model), wanted)


# ── copies and memory ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str):
    model = fused("qwen2-biases")
    wanted = logits(model)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert is_fused(copied)
    for _ in range(2):
        assert torch.equal(logits(copied), wanted)
    for block in copied.model.layers:  # nothing is shared with the model that was copied
        assert block.original.mlp is block.mlp and not set(block.modules()) & set(model.modules())
    with torch.no_grad():
        for m in linears(copied):
            m.packed_scale.zero_()
    assert not torch.equal(logits(copied), wanted)
    assert torch.equal(logits(model), wanted)
    unfuse(copied)
    assert not is_fused(copied)


def test_a_copy_whose_part_was_replaced_takes_its_own_forward():
    model = copy.deepcopy(fused("llama"))
    torch.manual_seed(1)
    model.model.layers[0].mlp.down_proj = nn.Linear(96, 64, bias=False)
    wanted = logits(apart(model))
    assert off(logits(model), wanted) < ROUNDOFF


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
    assert size(model) < before + 8192  # of names


def test_a_fused_block_is_freed_with_its_last_user():
    model = fused("llama")
    logits(model)
    block = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


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
    arrondi.quantize(models("llama"), "W4A16", out=out, group_size=32, evaluate=False)
    return out


def test_a_loaded_model_is_fused(checkpoint: Path):
    model = arrondi.load(checkpoint)
    assert is_fused(model) and all(isinstance(b, FusedBlock) for b in model.model.layers)
    assert any(isinstance(m, QLinear) for m in model.modules())
    assert 0 < off(logits(model), logits(apart(model))) < ROUNDOFF


def test_the_reference_kernel_is_not_fused_and_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = logits(arrondi.load(checkpoint))
    monkeypatch.setenv(FORCE, "reference")
    model = arrondi.load(checkpoint)
    assert not is_fused(model)
    assert off(logits(model), wanted) < 10 * ROUNDOFF
    for reason in fuse(model).values():
        assert reason is not None and reason.startswith("A layer runs on the kernel reference, and only native")
