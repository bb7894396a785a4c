"""What a file or directory is that this program does not read, and what to do with it.

Owns: `what_file`, `what_directory` (not a model directory at all), `what_method` (a quantization of another tool), and
`unlisted` (quantized tensors in a directory whose config says nothing of them). Each gives the end of a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

_FILES: Final[Mapping[str, str]] = MappingProxyType({
    ".gguf": "a GGUF file, which llama.cpp runs. This program reads safetensors directories: give the original model",
    ".safetensors": "one safetensors file. A model is the directory that holds it, with config.json: give that directory",
    ".onnx": "an ONNX graph. This program reads safetensors directories: give the model that it was exported from",
    ".tflite": "a LiteRT file. This program reads safetensors directories: give the model that it was converted from",
    ".bin": "pickled weights, which can run code when loaded. Save the model with model.save_pretrained(DIR) and give DIR",
    ".pt": "pickled weights, which can run code when loaded. Save the model with model.save_pretrained(DIR) and give DIR",
    ".pth": "pickled weights, which can run code when loaded. Save the model with model.save_pretrained(DIR) and give DIR",
    ".ckpt": "pickled weights, which can run code when loaded. Save the model with model.save_pretrained(DIR) and give DIR",
})  # fmt: skip

_ORIGINAL: Final = "Give the original, unquantized model"
_METHODS: Final[Mapping[str, str]] = MappingProxyType({
    "gptq": "quantized by GPTQModel or AutoGPTQ (quant_method gptq)",
    "awq": "quantized by AutoAWQ (quant_method awq)",
    "bitsandbytes": "quantized by bitsandbytes",
    "fp8": "quantized to FP8 in the layout of DeepSeek and vLLM (quant_method fp8)",
    "fbgemm_fp8": "quantized to FP8 by FBGEMM",
    "mxfp4": "quantized to MXFP4 as GPT-OSS is (quant_method mxfp4)",
    "auto-round": "quantized by AutoRound",
    "intel/auto-round": "quantized by AutoRound",
    "hqq": "quantized by HQQ",
    "quanto": "quantized by Quanto",
    "torchao": "quantized by torchao",
    "modelopt": "quantized by NVIDIA ModelOpt",
    "aqlm": "quantized by AQLM",
    "vptq": "quantized by VPTQ",
    "spqr": "quantized by SpQR",
    "higgs": "quantized by HIGGS",
    "eetq": "quantized by EETQ",
    "bitnet": "a BitNet model in its packed form",
    "exl2": "quantized by ExLlamaV2",
    "exl3": "quantized by ExLlamaV3",
})  # fmt: skip

_COMPANIONS: Final = (
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx",
    ".weight_scale_2", ".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map", ".codes", "_blocks", "_scales",
)  # fmt: skip
"""How the tensors are called that quantizers store beside or instead of a weight."""


def what_file(path: Path) -> str | None:
    """What a file is that was given as a model."""
    return _FILES.get(path.suffix.lower())


def what_directory(path: Path) -> str | None:
    """What a directory is that has no safetensors weights or no config.json; None if there is nothing to say."""
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    if "adapter_config.json" in names:
        return (
            "a PEFT adapter, not a model. Merge it into its base model first "
            "(peft: model.merge_and_unload().save_pretrained(DIR)) and give DIR"
        )
    found = {Path(n).suffix.lower() for n in names}
    if ".gguf" in found:
        return "holds GGUF files, which llama.cpp runs. This program reads safetensors: give the original model"
    if "model_index.json" in names:
        return "a diffusers pipeline. Give the folder of one of its models, such as transformer/ or text_encoder/"
    pickles = [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        return (
            f"only pickled weights ({pickles[0]}), which can run code when loaded. Save the model as safetensors first: "
            "model.save_pretrained(DIR)"
        )
    for suffix, kind in ((".onnx", "ONNX graphs"), (".h5", "TensorFlow weights"), (".msgpack", "Flax weights"), (".npz", "NumPy arrays")):  # fmt: skip
        if suffix in found:
            return f"holds {kind}, not safetensors weights. Give the original model"
    return None


def what_method(config: object) -> str | None:
    """What another tool's `quantization_config` is."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method is None and isinstance(config, dict) and {"load_in_4bit", "load_in_8bit"} & config.keys():
        method = "bitsandbytes"
    known = _METHODS.get(method.lower()) if isinstance(method, str) else None
    return None if known is None else f"{known}, a layout that is not read here. {_ORIGINAL}"


def unlisted(path: Path, entries: Mapping[str, Any]) -> str | None:
    """What is quantized in a directory whose config.json has no `quantization_config`."""
    for file in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if (path / file).exists() and _companion(entries):
            return f"quantized by another tool, says {file}, in a layout that is not read here. {_ORIGINAL}"
    name = _companion(entries)
    if name is None:
        name = next((n for n, e in entries.items() if e.dtype.startswith("F8_")), None)
    if name is None:
        return None
    return (
        f"holds the quantized tensor {name}, but config.json has no quantization_config that says what it means. "
        f"Take config.json from where the weights come from, or give the original, unquantized model"
    )


def _companion(names: Iterable[str]) -> str | None:
    return next((n for n in names if n.endswith(_COMPANIONS)), None)
