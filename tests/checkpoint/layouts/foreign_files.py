"""Small checkpoints made by the packages whose layouts they are, with the numbers that these packages give.

    python foreign_files.py DIR

A script for an environment with gptqmodel and bitsandbytes (or auto-round, hqq, torchao: what is missing is left out); knows nothing of
arrondi. Each case is a folder DIR/CASE with config.json, model.safetensors and expected.safetensors, the plain weights in the type in which
the package restores them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES = {"model.layers.0.a": (64, 128), "model.layers.0.b": (32, 64)}
WIDE = {"model.layers.0.a": (128, 384), "model.layers.0.b": (32, 64)}
"""The first has six blocks of 64 a row, so that blocks of 256 scales run across rows."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}


def weights(shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, torch.nn.Linear]:
    """Linear layers of random numbers, one with a bias, one with a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i, (name, (rows, columns)) in enumerate(shapes.items()):
        linear = torch.nn.Linear(columns, rows, bias=i == 0)
        linear.weight.data = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
        linear.weight.data[1] = 0
        linear.weight.data[2] = linear.weight.data[2].abs()  # its zero point is 0
        made[name] = linear
    return made


def save(
    folder: Path,
    quantization: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """The files of one case."""
    folder.mkdir(parents=True)
    plain = {"model.norm.weight": torch.ones(64)}
    save_file({n: t.contiguous() for n, t in (tensors | plain).items()}, folder / "model.safetensors", metadata)
    save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))


def grid(
    weight: torch.Tensor, bits: int, size: int, symmetric: bool, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of groups of columns, (m, groups), from their extremes."""
    scales, zeros = [], []
    for group in range(int(index.max()) + 1):
        part = weight[:, index == group]
        if symmetric:
            scale = part.abs().amax(1) / (2 ** (bits - 1) - 0.5)
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero = torch.round(-low / torch.where(scale == 0, 1, scale))
        scales.append(torch.where(scale == 0, 1, scale).half().float())
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def index_of(columns: int, size: int, scattered: bool) -> torch.Tensor:
    """The group of each column."""
    index = torch.arange(columns) // (columns if size == -1 else size)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
    return (index[order] if scattered else index).int()


