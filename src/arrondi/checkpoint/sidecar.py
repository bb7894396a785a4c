"""What other tools say of a quantized model beside its config.json.

Owns: `with_sidecar`. AutoGPTQ and GPTQModel write quantize_config.json, at first alone, then as a copy of config.json's
`quantization_config`; ModelOpt writes hf_quant_config.json. Where config.json says nothing, theirs is taken; where both speak, they must not
contradict each other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.errors import FileFormatError

_GPTQ: Final = "quantize_config.json"
_SAME: Final = ("bits", "group_size", "sym", "checkpoint_format")
"""Keys that decide what the numbers mean."""


def with_sidecar(folder: ModelDir) -> ModelDir:
    """The same directory, whose config says what the file beside it says.

    Raises:
        FileFormatError: the two contradict each other.
    """
    path = folder.path / _GPTQ
    if not path.is_file() or not any(n.endswith(".qweight") for n in folder.entries):
        return folder
    beside = read_json(path, "Download it again.")
    own = folder.config.get("quantization_config")
    if own is None:
        told = {"quant_method": "gptq"} | beside
        return replace(folder, config={**folder.config, "quantization_config": told})
    if isinstance(own, dict):
        _check_same(path, own, beside)
    return folder


def _check_same(path: Path, own: dict[str, Any], beside: dict[str, Any]) -> None:
    for key in _SAME:
        if key in own and key in beside and own[key] != beside[key]:
            raise FileFormatError(
                f"{path}: says {key} {str(beside[key])[:40]!r}, and config.json {str(own[key])[:40]!r}. Remove the one that is wrong."
            )
