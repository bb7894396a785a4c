"""The class of every module of a model, for configs whose groups differ by class.

Owns: `module_classes`. Only a config with groups for several classes needs it; what is stored does not tell a linear layer from an
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from arrondi.checkpoint.containers.config import decode_floats


def module_classes(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Module path → names of its class and of those above it; empty if transformers cannot build the model."""
    import transformers

    plain = {k: v for k, v in decode_floats(dict(config)).items() if k != "quantization_config"}
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
