"""The decoding loop against transformers' own generation, for every way in which models remember a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from arrondi.runtime.attention import own_attention
from arrondi.runtime.cache import growing_cache
from arrondi.runtime.decoding import refuse_decoding, tokens

_PLAIN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_LINEAR = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 8}),
    "gemma2-soft-caps": ("Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 8}),
    "gemma3-windows": ("Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "xglm": ("XGLMForCausalLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "falcon-h1": ("FalconH1ForCausalLM", {**_MAMBA, "head_dim": 16, "mamba_d_ssm": 128}),
    "jamba": ("JambaForCausalLM", {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_offset": 1, "attn_layer_period": 2}),
    "qwen3.5": ("Qwen3_5ForCausalLM", _LINEAR),
    "minimax": ("MiniMaxForCausalLM", {"num_local_experts": 4, "layer_types": _LINEAR["layer_types"], "block_size": 8}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 64, "context_length": 128}),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", {"lru_width": 64, "attention_window_size": 8, "block_types": ["recurrent", "recurrent", "attention"]}),
    "openai-gpt-no-cache": ("OpenAIGPTLMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, every parameter and float buffer perturbed."""
    class_name, settings = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**_PLAIN, **settings})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(2).add_(0.05 * torch.randn_like(parameter))
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + 0.1 * torch.rand_like(buffer))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):  # else texts repeat one token
        table.weight = torch.nn.Parameter(torch.randn_like(table.weight), requires_grad=False)
    return model.to(dtype)


PROMPT = torch.arange(11) * 31 % 95 + 2


def generated(model: Any, count: int) -> list[int]:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count}
    found = model.generate(PROMPT[None], attention_mask=torch.ones_like(PROMPT[None]), **options)
    return found[0, len(PROMPT) :].tolist()


def ours(model: Any, count: int) -> list[int]:
    return list(tokens(model, PROMPT.tolist(), count, temperature=0.0, stop=set()))


@pytest.mark.parametrize("name", MODELS)
def test_the_likeliest_tokens_are_those_of_transformers(name: str):
    model = made(name)
    wanted = generated(model, 24)
    assert len(set(wanted)) > 1  # a text of one token would be right by chance
    assert ours(model, 24) == wanted
    assert ours(model, 24) == wanted  # nothing is left of the text before
    assert generated(model, 24) == wanted


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_long_texts(name: str):
    """Longer than the room that the cache makes at a time."""
    model = made(name)
    before = model.config._attn_implementation
    assert ours(model, 300) == generated(model, 300)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["xglm", "minimax", "mamba", "mamba2", "rwkv", "recurrent-gemma"])
def test_bfloat16(name: str):
    """Every token is likeliest, to the digits of bfloat16, where the model reads the whole text before it."""
    model = made(name, torch.bfloat16)
    found = ours(model, 12)
    with torch.no_grad():
        logits = (
            model(torch.tensor([[*PROMPT.tolist(), *found]]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
        )
    chosen = logits.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert bool((logits.amax(1) - chosen <= 2.0**-5 * logits.abs().amax(1)).all())


def test_it_stops_after_a_stop_token_and_draws_by_the_seed():
    model = made("llama")
    plain = list(tokens(model, [1, 2, 3], 10, temperature=0.0, stop=set()))
    stop = plain[4]
    assert list(tokens(model, [1, 2, 3], 10, temperature=0.0, stop={stop})) == plain[: plain.index(stop) + 1]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(list(tokens(model, [1, 2, 3], 10, temperature=1.5, stop=set())))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)), "A T5ForConditionalGeneration turns one sequence into another"),
        (lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)), "A WhisperForConditionalGeneration turns one sequence into another"),
        (lambda: transformers.BertModel(transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)), "A BertModel does not generate text."),
    ],
    ids=["t5", "whisper", "bert"],
)  # fmt: skip
def test_what_is_no_decoder_is_refused_in_one_sentence(make: Any, words: str):
    reason = refuse_decoding(make())
    assert reason is not None and reason.startswith(words) and reason.endswith("Use a decoder-only language model.")


def test_decoders_are_not_refused():
    assert [refuse_decoding(made(name)) for name in MODELS] == [None] * len(MODELS)


def test_a_growing_cache_gives_what_a_dynamic_one_gives():
    model = made("llama")
    ids = torch.arange(300)[None] % 97
    ours, theirs = growing_cache(model), DynamicCache(config=model.config)
    at = 0
    with torch.no_grad():
        for length in (3, 1, 250, 1, 1, 44):
            part = ids[:, at : at + length]
            found, wanted = (model(part, past_key_values=cache).logits for cache in (ours, theirs))
            assert torch.equal(found, wanted)
            at += length
    assert ours.get_seq_length() == theirs.get_seq_length() == at


def test_models_with_windows_and_states_keep_their_own_cache():
    assert [growing_cache(made(name)) for name in ("mistral-window", "qwen3.5", "mamba")] == [None] * 3


def test_only_the_language_part_changes_its_attention():
    text = {**_PLAIN, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=2)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.config.vision_config._attn_implementation = "eager"
    with own_attention(model):
        inside = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    after = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    assert (inside, after) == (("arrondi", "eager"), ("sdpa", "eager"))
