"""What is in a checkpoint: `inspect_model`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from arrondi.checkpoint import Checkpoint


def inspect_model(path: str | Path) -> dict[str, Any]:
    """Tensors, formats and sizes; every stored bit is counted.

    Returns:
        `bits_per_weight` of the quantized tensors (None if there are none), `model_bits_per_weight` of everything,
        `bytes`, `parameters`, `layout`, and `tensors` with name, shape, format, bytes and bits per weight of each.

    Raises:
        FileFormatError: not a model directory, or a layout that is not known.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    entries = checkpoint.folder.entries
    tensors: list[dict[str, Any]] = []
    for name, shape in checkpoint.names.items():
        placed = checkpoint.placed.get(name)
        if placed is not None and checkpoint.layout is not None:
            nbytes = sum(entries[stored].nbytes for stored, _, _ in checkpoint.layout.specs(placed))
            what = str(placed.scheme)
        else:
            nbytes, what = entries[name].nbytes, entries[name].dtype
        bits = 8 * nbytes / max(math.prod(shape), 1)
        tensors.append(
            {
                "name": name,
                "shape": list(shape),
                "format": what,
                "bytes": nbytes,
                "bits_per_weight": round(bits, 4),
                "quantized": placed is not None,
            }
        )
    weights = sum(math.prod(t["shape"]) for t in tensors)
    packed = [t for t in tensors if t["quantized"]]
    packed_weights = sum(math.prod(t["shape"]) for t in packed)
    total = sum(t["bytes"] for t in tensors)
    return {
        "path": str(checkpoint.folder.path),
        "architecture": (checkpoint.folder.config.get("architectures") or [None])[0],
        "layout": checkpoint.layout.name if checkpoint.layout else None,
        "parameters": weights,
        "quantized_parameters": packed_weights,
        "bytes": total,
        "bits_per_weight": round(8 * sum(t["bytes"] for t in packed) / packed_weights, 4) if packed_weights else None,
        "model_bits_per_weight": round(8 * total / max(weights, 1), 4),
        "tensors": tensors,
    }
