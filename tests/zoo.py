"""Small random models of many architectures, as transformers saves them; every parameter and every stored buffer is perturbed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from arrondi.sample import sample_path

VOCABULARY = 2048
"""Of the sample's tokenizer, which every small model shares."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
DECODER = {
    **COMMON,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ENCODER = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 96}
TWO = {**DECODER, "num_hidden_layers": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
SLIDING = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gpt2": ("GPT2LMHeadModel", {**GPT, "n_layer": 3}),
    "opt": ("OPTForCausalLM", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}),
    "phi3-fused-qkv": ("Phi3ForCausalLM", {**DECODER, "pad_token_id": 0}),
    "bert": ("BertModel", {**COMMON, "intermediate_size": 96}),
    "mixtral": ("MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**DECODER, **EXPERTS, "head_dim": 16}),
}  # fmt: skip
"""What the README names: name → transformers class and its config."""

UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    # classes that reach for the weights of packed layers when they are built
    "falcon": ("FalconForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "modernbert": ("ModernBertModel", {**ENCODER, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}),
    "t5-encoder": ("T5EncoderModel", {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16}),
    # linears before the first block
    "opt-projected": ("OPTForCausalLM", {**COMMON, "num_hidden_layers": 2, "ffn_dim": 96, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "electra": ("ElectraModel", {**ENCODER, "embedding_size": 32}),
    # a weight that is used without calling its module
    "deberta": ("DebertaV2Model", {**ENCODER, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}),
    # a buffer that chooses experts, shared experts, low-rank attention
    "deepseek-v3": ("DeepseekV3ForCausalLM", {**TWO, **LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    # a router that is a plain linear
    "hunyuan": ("HunYuanMoEV1ForCausalLM", {**TWO, **EXPERTS, "num_experts": 8, "head_dim": 16, "moe_topk": 2, "pad_token_id": 0}),
    # blocks whose arguments depend on tokens, or that read what earlier blocks left
    "gemma4": ("Gemma4ForCausalLM", {**DECODER, **SLIDING, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "pad_token_id": 0}),
    "gemma3n": ("Gemma3nForCausalLM", {**DECODER, **SLIDING, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "laurel_rank": 16, "altup_num_inputs": 2, "pad_token_id": 0}),
    # state spaces, linear attention and blocks of several classes
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 32}),
    "mamba2": ("Mamba2ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "jamba": ("JambaForCausalLM", {**TWO, **EXPERTS, "mamba_d_state": 8, "mamba_dt_rank": 32, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "pad_token_id": 0}),
    "bamba": ("BambaForCausalLM", {**TWO, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8, "pad_token_id": 0}),
    "falcon-h1": ("FalconH1ForCausalLM", {**TWO, "head_dim": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8, "pad_token_id": 0}),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64, "intermediate_size": 96}),
    "recurrent-gemma": ("RecurrentGemmaForCausalLM", {**DECODER, "intermediate_size": 128, "lru_width": 64, "attention_window_size": 16, "pad_token_id": 0}),
    "xglm": ("XGLMForCausalLM", {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 128}),
    "minimax": ("MiniMaxForCausalLM", {**TWO, **EXPERTS, "head_dim": 16, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3-next": ("Qwen3NextForCausalLM", {**TWO, **EXPERTS, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64}),
    # stored convolutions that transformers joins; positions that are looked up by their number alone
    "olmo-hybrid": ("OlmoHybridForCausalLM", {**TWO, "num_key_value_heads": 4, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "pad_token_id": 0}),
    "roformer": ("RoFormerModel", ENCODER),
    # a model of text inside one of images
    "gemma3-vlm": ("Gemma3ForConditionalGeneration", {"text_config": {**TWO, **SLIDING, "pad_token_id": 0}, "vision_config": {**VISION, "num_hidden_layers": 2}, "mm_tokens_per_image": 4, "image_token_index": 2047}),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", {"text_config": {**TWO, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "fullatt_block_indexes": [1]}, "image_token_id": 2040, "video_token_id": 2041, "vision_start_token_id": 2042, "vision_end_token_id": 2043}),
    # stored tensors that transformers splits
    "nomic-bert": ("NomicBertModel", ENCODER),
    "dinov2-swiglu": ("Dinov2Model", {**VISION, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "use_swiglu_ffn": True}),
    "gte": ("GteModel", ENCODER),
    "jina-v3": ("JinaEmbeddingsV3Model", ENCODER),
    # heads of two kinds, and blocks that run more than once
    "bert-masked": ("BertForMaskedLM", ENCODER),
    "bert-classifier": ("BertForSequenceClassification", ENCODER),
    "albert": ("AlbertModel", {**ENCODER, "embedding_size": 32}),
    "hrm": ("HrmTextForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_layers_per_stack": 2, "max_position_embeddings": 128}),
    # other inputs than token ids alone
    "t5": ("T5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0}),
    "whisper": ("WhisperForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 8, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}),
    "vit": ("ViTModel", {**VISION, "num_hidden_layers": 2}),
    "clip": ("CLIPModel", {"text_config": {**ENCODER, "eos_token_id": 2}, "vision_config": {**VISION, "num_hidden_layers": 2}, "projection_dim": 32}),
    # experts that are stored as one tensor
    "gpt-oss": ("GptOssForCausalLM", {**TWO, **SLIDING, **EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama4": ("Llama4ForCausalLM", {**TWO, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": 32, "interleave_moe_layer_step": 1}),
    # stored tensors of the tower for images that transformers splits
    "qianfan-ocr": ("QianfanOCRForConditionalGeneration", {"text_config": {**TWO, "head_dim": 16, "model_type": "qwen3"}, "vision_config": {**VISION, "num_hidden_layers": 2, "image_size": [32, 32], "patch_size": [8, 8]}, "image_token_id": 2040}),
    # stored matrices that transformers joins into one layer
    "minimax-m3": ("MiniMaxM3SparseForConditionalGeneration", {"text_config": {**TWO, **EXPERTS, "head_dim": 16, "rotary_dim": 8, "dense_intermediate_size": 96, "shared_intermediate_size": 64, "index_n_heads": 2, "index_head_dim": 32, "index_block_size": 64, "mlp_layer_types": ["sparse"] * 2, "layer_types": ["full_attention"] * 2}, "vision_config": {**VISION, "num_hidden_layers": 2, "temporal_patch_size": 1}, "image_token_index": 2040, "video_token_index": 2041, "projector_hidden_size": 64, "merged_hidden_size": 64}),
    # blocks that hand their router's state to the next one
    "zaya": ("ZayaForCausalLM", {**DECODER, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 64}),
    # linears that read (windows, heads, tokens, n)
    "minicpm3": ("MiniCPM3ForCausalLM", {**TWO, **LATENT, "num_key_value_heads": 4}),
}  # fmt: skip
"""Models with something unusual."""

HALVES = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", {**HALVES, "vocab_size": VOCABULARY, "d_model": 64, "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}),
    # tables of sines that are parameters and that no file holds
    "marian": ("MarianMTModel", {**HALVES, "vocab_size": VOCABULARY, "d_model": 64, "max_position_embeddings": 128, "pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": 0}),
    "mt5": ("MT5ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0}),
}  # fmt: skip
"""Models with an encoder and a decoder, beside `t5` and `whisper`."""

OF_GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 16}),
    "phi": ("PhiForCausalLM", {**DECODER, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmForCausalLM", {**DECODER, "partial_rotary_factor": 0.5}),
}
"""Models whose files are read and written, and that are like others in all else."""

KNOWN = {**ARCHITECTURES, **UNUSUAL, **SEQ2SEQ, **OF_GGUF}
ZOO = {**ARCHITECTURES, **UNUSUAL}


def class_of(name: str) -> Any:
    """The transformers class of a test model."""
    import transformers

    return getattr(transformers, KNOWN[name][0])


def make(name: str, **changes: Any) -> Any:
    """A random model, livelier than its initialisation; nothing has the value that a config alone would give."""
    cls, settings = class_of(name), KNOWN[name][1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = cls.config_class(**{**settings, **changes})
        config._experts_implementation = "eager"
        return perturb(cls(config)).eval()


@torch.no_grad()
def perturb(model: Any) -> Any:
    """Change every parameter and every stored buffer."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and float(parameter.std()) > 0:
            parameter.mul_(3)  # so that errors show in the outputs
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn(buffer.shape))
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with the sample's tokenizer, the way transformers itself saves it."""
    model.to(dtype).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(sample_path() / file, folder / file)
    return folder


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model."""
    return save(make(name, **changes), folder, dtype)


def of_transformers(name: str, folder: Path) -> Any:
    """A model directory as transformers loads it, in float32."""
    return class_of(name).from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state."""
    with torch.no_grad():
        result = model(input_ids=ids)
    found: torch.Tensor = result.logits if hasattr(result, "logits") else result[0]
    return found
