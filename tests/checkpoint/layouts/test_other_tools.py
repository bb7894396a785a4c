"""Layouts of other tools: what is written means what they say it means, what they write is read bit by bit, what is damaged is refused.

The oracle of the default run is `plain`, decoders in NumPy. Files of the packages themselves, and what these make of ours, need an
environment with them: ARRONDI_CHECKPOINTS names its interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import LAYOUTS, Checkpoint, LayerValues, ModelFacts, Placed
from arrondi.errors import FileFormatError, SchemeError
from arrondi.formats import PerGroup, parse_scheme
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from tests.checkpoint.copies import static_grid
from tests.checkpoint.layouts.plain import decoded

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
NAMES = {"model.layers.0.a.weight": (64, 128), "model.layers.0.b.weight": (32, 96)}
SCHEMES = {
    "gptq": ["w=int2/g32", "w=int3/g32/asym", "w=int4/g32", "w=int4/g32/asym", "w=int8/channel/asym", "scattered", "several"],
    "awq": ["w=int4/g32", "w=int4/g32/asym", "w=int4/channel"],
    "bitsandbytes": ["w=nf4/g32", "FP4_BNB", "NF4_DQ", "W8A8"],
    "auto-round": ["w=int4/g32", "w=int4/g32/asym", "w=int3/channel", "several"],
    "fp8": ["w=fp8/b32x32,a=fp8/g32", "FP8_BLOCK", "FP8"],
    "mxfp4": ["MXFP4A16"],
    "mlx": ["w=uint4/g32/offset/float16/o:float16", "w=uint3/g32/offset", "w=uint6/g32/offset", "MXFP4A16", "MXFP8A16", "several"],
    "modelopt": [
        "FP8", "FP8_DYNAMIC", "w=fp8/b128x128", "w=int4/g32", "w=int8/channel", "w=int8/channel,a=int8/tensor/static", "NVFP4", "NVFP4A16", "MXFP4A16",
        "MXFP8", "several",
    ],
    "hqq": ["w=uint4/g32/asym", "w=uint3/g32/asym", "w=uint8/channel/offset", "w=uint2/g32/offset/bfloat16"],
    "torchao": ["w=int4/g32", "w=int3/channel/asym", "w=int8/channel,a=int8/token", "w=int8/tensor", "w=fp8/channel", "w=fp8_e5m2/tensor"],
}  # fmt: skip
CASES = [(layout, scheme) for layout, schemes in SCHEMES.items() for scheme in schemes]


def made(
    layout: str, scheme: str, names: dict[str, tuple[int, int]] = NAMES
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and tensors of a small model."""
    placed, tensors = [], {"model.norm.weight": torch.ones(64)}
    if layout != "mxfp4":
        tensors["model.layers.0.a.bias"] = torch.ones(64)
    for i, (name, (rows, columns)) in enumerate(names.items()):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(i))
        weight[1], weight[2] = 0, weight[2].abs()
        several = {"mlx": ["w=uint4/g32/offset", "MXFP4A16"], "modelopt": ["w=int4/g32", "NVFP4"]}.get(
            layout, ["w=int4/g32", "w=int8/channel"]
        )
        text = {"scattered": "w=int4/g32/asym", "several": several[i]}.get(scheme, scheme)
        if text in ("NF4", "FP4_BNB", "NF4_DQ"):
            columns = columns // 64 * 64
        layer = LAYOUTS[layout].fit(parse_scheme(text))
        q = quantize_tensor(weight[:, :columns].contiguous(), layer.weights)
        one = Placed(name, (rows, columns), layer, indexed=scheme == "scattered")
        if layout == "mxfp4":
            one = Placed(name.removesuffix(".weight"), (2, columns, rows // 2), layer, transposed=True)
        if one.indexed and isinstance(layer.weights.granularity, PerGroup):
            index = torch.randperm(columns) // layer.weights.granularity.size
            q = QTensor(q.codes, q.scale, q.zero_point, q.offset, q.scheme, index.int())
        assert LAYOUTS[layout].refuse(one) is None
        placed.append(one)
        tensors |= LAYOUTS[layout].write(one, LayerValues(q, static_grid(layer, 3.0)))
    assert LAYOUTS[layout].together(placed) is None
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    described = LAYOUTS[layout].config(placed, ["lm_head"])
    parts = {n for p in placed for n, _, _ in LAYOUTS[layout].specs(p)}
    if words := LAYOUTS[layout].metadata(placed, sorted(tensors.keys() - parts), ModelFacts()):
        described["metadata"] = words  # of the file, where `stored` puts it
    return config | {"quantization_config": described}, tensors


def stored(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    """A checkpoint of these, every layer read."""
    folder.mkdir(exist_ok=True)
    words = config.get("quantization_config", {}).pop("metadata", None)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", words)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    return checkpoint


@pytest.mark.parametrize(("layout", "scheme"), CASES)
def test_files_mean_what_their_tool_says(layout: str, scheme: str, tmp_path: Path) -> None:
    config, tensors = made(layout, scheme)
    checkpoint = stored(tmp_path, config, tensors)
    expected = decoded(config, tensors)
    ending = "" if layout == "mxfp4" else ".weight"
    assert {path + ending for path in expected} == set(checkpoint.placed) and len(expected) == len(NAMES)
    for path, weight in expected.items():
        np.testing.assert_array_equal(checkpoint.dense(path + ending).numpy(), weight)
        assert len(np.unique(weight)) > 8


def renamed(old: str, new: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def said(**changes: Any) -> Edit:
    return lambda config, tensors: config["quantization_config"].update(changes)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return edit


def at(place: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


A = "model.layers.0.a"
NOTE = f"{A}.weight.quant_state.bitsandbytes__nf4"


def note(**changes: Any) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        text = json.loads(bytes(tensors[NOTE].tolist())) | changes
        tensors[NOTE] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)

    return edit


def notes(**changes: Any) -> Edit:
    """Another note of torchao of the first weight."""

    def edit(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        metadata = config["quantization_config"]["metadata"]
        text = json.loads(metadata[f"{A}.weight"])
        for key, value in changes.items():
            (text if key.startswith("_") else text["_data"])[key] = value
        metadata[f"{A}.weight"] = json.dumps(text)

    return edit


def words(key: str, word: str) -> Edit:
    return lambda config, tensors: config["quantization_config"]["metadata"].update({key: word})


FAULTS: list[tuple[str, str, Edit, str]] = [
    ("gptq", "w=int4/g32", said(bits=8), "config does not describe"),
    ("gptq", "w=int4/g32", said(bits=5), "bits should be one of 2, 3, 4, 8"),
    ("gptq", "w=int4/g32", said(bits=None), "bits should be one of"),
    ("gptq", "w=int4/g32", said(group_size=16), "config does not describe"),
    ("gptq", "w=int4/g32", said(checkpoint_format="gptq_v2"), "a zero point is 7, not 8"),
    ("gptq", "w=int4/g32/asym", said(sym=True), "the config says that weights are symmetric"),
    ("gptq", "w=int4/g32", said(checkpoint_format="marlin"), "checkpoint_format should be"),
    ("gptq", "w=int4/g32", said(rotation="hadamard"), "rotation is 'hadamard'"),
    ("gptq", "w=int4/g32", said(dynamic={"-:.*layers.0.a": {}}), "says that model.layers.0.a is not quantized"),
    ("gptq", "w=int4/g32", said(dynamic={"+:(": {"bits": 8}}), "is no pattern"),
    ("gptq", "w=int4/g32", said(dynamic={"+:.*a$": {"bits": 8}}), "config does not describe"),
    ("gptq", "w=int4/g32", said(bitz=4), "has the key 'bitz'"),
    ("gptq", "w=int4/g32", renamed(f"{A}.scales", f"{A}.scale"), f"{A}.scales is missing"),
    ("gptq", "w=int4/g32", renamed(f"{A}.bias", f"{A}.biaz"), f"{A}.biaz is stored beside"),
    ("gptq", "w=int4/g32", put(f"{A}.bias", lambda t: t[:63]), r"but the weight has 64 outputs"),
    ("gptq", "w=int4/g32", put(f"{A}.qweight", lambda t: t[:15]), "config does not describe"),
    ("gptq", "w=int4/g32", put(f"{A}.qzeros", lambda t: t.repeat(2, 1)), "config does not describe"),
    ("gptq", "scattered", put(f"{A}.g_idx", at(0, 4)), "group index"),
    ("gptq", "scattered", put(f"{A}.g_idx", at(0, -1)), "group index"),
    ("gptq", "w=int4/g32", put(f"{A}.g_idx", at(slice(None), 1)), "group index"),
    ("gptq", "w=int4/g32", put(f"{A}.scales", at((0, 0), float("nan"))), "NaN or infinite"),
    ("gptq", "w=int4/g32", put(f"{A}.scales", torch.Tensor.int), "floating-point numbers"),
    ("awq", "w=int4/g32", said(version="gemv"), "version should be one of 'gemm'"),
    ("awq", "w=int4/g32", said(bits=8), "bits should be one of 4"),
    ("awq", "w=int4/g32/asym", said(zero_point=False), "the config says that weights are symmetric"),
    ("awq", "w=int4/g32", said(group_size=64), "config does not describe"),
    ("awq", "w=int4/g32", renamed(f"{A}.qzeros", f"{A}.qzeroz"), f"{A}.qzeros is missing"),
    ("awq", "w=int4/g32", put(f"{A}.scales", lambda t: t[:, :60]), "60 outputs"),
    ("bitsandbytes", "NF4", said(load_in_8bit=True), "and not both"),
    ("bitsandbytes", "NF4", said(load_in_8bit=True, load_in_4bit=False), "8 bits, but"),
    ("bitsandbytes", "NF4", said(bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type is 'fp4', but"),
    ("bitsandbytes", "NF4", note(blocksize=128), "found F32"),
    ("bitsandbytes", "NF4", note(blocksize=48), "blocksize should be one of"),
    ("bitsandbytes", "NF4", note(quant_type="fp4"), "note of a weight of kind 'fp4'"),
    ("bitsandbytes", "NF4", note(shape=[64, 96]), "run across rows of 96"),
    ("bitsandbytes", "NF4", note(shape=[64, -1]), "matrices"),
    ("bitsandbytes", "NF4", note(mystery=1), "has the key 'mystery'"),
    ("bitsandbytes", "NF4_DQ", note(nested_offset="x"), "nested_offset should be a number"),
    ("bitsandbytes", "NF4", put(NOTE, lambda t: t[:20]), "is no JSON"),
    ("bitsandbytes", "NF4", renamed(NOTE, f"{NOTE[:-3]}nf5"), "beside|no note|without a scale"),
    ("bitsandbytes", "NF4", put(f"{A}.weight.quant_map", at(3, 0.5)), "does not hold the values of nf4"),
    ("bitsandbytes", "NF4", put(f"{A}.weight", lambda t: t[:-1]), "config does not describe"),
    ("bitsandbytes", "W8A8", put(f"{A}.weight_format", lambda t: t + 1), "weight_format is 1"),
    ("bitsandbytes", "W8A8", renamed(f"{A}.SCB", f"{A}.SCC"), "SCB is missing"),
    ("bitsandbytes", "W8A8", said(llm_int8_threshold=-1.0), "not negative"),
    ("auto-round", "w=int4/g32", said(packing_format="auto_round"), "a zero point is 7, not 8"),
    ("auto-round", "w=int4/g32", said(packing_format="auto_round:llm_compressor"), "packing_format should be"),
    ("auto-round", "w=int4/g32", said(packing_format="auto_round:gptqmodel"), "g_idx is missing"),
    ("auto-round", "w=int4/g32", said(data_type="mx_fp"), "data_type should be"),
    ("auto-round", "w=int4/g32", said(act_bits=8), "act_bits is 8"),
    ("auto-round", "w=int4/g32", said(rotation_config={"a": 1}), "rotation_config"),
    ("auto-round", "w=int4/g32", said(extra_config={A: {"bits": 16}}), "not quantized, but it is stored so"),
    ("auto-round", "w=int4/g32", said(extra_config={".*a.*": {"bits": 8}}), "config does not describe"),
    ("auto-round", "w=int4/g32", put(f"{A}.qzeros", lambda t: t[1:]), "config does not describe"),
    ("fp8", "FP8_BLOCK", said(weight_block_size=[64, 64]), "config does not describe"),
    ("fp8", "FP8_BLOCK", said(weight_block_size=[128]), "should be two sizes"),
    ("fp8", "FP8_BLOCK", said(weight_block_size="128"), "a list of whole numbers"),
    ("fp8", "FP8_BLOCK", said(fmt="e5m2"), "fmt should be one of 'e4m3'"),
    ("fp8", "FP8_BLOCK", said(activation_scheme="static"), "activation_scale is missing"),
    ("fp8", "FP8", said(activation_scheme="dynamic"), "activation_scale is stored, but no weight"),
    ("fp8", "FP8_BLOCK", said(kv_cache_scheme={"type": "float"}), "kv_cache_scheme"),
    ("fp8", "FP8_BLOCK", renamed(f"{A}.weight_scale_inv", f"{A}.weight_scale_inx"), "weight_scale_inv is missing"),
    ("fp8", "FP8_BLOCK", renamed(f"{A}.weight", f"{A}.weighd"), "weighd|without a scale"),
    (
        "fp8",
        "FP8_BLOCK",
        put(f"{A}.weight", lambda t: t.view(torch.float8_e5m2)),
        "weight_scale_inv is stored, but no weight",
    ),
    ("fp8", "FP8_BLOCK", put(f"{A}.weight_scale_inv", at((0, 0), float("inf"))), "NaN or infinite"),
    ("fp8", "FP8_BLOCK", put(f"{A}.weight_scale_inv", torch.Tensor.int), "powers of two"),
    (
        "fp8",
        "FP8_BLOCK",
        put(f"{A}.weight", lambda t: at((0, 0), 127)(t.view(torch.uint8)).view(torch.float8_e4m3fn)),
        "no number",
    ),
    ("fp8", "FP8", put(f"{A}.activation_scale", lambda t: -t), "not a positive number"),
    ("mxfp4", "MXFP4A16", renamed(f"{A}_scales", f"{A}_scalez"), "_scales is missing"),
    ("mxfp4", "MXFP4A16", put(f"{A}_scales", at((0, 0, 0), 255)), "NaN or infinite"),
    ("mxfp4", "MXFP4A16", put(f"{A}_blocks", lambda t: t[..., :8]), "blocks of 16 bytes"),
    ("mxfp4", "MXFP4A16", put(f"{A}_blocks", lambda t: t[:, :, :1]), "config does not describe"),
    ("mxfp4", "MXFP4A16", said(bits=4), "has the key 'bits'"),
    ("bitsandbytes", "W8A8", said(llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight"),
    ("hqq", "w=uint4/g32/asym", renamed(f"{A}.zero", f"{A}.zeros"), f"{A}.zero is missing"),
    ("hqq", "w=uint4/g32/asym", renamed(f"{A}.axis", f"{A}.axes"), f"{A}.axis is missing"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.nbits", lambda t: t + 3), "nbits is 7"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.nbits", lambda t: t - 2), "packing is '4bit_u8', but codes of 2 bits"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.axis", lambda t: t - 1), "config does not describe"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.group_size", lambda t: t + 1), "33, which does not divide"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.group_size", lambda t: t * 2), "config does not describe"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.shape", lambda t: t.flip(0)), "but the weight has 128 outputs"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.quant_scale", lambda t: t + 1), "quant_scale is True"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.quant_zero", lambda t: t + 2), "should be 0 or 1"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.channel_wise", lambda t: t - 1), "channel_wise is False"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.compute_dtype", lambda t: t[:-1]), "compute_dtype is 'torch.float1'"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.zero", at((0, 0), float("inf"))), "NaN or infinite"),
    ("hqq", "w=uint4/g32/asym", put(f"{A}.scale", torch.Tensor.int), "floating-point numbers"),
    ("hqq", "w=uint3/g32/asym", put(f"{A}.W_q", at((0, 0), -1)), "bits beyond"),
    ("hqq", "w=uint4/g32/asym", renamed(f"{A}.bias", f"{A}.meta"), f"{A}.meta is stored beside"),
    ("torchao", "w=int4/g32", notes(_type="Int4Tensor"), "a Int4Tensor of torchao"),
    (
        "torchao",
        "w=int4/g32",
        notes(_type="Int8Tensor"),
        "has the key 'activation_quantization'",
    ),
    ("torchao", "w=int4/g32", notes(_type="Tensor"), "has the key"),
    ("torchao", "w=int4/g32", notes(_tensor_data_names=["qdata", "scale"]), "names the parts qdata, scale"),
    ("torchao", "w=int4/g32", notes(block_size=[1, 64]), "config does not describe"),
    ("torchao", "w=int4/g32", notes(block_size=[1, 48]), "do not divide"),
    ("torchao", "w=int4/g32", notes(target_dtype={"_type": "torch.dtype", "_data": "int1"}), "should be one of 'int2'"),
    ("torchao", "w=int4/g32", notes(target_dtype={"_type": "torch.dtype", "_data": "int3"}), "int3 has no code"),
    ("torchao", "w=int4/g32", notes(activation_quantization="int4"), "activation_quantization should be"),
    ("torchao", "w=int8/channel,a=int8/token", notes(reduce_range=True), "reduce_range is True"),
    ("torchao", "w=int4/g32", words(f"{A}.weight", "[[["), "is no JSON"),
    ("torchao", "w=int4/g32", words("tensor_names", "[1]"), "no list tensor_names"),
    ("torchao", "w=int4/g32", words("tensor_names", f'["{A}.weight"]'), "of a tensor that tensor_names lacks"),
    ("torchao", "w=int4/g32", words(f"{A}.weight", '{"_type": "Tensor"}'), "is stored, and no metadata"),
    (
        "torchao",
        "w=int4/g32",
        renamed(f"{A}._weight_scale", f"{A}._weight_scales"),
        "should hold floating-point numbers, found nothing",
    ),
    ("torchao", "w=int4/g32", put(f"{A}._weight_zero_point", torch.Tensor.float), "config does not describe"),
    ("torchao", "w=int4/g32", put(f"{A}._weight_zero_point", at((0, 0), 9)), "a zero point lies outside"),
    ("torchao", "w=fp8/channel", put(f"{A}._weight_scale", torch.Tensor.bfloat16), "should hold float32 numbers"),
    ("torchao", "w=int4/g32", said(quant_type="int4_weight_only"), "quant_type should be an object"),
    ("modelopt", "NVFP4", said(quant_algo="FP8"), "config does not describe|group_size is 16, but FP8"),
    ("modelopt", "NVFP4", said(quant_algo="W4A8_AWQ"), "quant_algo should be one of 'fp8'"),
    ("modelopt", "FP8", said(quant_algo="MIXED_PRECISION"), "and 0 quantized_layers"),
    ("modelopt", "NVFP4", said(group_size=32), "group_size is 32, but NVFP4"),
    ("modelopt", "NVFP4", said(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is"),
    ("modelopt", "NVFP4", said(config_groups={"group_0": {"weights": {"num_bits": 8}}}), "says 8 bits in groups of 0"),
    ("modelopt", "NVFP4", said(bits=4), "has the key 'bits'"),
    ("modelopt", "NVFP4", put(f"{A}.weight_scale_2", lambda t: -t), "negative"),
    ("modelopt", "NVFP4", put(f"{A}.weight_scale_2", lambda t: t.reshape(1)), "config does not describe"),
    ("modelopt", "NVFP4", put(f"{A}.input_scale", lambda t: t * 0), "not a positive number"),
    ("modelopt", "NVFP4", renamed(f"{A}.weight_scale", f"{A}.weight_scalar"), "input_scale is stored, but no weight"),
    ("modelopt", "NVFP4", renamed(f"{A}.bias", f"{A}.pre_quant_scale"), "inputs of this layer are multiplied by it"),
    ("modelopt", "several", said(quantized_layers={A: {"quant_algo": "NVFP4"}}), "quantized_layers says nothing of"),
    ("modelopt", "FP8", put(f"{A}.weight_scale", at((), float("inf"))), "NaN or infinite"),
    ("modelopt", "w=int4/g32", said(group_size=64), "config does not describe"),
    ("modelopt", "w=int4/g32", said(group_size=33), "groups of 33 .* do not divide"),
    ("modelopt", "w=int4/g32", said(has_zero_point=True), "has_zero_point is True"),
    ("mlx", "w=uint4/g32/offset", said(bits=5), "config does not describe"),
    ("mlx", "w=uint4/g32/offset", said(bits=7), "bits should be one of 1, 2, 3"),
    ("mlx", "w=uint4/g32/offset", said(group_size=64), "config does not describe"),
    ("mlx", "w=uint4/g32/offset", said(mode="mxfp4"), "config does not describe|biases is stored beside"),
    ("mlx", "MXFP4A16", said(mode="affine"), "should hold floating-point numbers, found U8"),
    ("mlx", "w=uint4/g32/offset", said(bitz=4), "has the key 'bitz'"),
    ("mlx", "w=uint4/g32/offset", said(**{A: False}), f"{A} is not quantized"),
    ("mlx", "w=uint4/g32/offset", said(**{A: {"group_size": 32, "bits": 8}}), "config does not describe"),
    ("mlx", "w=uint4/g32/offset", said(**{"model.c": {"group_size": 32, "bits": 8}}), "model.c.scales is not stored"),
    (
        "mlx",
        "w=uint4/g32/offset",
        lambda config, _: config.update(quantization={"group_size": 64, "bits": 4}),
        "another under",
    ),
    ("mlx", "w=uint4/g32/offset", renamed(f"{A}.scales", f"{A}.scale"), "scales is missing"),
    ("mlx", "w=uint4/g32/offset", renamed(f"{A}.biases", f"{A}.biazes"), "found nothing"),
    ("mlx", "w=uint4/g32/offset", put(f"{A}.biases", at((0, 0), float("nan"))), "an offset is NaN"),
    ("mlx", "w=uint4/g32/offset", put(f"{A}.weight", lambda t: t.view(torch.int32)), "config does not describe"),
    ("hqq", "w=uint4/g32/asym", said(quant_config={"weight_quant_params": {"bits": 4}}), "has the key 'bits'"),
]


@pytest.mark.parametrize(
    ("layout", "scheme", "edit", "message"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)]
)
def test_what_contradicts_itself_is_refused(layout: str, scheme: str, edit: Edit, message: str, tmp_path: Path) -> None:
    config, tensors = made(layout, scheme, {n: (r, 128) for n, (r, _) in NAMES.items()})
    edit(config, tensors)
    with pytest.raises(FileFormatError, match=message) as caught:
        stored(tmp_path, config, tensors)
    assert str(caught.value).startswith(str(tmp_path)) or str(tmp_path) in str(caught.value)


def test_an_old_config_of_bitsandbytes_names_no_method(tmp_path: Path) -> None:
    config, tensors = made("bitsandbytes", "NF4", {A + ".weight": (64, 128)})
    del config["quantization_config"]["quant_method"]
    assert set(stored(tmp_path, config, tensors).placed) == {A + ".weight"}


def test_the_file_beside_config_json_speaks_for_it_or_agrees(tmp_path: Path) -> None:
    config, tensors = made("gptq", "w=int4/g32")
    beside = {k: v for k, v in config["quantization_config"].items() if k != "quant_method"}
    tmp_path.joinpath("quantize_config.json").write_text(json.dumps(beside))
    assert len(stored(tmp_path, config, tensors).placed) == 2
    said = config.pop("quantization_config")
    assert len(stored(tmp_path, config, tensors).placed) == 2
    with pytest.raises(FileFormatError, match=r"quantize_config\.json: says bits '4', and config\.json '8'"):
        stored(tmp_path, config | {"quantization_config": said | {"bits": 8}}, tensors)


def test_what_modelopt_says_beside_config_json_is_read_and_agrees(tmp_path: Path) -> None:
    """Older exports have no other description, and newer ones leave the size of groups to it."""
    config, tensors = made("modelopt", "w=int4/g32")
    said = config.pop("quantization_config")
    told = {"quant_algo": "W4A16_AWQ", "group_size": 32, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    beside = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": told}
    tmp_path.joinpath("hf_quant_config.json").write_text(json.dumps(beside))
    first = stored(tmp_path, config, tensors)
    short = {k: v for k, v in said.items() if k != "group_size"}
    assert first.placed == stored(tmp_path, config | {"quantization_config": short}, tensors).placed
    with pytest.raises(FileFormatError, match=r"hf_quant_config\.json: says group_size '32', and config\.json '64'"):
        stored(tmp_path, config | {"quantization_config": said | {"group_size": 64}}, tensors)
    tmp_path.joinpath("hf_quant_config.json").write_text('{"quantization": 4}')
    with pytest.raises(FileFormatError, match=r"hf_quant_config\.json: it\.quantization should be an object"):
        stored(tmp_path, config, tensors)


def test_a_head_that_is_quantized_is_said_to_be() -> None:
    placed = Placed("lm_head.weight", (64, 128), LAYOUTS["gptq"].fit(parse_scheme("w=int4/g32")))
    config = LAYOUTS["gptq"].config([placed], [])
    assert config["lm_head"] is True
    written = LAYOUTS["gptq"].write(placed, LayerValues(quantize_tensor(torch.randn(64, 128), placed.scheme.weights)))
    from tests.checkpoint.layouts.test_layouts import find

    assert find(LAYOUTS["gptq"], config, written) == [placed]
    with pytest.raises(FileFormatError, match="lm_head is false"):
        find(LAYOUTS["gptq"], config | {"lm_head": False}, written)


@pytest.mark.parametrize(
    ("layout", "schemes", "word"),
    [
        ("gptq", ["w=int4/g32", "w=int4/g32/asym"], "symmetric"),
        ("awq", ["w=int4/g32", "w=int4/g64"], "--group-size"),
        ("bitsandbytes", ["NF4", "FP4_BNB"], "one format"),
    ],
)  # fmt: skip
def test_layers_that_one_config_cannot_describe_are_refused_together(
    layout: str, schemes: list[str], word: str
) -> None:
    placed = [Placed(f"{i}.weight", (64, 128), LAYOUTS[layout].fit(parse_scheme(s))) for i, s in enumerate(schemes)]
    assert all(LAYOUTS[layout].refuse(p) is None for p in placed)
    reason = LAYOUTS[layout].together(placed)
    assert reason is not None and word in reason and reason.endswith(".")


@pytest.mark.parametrize("layout", ["gptq", "bitsandbytes"])
def test_a_weight_that_is_stored_turned_comes_back_turned(
    layout: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2 holds (in, out); the files of these layouts do not tell."""
    source = models("gpt2")
    plain = load_file(source / "model.safetensors")
    name = next(n for n in plain if n.endswith("c_fc.weight"))
    scheme = LAYOUTS[layout].fit(parse_scheme("w=int4/g32" if layout == "gptq" else "w=nf4/g32"))
    placed = Placed(name, tuple(plain[name].shape), scheme, kind="Conv1D", transposed=True)
    weight = quantize_tensor(plain[name].T.contiguous(), scheme.weights)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = LAYOUTS[layout].config([placed], [])
    tensors = {n: t for n, t in plain.items() if n != name} | LAYOUTS[layout].write(placed, LayerValues(weight))
    checkpoint = stored(tmp_path, config, tensors)
    assert checkpoint.placed[name] == placed
    assert torch.equal(checkpoint.dense(name), weight.dequantize().T)


@pytest.mark.parametrize(("layout", "scheme"), [("gptq", "w=int4/g32/asym"), ("awq", "w=int4/g32"), ("bitsandbytes", "w=nf4/g32")])  # fmt: skip
def test_a_model_is_quantized_into_it_and_runs(
    layout: str, scheme: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Scales get the layout's own type before any code is chosen, so that the files hold what was measured."""
    source = models("llama", torch.bfloat16)
    arrondi.quantize(source, scheme, out=tmp_path / "out", to=layout)
    config, tensors = (
        json.loads((tmp_path / "out/config.json").read_text()),
        load_file(tmp_path / "out/model.safetensors"),
    )
    plain = load_file(source / "model.safetensors")
    for path, weight in decoded(config, tensors).items():
        plain[f"{path}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    shutil.copytree(source, tmp_path / "plain")
    save_file({n: t.float() for n, t in plain.items()}, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, 2000, (1, 16))
    with torch.no_grad():
        found, expected = (arrondi.load(tmp_path / n)(ids).logits for n in ("out", "plain"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_says_why(models: Callable[..., Path], tmp_path: Path) -> None:
    for scheme, layout, message in (
        ("W4A16", "bitsandbytes", "bitsandbytes stores nf4 and fp4_bnb in blocks"),
        ("NF4", "gptq", "gptq stores int2, int3, int4, int8"),
        ("W8A16", "awq", "awq stores int4"),
        ("w=int4/g64", "awq", "one scheme for all layers"),
    ):
        with pytest.raises(SchemeError, match=message):
            arrondi.quantize(models("llama"), scheme, out=tmp_path / "no", to=layout)
    assert not (tmp_path / "no").exists()


# ── the packages themselves ───────────────────────────────────────────────────────────────────────────────────────────


def interpreters() -> list[str]:
    python = os.environ.get("ARRONDI_CHECKPOINTS", "")
    if not python:
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs ARRONDI_CHECKPOINTS, interpreters with the packages whose layouts are tested")
        pytest.skip("ARRONDI_CHECKPOINTS names no interpreter with gptqmodel, bitsandbytes, …")
    return python.split(os.pathsep)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files that the packages have made."""
    folder = tmp_path_factory.mktemp("packages")
    scripts = {"modelopt": "foreign_modelopt.py", "mlx": "foreign_mlx.py", "torch": "foreign_files.py"}
    for each in interpreters():
        found = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
        for name in subprocess.check_output([each, "-c", found, *scripts], text=True).split()[:1]:
            script = Path(__file__).with_name(scripts[name])
            done = subprocess.run([each, script, folder], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
    yield folder


@pytest.mark.peer
def test_files_of_the_packages_are_read_bit_by_bit(packages: Path) -> None:
    cases = sorted(packages.iterdir())
    assert len(cases) > 10
    for case in cases:
        checkpoint, expected = Checkpoint.open(case), load_file(case / "expected.safetensors")
        assert set(checkpoint.placed) == set(expected), case.name
        for name, weight in expected.items():
            ours = checkpoint.dense(name, weight.dtype)
            if case.name == "bitsandbytes-int8":  # which multiplies three numbers in two orders itself
                torch.testing.assert_close(ours, weight, rtol=2**-22, atol=0)
            else:
                assert torch.equal(ours, weight), f"{case.name}: {name}"


@pytest.mark.peer
def test_files_of_the_packages_are_written_again_byte_by_byte(packages: Path) -> None:
    for case in sorted(packages.iterdir()):
        checkpoint, tensors = Checkpoint.open(case), load_file(case / "model.safetensors")
        layout = checkpoint.layout
        assert layout is not None
        for name, placed in checkpoint.placed.items():
            if layout.refuse(placed) is not None:
                assert "double" not in case.name, case.name
                continue
            for part, value in layout.write(placed, checkpoint.layer(name)).items():
                both = value, tensors[part]
                same = torch.equal(*both) or torch.equal(*map(bytes_of, both))  # a zero point of -0 is that of 0
                assert value.dtype == tensors[part].dtype and same, f"{case.name}: {part}"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, because packed codes in the clothes of floating-point numbers may be NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


LOADED = {
    "gptq-sym": ("w=int4/g32", "gptq", None),
    "gptq-asym": ("w=int4/g32/asym", "gptq", None),
    "gptq-2": ("w=int2/g32", "gptq", None),
    "gptq-3": ("w=int3/g32/asym", "gptq", None),
    "gptq-8": ("w=int8/channel", "gptq", None),
    "gptq-some-kept": ("w=int4/g32", "gptq", ["lm_head", "re:.*down_proj"]),
    "gptq-one-kept": ("w=int4/g32", "gptq", ["lm_head", "model.layers.0.mlp.down_proj"]),
    "awq-sym": ("w=int4/g32", "awq", None),
    "awq-asym": ("w=int4/g32/asym", "awq", None),
    "awq-some-kept": ("w=int4/g32/asym", "awq", ["lm_head", "re:.*down_proj"]),
    "bitsandbytes-nf4": ("w=nf4/g32", "bitsandbytes", None),
    "bitsandbytes-some-kept": ("w=nf4/g32", "bitsandbytes", ["lm_head", "re:.*down_proj"]),
    "bitsandbytes-double": ("w=nf4/g32/s:(dynamic8/flat256/offset/o:(binary/tensor))", "bitsandbytes", None),
    "bitsandbytes-int8": ("W8A8", "bitsandbytes", None),
    "mxfp4-experts": ("MXFP4A16", "mxfp4", None),
    "torchao-int8": ("w=int8/channel", "torchao", None),
    "torchao-int4": ("w=int4/g32", "torchao", None),
    "torchao-int3-asym-some-kept": ("w=int3/g32/asym", "torchao", ["lm_head", "re:.*down_proj"]),
    "torchao-float8": ("w=fp8/channel", "torchao", None),
    "torchao-dynamic-int8": ("W8A8", "torchao", None),
    "torchao-8da4w-int8": ("w=int4/g32,a=int8/token/asym", "torchao", None),
    "auto-round-sym": ("w=int4/g32", "auto-round", None),
    "auto-round-asym": ("w=int4/g32/asym", "auto-round", None),
    "auto-round-some-kept": ("w=int4/g32", "auto-round", ["lm_head", "re:.*down_proj"]),
}
"""What transformers loads, by its verdicts: scheme, layout, what is kept. The last interpreter has auto-round, the first all else."""


@pytest.mark.peer
def test_transformers_loads_what_it_is_said_to_load(models: Callable[..., Path], tmp_path: Path) -> None:
    from tests.checkpoint.layouts.foreign_loads import IDS

    ours = {}
    for name, (scheme, layout, ignore) in LOADED.items():
        source = models("gpt-oss" if layout == "mxfp4" else "llama")
        report = arrondi.quantize(source, scheme, out=tmp_path / name, to=layout, ignore=ignore)
        assert report["readers"][1]["ok"] is True, report["readers"]
        with torch.no_grad():
            ours[name] = arrondi.load(tmp_path / name)(IDS).logits
    pythons, theirs = interpreters(), {}
    last = [n for n in LOADED if n.startswith("auto-round")]
    for python, some in ((pythons[0], [n for n in LOADED if n not in last]), (pythons[-1], last)):
        script = Path(__file__).with_name("foreign_loads.py")
        command = [python, script, tmp_path / "logits.safetensors", *(tmp_path / name for name in some)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        theirs |= load_file(tmp_path / "logits.safetensors")
    for name, logits in ours.items():
        bound = 0.05 if name.endswith("int8") else 0.02 if "bitsandbytes" in name else 0.002  # products in 16 bits
        assert (theirs[name] - logits).norm() < bound * logits.norm(), name
        if f"{name}/plain" in theirs and not name.endswith("int8"):
            torch.testing.assert_close(theirs[f"{name}/plain"], logits, rtol=1e-4, atol=1e-5)
