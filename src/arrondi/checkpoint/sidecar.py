"""What other tools say of a quantized model beside its config.json, or beside the tensors in its files.

Owns: `with_sidecar`. AutoGPTQ and GPTQModel write quantize_config.json, at first alone, then as a copy of config.json's
`quantization_config`; ModelOpt writes hf_quant_config.json. Where config.json says nothing, theirs is taken; where both speak, they must not
contradict each other. torchao keeps the classes of tensors in the metadata of the safetensors files, which becomes the key "metadata" of its
`quantization_config`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.checkpoint.containers.tensor_file import read_metadata
from arrondi.checkpoint.layouts.modelopt.config import of_file
from arrondi.errors import FileFormatError

_GPTQ: Final = "quantize_config.json"
_MODELOPT: Final = "hf_quant_config.json"
_SAME: Final = ("bits", "group_size", "sym", "checkpoint_format", "quant_algo")
"""Keys that decide what the numbers mean."""


def with_sidecar(folder: ModelDir) -> ModelDir:
    """The same directory, whose config says what the file beside it says.

    Raises:
        FileFormatError: the two contradict each other.
    """
    own = folder.config.get("quantization_config")
    if isinstance(own, dict) and own.get("quant_method") == "torchao":
        return _with_metadata(folder, own)
    if own is None or (isinstance(own, dict) and own.get("quant_method") == "modelopt"):
        folder = _with_modelopt(folder, own)
        own = folder.config.get("quantization_config")
    path = folder.path / _GPTQ
    if not path.is_file() or not any(n.endswith(".qweight") for n in folder.entries):
        return folder
    beside = read_json(path, "Download it again.")
    if own is None:
        told = {"quant_method": "gptq"} | beside
        return replace(folder, config={**folder.config, "quantization_config": told})
    if isinstance(own, dict):
        _check_same(path, own, beside)
    return folder


def _with_modelopt(folder: ModelDir, own: dict[str, Any] | None) -> ModelDir:
    """The file beside says the size of groups, which config.json may leave out."""
    path = folder.path / _MODELOPT
    if not path.is_file() or not any(n.endswith(".weight_scale") for n in folder.entries):
        return folder
    try:
        told = of_file(read_json(path, "Download it again."))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if own is not None:
        _check_same(path, own, told)
    return replace(folder, config={**folder.config, "quantization_config": {**told, **(own or {})}})


def _with_metadata(folder: ModelDir, own: dict[str, Any]) -> ModelDir:
    if "metadata" in own:
        raise FileFormatError(
            f"{folder.path / 'config.json'}: quantization_config has the key 'metadata', which is not known here."
        )
    words: dict[str, str] = {}
    for path in sorted({e.path for e in folder.entries.values()}):
        for key, word in read_metadata(path).items():
            if words.setdefault(key, word) != word:
                raise FileFormatError(
                    f"{path}: says another {key[:60]!r} than the files before it. Save the model again."
                )
    return replace(folder, config={**folder.config, "quantization_config": {**own, "metadata": words}})


def _check_same(path: Path, own: dict[str, Any], beside: dict[str, Any]) -> None:
    for key in _SAME:
        if key in own and key in beside and own[key] != beside[key]:
            raise FileFormatError(
                f"{path}: says {key} {str(beside[key])[:40]!r}, and config.json {str(own[key])[:40]!r}. Remove the one that is wrong."
            )
