"""Small random models with packed weights, as `arrondi.load` makes them, but not fused."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from arrondi.formats import parse_scheme
from arrondi.nn import QLinear
from arrondi.runtime.fuse import fuse, unfuse
from arrondi.tensor.nearest import quantize_tensor

SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 4}),
    "ministral-windows": (
        "MinistralForCausalLM",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    ),
    "qwen2-biases": ("Qwen2ForCausalLM", {}),
    "qwen3-head-norms": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma-one-plus-weight": ("GemmaForCausalLM", {"head_dim": 40, "hidden_activation": "gelu_pytorch_tanh"}),
    "granite-plain": ("GraniteForCausalLM", {}),
    "lfm2-other-names": ("Lfm2ForCausalLM", {"layer_types": ["full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
}
"""Models whose every block has a fused form."""
IDS = torch.arange(24).reshape(2, 12) * 31 % 512
ROUNDOFF = 1e-5
"""Of results in float32, in units of the largest: a dozen products one after the other, each good to 2^-20 of what it sums."""


def built(class_name: str, scheme: str = "w=int4/g32", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model of a class, every parameter and buffer perturbed, its linears but the head packed."""
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SMALL, **changes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(3)  # livelier than the default initialisation, so that errors show in the outputs
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + 0.1 * torch.rand_like(buffer))
    model.to(dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, packed(layer, scheme, dtype))
    return model


def packed(layer: nn.Linear, scheme: str, dtype: torch.dtype) -> QLinear:
    asked = parse_scheme(scheme)
    weight = quantize_tensor(layer.weight.detach().float(), asked.weights)
    return QLinear(weight, layer.bias, inputs=asked.inputs, dtype=dtype)


def fused(name: str, **changes: Any) -> Any:
    class_name, settings = FUSED[name]
    model = built(class_name, **{**settings, **changes})
    assert set(fuse(model).values()) == {None}
    return model


def apart(model: Any) -> Any:
    """The same model with transformers' own blocks."""
    model = copy.deepcopy(model)
    unfuse(model)
    return model


def linears(model: nn.Module) -> list[QLinear]:
    return [m for m in model.modules() if isinstance(m, QLinear)]


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model(**({"input_ids": IDS} | inputs)).logits.float()
    return found


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
