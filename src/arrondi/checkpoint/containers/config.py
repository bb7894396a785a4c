"""config.json and generation_config.json: the facts that are checked before any model is built from them.

Owns: `QUANTIZATION`, `check_config`, `check_generation`, and `decode_floats`, which reads infinities as transformers 5 writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.json_file import read_json
from arrondi.errors import FileFormatError

_MOST_LAYERS: Final = 100_000
"""No model has as many; a skeleton of more would take hours to build."""

_COUNTS: Final = frozenset({
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_encoder_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "n_routed_experts",
})  # fmt: skip
"""Keys of whole numbers that count something: negative ones mean nothing."""

_LARGEST: Final = 2**53
"""Whole numbers beyond this are no size of anything, and do not survive JSON readers that use doubles."""

QUANTIZATION: Final = ("quantization_config", "quantization")
"""Keys of what is said of a quantization; the second is that of MLX."""

_SPECIAL: Final = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config.json whose basic facts cannot be.

    Raises:
        FileFormatError: architectures that are no list of words, a count that is negative, fractional or enormous.
    """
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise FileFormatError(
            f"{path}: architectures should be a list of class names, found {_short(names)}. Take config.json from the original model."
        )
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise FileFormatError(
            f"{path}: model_type should be a word, found {_short(kind)}. Take config.json from the original model."
        )
    for key, value in _numbers(config):
        layers = key.endswith("layers") or key == "n_layer"
        if (
            abs(value) >= _LARGEST
            or (layers and value > _MOST_LAYERS)
            or (key in _COUNTS and (value < 0 or value != int(value)))
        ):
            raise FileFormatError(f"{path}: {key} cannot be {_short(value)}. Take config.json from the original model.")


def check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that is no object; there need not be one.

    Raises:
        FileFormatError: it is there, and is not a JSON object.
    """
    path = folder / "generation_config.json"
    if path.exists():
        read_json(path, "Remove it, or take it from the original model.")


def decode_floats(value: Any) -> Any:
    """A JSON document in which `{"__float__": "Infinity"}` is a number, as transformers 5 reads it.

    >>> decode_floats({"limit": [0.0, {"__float__": "Infinity"}]})
    {'limit': [0.0, inf]}
    """
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _SPECIAL:
            return _SPECIAL[tag]
        return {k: decode_floats(v) for k, v in value.items()}
    return [decode_floats(v) for v in value] if isinstance(value, list) else value


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every finite number with its key, also of the configs of parts (`text_config`, `vision_config`)."""
    for key, value in config.items():
        if key in QUANTIZATION:
            continue
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield str(key), value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
