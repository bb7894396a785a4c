"""The class of every module of a model, where what is stored does not tell.

Owns: `module_classes`, for configs whose groups differ by class (nothing tells a linear layer from an embedding), and `conv1d_paths`, for
layouts that store all layers in one orientation.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from arrondi.checkpoint.containers.config import QUANTIZATION, decode_floats


def module_classes(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Module path → names of its class and of those above it; empty if transformers cannot build the model."""
    import transformers

    plain = {k: v for k, v in decode_floats(dict(config)).items() if k not in QUANTIZATION}
    kind = plain.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        return {}
    try:
        parsed = transformers.CONFIG_MAPPING[kind](**plain)
        found = [getattr(transformers, name, None) for name in plain.get("architectures") or []]
        cls = next((c for c in found if c is not None), None) or transformers.MODEL_MAPPING[type(parsed)]
        with torch.device("meta"):
            model = cls._from_config(parsed, dtype=torch.float32)  # its own may be float8: that of the first weight
    except Exception:  # whatever a class of transformers raises: its modules stay unknown
        return {}
    return {name: [c.__name__ for c in type(module).__mro__] for name, module in model.named_modules()}


def conv1d_paths(config: Mapping[str, Any]) -> frozenset[str]:
    """Paths of the modules that hold their weight as (in, out): transformers' Conv1D, of models that have it."""
    import transformers

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        return frozenset()
    module = transformers.CONFIG_MAPPING[kind].__module__.replace("configuration_", "modeling_")
    try:
        if not hasattr(importlib.import_module(module), "Conv1D"):
            return frozenset()
    except ImportError:
        return frozenset()
    return frozenset(path for path, classes in module_classes(config).items() if "Conv1D" in classes)


def is_conv1d(path: str, paths: frozenset[str]) -> bool:
    """Whether a stored layer is one of those modules; a file may leave the name of the outer module away."""
    return path in paths or any(p.endswith(f".{path}") for p in paths)
