"""The decoding loop against transformers' own generation."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from arrondi.runtime.decoding import tokens


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=97, max_position_embeddings=512)
    )  # fmt: skip


def mistral_with_a_window() -> MistralForCausalLM:
    return MistralForCausalLM(
        MistralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, vocab_size=97, sliding_window=8)
    )  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=512))


@pytest.mark.parametrize("make", [llama, mistral_with_a_window, gpt2])
def test_the_likeliest_tokens_are_those_of_transformers(make):
    torch.manual_seed(0)
    model = make().eval()
    prompt = torch.randint(0, 97, (1, 11))
    wanted = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=300,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = model.config._attn_implementation
    found = list(tokens(model, prompt[0].tolist(), 300, temperature=0.0, stop=set()))
    assert found == wanted[0, 11:].tolist()
    assert model.config._attn_implementation == before


def test_it_stops_after_a_stop_token_and_draws_by_the_seed():
    torch.manual_seed(0)
    model = llama().eval()
    plain = list(tokens(model, [1, 2, 3], 10, temperature=0.0, stop=set()))
    stop = plain[4]
    assert list(tokens(model, [1, 2, 3], 10, temperature=0.0, stop={stop})) == plain[: plain.index(stop) + 1]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(list(tokens(model, [1, 2, 3], 10, temperature=1.5, stop=set())))
    assert drawn[0] == drawn[1] != drawn[2]
