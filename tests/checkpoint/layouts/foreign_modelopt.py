"""Small checkpoints exported by NVIDIA's ModelOpt, with the numbers that its own classes give.

    python foreign_modelopt.py DIR

A script for an environment with modelopt and transformers; knows nothing of arrondi. The cases are as those of `foreign_files`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

CASES = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8-channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8-blocks": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_WEIGHT_ONLY_CFG",
    "int8-inputs": "INT8_DEFAULT_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4-weights": "W4A16_NVFP4_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "mixed": "",
}
EIGHT = [
    {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    {"quantizer_name": "*mlp*input_quantizer", "enable": False},
]
"""Rules that come after those of FP8: int8 for some layers."""


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def meant(weight: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
    """The numbers of one weight, by the package's class for what is stored."""
    shape, wide = weight.shape, torch.float32
    if outer is not None:
        made = NVFP4QTensor(torch.Size((shape[0], 2 * shape[1])), wide, weight)
        return made.dequantize(wide, scale=scale, double_scale=outer, block_sizes={-1: 16})
    if scale.dtype == torch.uint8 and weight.dtype == torch.uint8:
        made = MXFP4QTensor(torch.Size((shape[0], 2 * shape[1])), wide, weight)
        return made.dequantize(wide, scale=scale, block_sizes={-1: 32})
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(shape, wide, weight).dequantize(wide, scale=scale)
    if weight.dtype == torch.int8:
        return from_quantized_weight(weight, scale, "int8_wo", wide)
    if weight.dtype == torch.uint8:  # the package has no way back; two rows a byte, as pack_int4_in_uint8 says
        codes = torch.stack((weight & 15, weight >> 4), 1).flatten(0, 1).float()
        codes = torch.where(codes > 7, codes - 16, codes)
        return codes * scale.repeat_interleave(shape[1] // scale.shape[1], 1)
    if scale.ndim == 4 or (scale.ndim == 0 and shape != (128, 128)):
        blocks = scale.reshape(scale.shape[0], scale.shape[2]) if scale.ndim == 4 else scale
        blocks = (
            blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
            if scale.ndim == 4
            else blocks
        )
        return weight.to(wide) * blocks
    return FP8QTensor(shape, wide, weight).dequantize(wide, scale=scale[:, None] if scale.ndim == 1 else scale)


def main(out: Path) -> None:
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    for name, word in CASES.items():
        config = copy.deepcopy(getattr(mtq, word or "FP8_DEFAULT_CFG"))
        config["quant_cfg"] += [] if word else EIGHT
        folder = out / f"modelopt-{name}"
        export_hf_checkpoint(mtq.quantize(model(), config, lambda m: m(ids)), dtype=torch.bfloat16, export_dir=folder)
        stored = load_file(folder / "model.safetensors")
        expected = {}
        for key in [k for k in stored if k.endswith(".weight_scale")]:
            weight = key.removesuffix("_scale")
            expected[weight] = meant(stored[weight], stored[key], stored.get(f"{key}_2"))
        save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