def gptq(folder: Path, bits: int, size: int, symmetric: bool, scattered: bool, format: str) -> None:
    """Layers of gptqmodel's TorchLinear, packed by it, zero points turned into version 1 by it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    config = QuantizeConfig(bits=bits, group_size=size, sym=symmetric, desc_act=scattered, format=format)
    tensors, expected = {}, {}
    for name, linear in weights().items():
        rows, columns = linear.weight.shape
        index = index_of(columns, size, scattered)
        layer = TorchLinear(
            bits=bits, group_size=size, sym=symmetric, desc_act=scattered, in_features=columns, out_features=rows,
            bias=linear.bias is not None,
        )  # fmt: skip
        layer.pack_original(linear, *grid(linear.weight.data, bits, size, symmetric, index), index)
        if format == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, config)
        state = {
            k: v.clone() for k, v in layer.state_dict().items() if k in ("qweight", "qzeros", "scales", "g_idx", "bias")
        }
        tensors |= {f"{name}.{k}": v for k, v in state.items()}
        if format == "gptq":
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        layer.post_init()
        expected[f"{name}.weight"] = layer.dequantize_weight().T.half()
    save(folder, json.loads(json.dumps(config.to_dict(), default=str)), tensors, expected)


def awq(folder: Path, size: int, symmetric: bool) -> None:
    """Layers of gptqmodel's AwqTorchLinear, packed by it."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    tensors, expected = {}, {}
    for name, linear in weights().items():
        rows, columns = linear.weight.shape
        index = index_of(columns, size, False)
        layer = AwqTorchLinear(
            bits=4, group_size=size, sym=symmetric, desc_act=False, in_features=columns, out_features=rows,
            bias=linear.bias is not None, register_buffers=True,
        )  # fmt: skip
        layer.pack(linear, *grid(linear.weight.data, 4, size, symmetric, index))
        tensors |= {f"{name}.{k}": v.clone() for k, v in layer.state_dict().items()}
        expected[f"{name}.weight"] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).T
    config = {
        "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": not symmetric, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    save(folder, config, tensors, expected)


def bitsandbytes4(
    folder: Path, kind: str, double: bool, dtype: torch.dtype, size: int, shapes: dict[str, tuple[int, int]] = SHAPES
) -> None:
    """Layers of bitsandbytes' Linear4bit."""
    import bitsandbytes as bnb

    tensors, expected = {}, {}
    for name, linear in weights(shapes).items():
        data, state = bnb.functional.quantize_4bit(
            linear.weight.data.to(dtype), blocksize=size, compress_statistics=double, quant_type=kind
        )
        tensors[f"{name}.weight"] = data
        tensors |= {f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.data.to(dtype)
        if size <= linear.weight.shape[1]:
            expected[f"{name}.weight"] = bnb.functional.dequantize_4bit(data, state)
            continue
        # Its kernel for CPUs forgets blocks that run on into the next row; its own reference does not.
        absmax = state.absmax
        if double:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        codes = torch.stack([data.flatten() >> 4, data.flatten() & 15], 1).flatten()
        values = state.code[codes.int()].reshape(-1, size) * absmax.float()[:, None]
        expected[f"{name}.weight"] = values.to(dtype).reshape(linear.weight.shape)
    config = {
        "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "load_in_4bit": True,
        "load_in_8bit": False, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }  # fmt: skip
    save(folder, config, tensors, expected)


def bitsandbytes8(folder: Path) -> None:
    """Layers of bitsandbytes' Linear8bitLt."""
    import bitsandbytes as bnb

    tensors, expected = {}, {}
    for name, linear in weights().items():
        data, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.half())
        tensors |= {
            f"{name}.weight": data,
            f"{name}.SCB": scale,
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        expected[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(data, scale)
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.data.half()
    config = {
        "quant_method": "bitsandbytes", "_load_in_4bit": False, "_load_in_8bit": True, "load_in_4bit": False, "load_in_8bit": True,
        "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
    }  # fmt: skip
    save(folder, config, tensors, expected)


def auto_round(folder: Path, bits: int, symmetric: bool, packing: str) -> None:
    """Layers packed by auto-round; multiplied by the identity, they give their weights."""
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing

    tensors, expected = {}, {}
    for name, linear in weights().items():
        rows, columns = linear.weight.shape
        scale, zero = grid(linear.weight.data, bits, 32, symmetric, index_of(columns, 32, False))
        if packing == "auto_round:auto_gptq":
            zero = zero.clamp(min=1)  # which its packing does without saying so
        kind = dynamic_import_quant_linear_for_packing(packing, bits, 32, symmetric)
        layer = kind(bits, 32, columns, rows, bias=linear.bias is not None, weight_dtype=torch.float32)
        layer.device = torch.device("cpu")
        layer.pack(linear, scale, zero, None, device="cpu")
        tensors |= {f"{name}.{k}": v.clone() for k, v in layer.state_dict().items()}
        layer.bias = None
        layer.post_init()
        expected[f"{name}.weight"] = layer(torch.eye(columns, dtype=torch.float16)).T.half()
    config = {
        "quant_method": "auto-round", "packing_format": packing, "bits": bits, "group_size": 32, "sym": symmetric, "data_type": "int",
        "iters": 0, "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers",
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}},
    }  # fmt: skip
    save(folder, config, tensors, expected)


def hqq(folder: Path, bits: float, size: int | None, axis: int, dtype: torch.dtype, **words: bool) -> None:
    """Layers of HQQ's HQQLinear; what they mean is what it makes of its own file with products in float32."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    tensors, expected = {}, {}
    for name, linear in weights().items():
        quantization = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
        quantization["weight_quant_params"] |= words
        layer = HQQLinear(linear, quantization, compute_dtype=dtype, device="cpu")
        tensors |= {f"{name}.{k}": v.detach().clone() for k, v in layer.state_dict().items()}
        again = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        again.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
        expected[f"{name}.weight"] = again.dequantize()
    quantization = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
    config = {"quant_method": "hqq", "quant_config": quantization, "skip_modules": ["lm_head"]}
    save(folder, config, tensors, expected)


def torchao(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Layers of torchao, saved as transformers saves them."""
    from torchao.core.config import config_to_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    state, expected = {}, {}
    for name, linear in weights().items():
        if type(config).__name__.startswith("Float8"):
            linear.weight.data[1] = 1  # of a row of zeros it makes NaN
        module = torch.nn.Sequential(linear).to(dtype)
        quantize_(module, config)
        state |= {name + key.removeprefix("0"): value for key, value in module.state_dict().items()}
        expected[f"{name}.weight"] = module[0].weight.dequantize()
    tensors, metadata = flatten_tensor_state_dict(state)
    said = {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(config)},
        "modules_to_not_convert": None,
    }
    save(
        folder,
        said | {"include_input_output_embeddings": False, "untie_embedding_weights": False},
        tensors,
        expected,
        metadata,
    )


