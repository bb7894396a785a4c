"""By which method a directory says that it is quantized.

Owns: `method_of`: the name of a layout, or another tool's word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from arrondi.checkpoint.containers.config import QUANTIZATION
from arrondi.checkpoint.layouts import MARKS, SYNONYMS


def method_of(config: Mapping[str, Any], names: Collection[str]) -> object:
    """What config.json calls the quantization, or what tells it where that gives no name; None: nothing does.

    Args:
        config: config.json.
        names: every stored tensor.
    """
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method is not None:
        return SYNONYMS.get(method, method) if isinstance(method, str) else method
    if isinstance(described, dict) and {"load_in_4bit", "load_in_8bit"} & described.keys():
        return "bitsandbytes"  # of old releases of transformers
    if any(isinstance(said := config.get(key), dict) and {"group_size", "bits"} <= said.keys() for key in QUANTIZATION):
        return "mlx"
    if described is None:
        return next((name for mark, name in MARKS.items() if any(n.endswith(mark) for n in names)), None)
    return None
