"""What a file or directory is that this program does not read, and what to do with it.

Owns: `what_file`, `what_directory` (not a model directory at all), `what_method` (a quantization of another tool), and
`unlisted` (quantized tensors in a directory whose config says nothing of them). Each gives the end of a sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from arrondi.checkpoint.containers.disk import WORK

ALLOW: Final = (
    "add --allow-torch-load, which loads tensors and runs nothing (in Python: with arrondi.allow_torch_load())"
)
_PICKLED: Final = f"pickled weights, which can run code when loaded. Save the model with model.save_pretrained(DIR) and give DIR, or {ALLOW}"
_FILES: Final[Mapping[str, str]] = MappingProxyType({
    ".gguf": "a GGUF file, which llama.cpp runs. This program reads safetensors directories: give the original model",
    ".safetensors": "one safetensors file. A model is the directory that holds it, with config.json: give that directory",
    ".tflite": "called a TFLite file, and does not begin as one. Download it again",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _PICKLED),
})  # fmt: skip

_ORIGINAL: Final = "Give the original, unquantized model"
_NOT_READ: Final = "{}, a layout that is not read here. " + _ORIGINAL
_OTHER_WEIGHTS: Final[Mapping[str, str]] = MappingProxyType({
    ".h5": "TensorFlow weights", ".pb": "TensorFlow weights", ".msgpack": "Flax weights", ".npz": "NumPy arrays",
})  # fmt: skip
_METHODS: Final[Mapping[str, str]] = MappingProxyType({
    "fbgemm_fp8": "quantized to FP8 by FBGEMM",
    "quanto": "quantized by Quanto",
    "quark": "quantized by AMD Quark",
    "fouroversix": "quantized by fouroversix",
    "sinq": "quantized by SINQ",
    "fp_quant": "quantized by FP-Quant",
    "aqlm": "quantized by AQLM",
    "vptq": "quantized by VPTQ",
    "spqr": "quantized by SpQR",
    "higgs": "quantized by HIGGS",
    "eetq": "quantized by EETQ",
    "bitnet": "a BitNet model in its packed form",
    "exl2": "quantized by ExLlamaV2",
})  # fmt: skip

_COMPANIONS: Final = (
    ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx",
    ".weight_scale_2", ".qweight", ".qzeros", ".g_idx", ".SCB", ".absmax", ".quant_map", ".codes", "_blocks", "_scales", ".scales", ".W_q",
    ".trellis", ".suh", ".svh",
)  # fmt: skip
"""How the tensors are called that quantizers store beside or instead of a weight."""


def what_file(path: Path) -> str | None:
    """What a file is that was given as a model."""
    return _FILES.get(path.suffix.lower())


def what_directory(path: Path) -> str:
    """What a directory is that has no safetensors weights or no config.json."""
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    found = {Path(n).suffix.lower() for n in names}
    lost = sorted(p.name for p in path.iterdir() if p.is_symlink() and not p.exists())
    if lost:
        return f"{lost[0]} is a link to a file that is not there. Download the model again"
    if "config.json" not in names and (path / WORK).is_dir():
        return "a run that has not ended yet. Run its command again, which completes it"
    if "adapter_config.json" in names:
        return (
            "a PEFT adapter, not a model. Merge it into its base model first "
            "(peft: model.merge_and_unload().save_pretrained(DIR)) and give DIR"
        )
    if ".gguf" in found:
        return "holds GGUF files, which llama.cpp runs. This program reads safetensors: give the original model"
    if "model_index.json" in names:
        return "a diffusers pipeline. Give the folder of one of its models, such as transformer/ or text_encoder/"
    return _inner(path) or _other_weights(names, found) or _incomplete(names, found)


def _inner(path: Path) -> str | None:
    """Folders that are models themselves: of sentence-transformers, of a list of checkpoints."""
    inner = sorted(p.parent.name for p in path.glob("*/config.json") if any(p.parent.glob("*.safetensors")))
    return (
        f"the model is not here but in {' or '.join(f'{name}/' for name in inner[:3])}. Give that folder"
        if inner
        else None
    )


def _other_weights(names: Sequence[str], suffixes: Collection[str]) -> str | None:
    pickles = [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        if "qmodel.pt" in names:
            return (
                "HQQ's own pickle (qmodel.pt), which can run code when loaded. Save it as safetensors with hqq: "
                "AutoHQQHFModel.save_to_safetensors(model, DIR)"
            )
        return (
            f"only pickled weights ({pickles[0]}), which can run code when loaded. Save the model as safetensors first "
            f"(model.save_pretrained(DIR)), or {ALLOW}"
        )
    graphs = [n for n in names if n.endswith(".onnx")]
    if graphs:
        return f"holds ONNX graphs, not safetensors weights. Give one of them, such as {graphs[0]}"
    for suffix, kind in _OTHER_WEIGHTS.items():
        if suffix in suffixes:
            return f"holds {kind}, not safetensors weights. Give the original model"
    return None


def _incomplete(names: Sequence[str], suffixes: Collection[str]) -> str:
    if "config.json" in names:
        return "no *.safetensors file. Give a model directory that holds its weights"
    if ".safetensors" in suffixes:
        return "has safetensors files but no config.json. Copy the model's config.json there"
    what = "no config.json and no safetensors files" if names else "an empty directory, or one of folders alone"
    return f"{what}. Give a directory that holds config.json and safetensors files"


def what_method(config: Mapping[str, Any]) -> str | None:
    """What the config.json of another tool's quantized model says; None where nothing is quantized or the layout is ours.

    The layouts that are read here are looked up by the caller: `quant_method` in `LAYOUTS`.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        return "config.json has a quantization_config that is not an object. Download it again"
    method = found.get("quant_method")
    if method is None:
        return _NOT_READ.format("config.json has a quantization_config without quant_method")
    known = _METHODS.get(method.lower()) if isinstance(method, str) else None
    return _NOT_READ.format(known or f"quantized by another tool (quant_method {str(method)[:60]!r})")


def unlisted(path: Path, entries: Mapping[str, Any]) -> str | None:
    """What is quantized in a directory whose config.json has no `quantization_config`."""
    for file in ("quant_config.json", "hf_quant_config.json"):
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