def all_of_torchao(out: Path) -> None:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        PerTensor,
    )

    groups, asymmetric = PerGroup(32), MappingType.ASYMMETRIC
    torchao(out / "torchao-int8", Int8WeightOnlyConfig(), torch.bfloat16)
    torchao(out / "torchao-int8-groups", Int8WeightOnlyConfig(granularity=groups), torch.float32)
    torchao(out / "torchao-int8-tensor", Int8WeightOnlyConfig(granularity=PerTensor()), torch.float32)
    torchao(out / "torchao-int8-dynamic", Int8DynamicActivationInt8WeightConfig(), torch.float32)
    torchao(
        out / "torchao-int8-dynamic-asym",
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=asymmetric),
        torch.bfloat16,
    )
    for bits, where in ((2, groups), (3, PerAxis(0)), (4, groups), (8, groups)):
        weight = getattr(torch, f"int{bits}")
        torchao(out / f"torchao-intx-{bits}", IntxWeightOnlyConfig(weight, where), torch.bfloat16)
        torchao(out / f"torchao-intx-{bits}-asym", IntxWeightOnlyConfig(weight, where, asymmetric), torch.float32)
    torchao(out / "torchao-8da4w", Int8DynamicActivationIntxWeightConfig(torch.int4, groups), torch.bfloat16)
    torchao(out / "torchao-float8", Float8WeightOnlyConfig(), torch.bfloat16)
    torchao(
        out / "torchao-float8-tensor",
        Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, granularity=PerTensor()),
        torch.float32,
    )


def main(out: Path) -> None:
    if importlib.util.find_spec("gptqmodel"):
        for bits in (2, 3, 4, 8):
            gptq(out / f"gptq-{bits}-sym", bits, 32, True, False, "gptq")
            gptq(out / f"gptq-{bits}-asym-v1", bits, 32, False, False, "gptq")
            gptq(out / f"gptq-{bits}-asym-v2", bits, -1, False, False, "gptq_v2")
        gptq(out / "gptq-4-act-order", 4, 32, True, True, "gptq")
        gptq(out / "gptq-4-act-order-asym", 4, 32, False, True, "gptq_v2")
        awq(out / "awq-asym", 32, False)
        awq(out / "awq-sym", 64, True)
    if importlib.util.find_spec("bitsandbytes"):
        for kind in ("nf4", "fp4"):
            for double in (False, True):
                dtype = torch.bfloat16 if double else torch.float32
                bitsandbytes4(out / f"bitsandbytes-{kind}{'-double' * double}", kind, double, dtype, 64)
        bitsandbytes4(out / "bitsandbytes-nf4-128", "nf4", True, torch.float16, 128)
        bitsandbytes4(out / "bitsandbytes-nf4-double-wide", "nf4", True, torch.bfloat16, 64, WIDE)
        bitsandbytes8(out / "bitsandbytes-int8")
    if importlib.util.find_spec("auto_round"):
        for bits in (2, 4, 8):
            auto_round(out / f"auto-round-{bits}-sym", bits, True, "auto_round:auto_gptq")
            auto_round(out / f"auto-round-{bits}-asym", bits, False, "auto_round")
        auto_round(out / "auto-round-asym-v1", 4, False, "auto_round:auto_gptq")
        auto_round(out / "auto-round-3-sym", 3, True, "auto_round:auto_gptq")
    if importlib.util.find_spec("hqq"):
        for bits in (1, 1.58, 2, 3, 4, 5, 6, 8):
            hqq(out / f"hqq-{bits}", bits, 32, 1, torch.float16)
        hqq(out / "hqq-4-axis0", 4, 16, 0, torch.bfloat16)
        hqq(out / "hqq-3-axis0-columns", 3, None, 0, torch.float16)
        hqq(out / "hqq-8-rows", 8, None, 1, torch.bfloat16)
        hqq(out / "hqq-4-run", 4, 256, 1, torch.float16)
        hqq(out / "hqq-4-as-float", 4, 64, 1, torch.float16, view_as_float=True)
        hqq(out / "hqq-2-whole-zeros", 2, 32, 1, torch.float16, round_zero=True, optimize=False)
    if importlib.util.find_spec("torchao"):
        all_of_torchao(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
