"""Small random models of many architectures, every path of the compiled kernels, and the paths of real data where there is any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.native import native
from arrondi.sample import sample_path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = 2048
"""Of the sample's tokenizer, which every small model shares."""

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_DECODER = {
    **_COMMON,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**_DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}),
    "opt": ("OPTForCausalLM", {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}),
    "phi3-fused-qkv": ("Phi3ForCausalLM", {**_DECODER, "pad_token_id": 0}),
    "bert": ("BertModel", {**_COMMON, "intermediate_size": 96}),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
}  # fmt: skip
"""Name of a test model → transformers class and its config."""


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model with the sample's tokenizer, the way transformers itself saves it."""
    import transformers

    class_name, settings = ARCHITECTURES[name]
    cls = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(3)  # livelier than the default initialisation, so that errors show in the outputs
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path() / file, folder / file)
    return folder


@pytest.fixture(params=[] if native is None else [name for name, missing in native.paths() if missing is None])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every path of the compiled kernels that runs here, one after another."""
    assert native is not None
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("llama")` → directory of a random model, made once; read-only by agreement."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        key = (name, dtype, *sorted(changes.items()))
        if key not in made:
            made[key] = build(name, tmp_path_factory.mktemp(name), dtype, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short English text: some 4,000 tokens of the sample's."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((sample_path() / "heldout.txt").read_text(encoding="utf-8")[:16000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models and texts, for tests marked `peer`; where they are is said by ARRONDI_DATA."""
    path = os.environ.get("ARRONDI_DATA", "")
    if not path or not Path(path).is_dir():
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs DATA=DIRECTORY of real models and texts")
        pytest.skip("ARRONDI_DATA does not name a directory of real models and texts")
    return Path(path)
