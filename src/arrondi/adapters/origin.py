"""What an adapter was trained on: `ORIGIN`, a small file beside it with a digest of every packed layer that it changes.

Owns: `digest`, `note_origin`, `check_origin`, `write_origin` and `read_origin`. An adapter fits the codes under it; with others it does something else, and nothing in
peft's own files says which they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.errors import FileFormatError
from arrondi.nn import QEmbedding, QLinear

ORIGIN: Final = "arrondi_base.json"
_CONFIG: Final = "adapter_config.json"


def digest(weight: torch.Tensor) -> str:
    """SHA-256 of the numbers that packed codes mean (out, in): the same whoever packed them, and for which type."""
    return hashlib.sha256(weight.float().contiguous().numpy(force=True).tobytes()).hexdigest()


def note_origin(model: Any, directory: str | Path) -> None:
    """Write the file beside every adapter that a peft model has just saved.

    Args:
        model: a PeftModel; without packed layers under adapters there is nothing to write.
        directory: where it was saved; other adapters than "default" lie in folders of their own.
    """
    base = getattr(model, "base_model", None)
    inner = getattr(base, "model", base)
    if inner is None:
        return
    packed = {
        name: digest(layer.base_layer.unpack().dequantize())
        for name, layer in inner.named_modules()
        if isinstance(getattr(layer, "base_layer", None), (QLinear, QEmbedding))
    }
    for config in [*Path(directory).glob(_CONFIG), *Path(directory).glob(f"*/{_CONFIG}")] if packed else []:
        write_origin(config.parent, packed)


def check_origin(model: Any, directory: str | Path, subfolder: str | None = None) -> None:
    """Refuse an adapter for other codes before a peft model loads it. Ordinary layers take every adapter, as in plain peft.

    Args:
        model: a PeftModel over a loaded model.
        directory: of the adapter; a name on the Hub is not looked at.

    Raises:
        FileFormatError: a packed layer holds other codes than those that the adapter was made for.
    """
    base = getattr(model, "base_model", None)
    inner = getattr(base, "model", base)
    folder = Path(directory, subfolder or "")
    layers = dict(inner.named_modules()) if inner is not None else {}
    for name, wanted in read_origin(folder).items():
        layer = layers.get(name)
        layer = getattr(layer, "base_layer", layer)
        if isinstance(layer, (QLinear, QEmbedding)) and digest(layer.unpack().dequantize()) != wanted:
            raise FileFormatError(
                f"{folder}: was trained on other codes than this model holds ({name} differs). Load the base that it was trained on, or take {ORIGIN} out of the adapter to use it all the same."
            )


def write_origin(directory: Path, layers: Mapping[str, str], **facts: Any) -> None:
    """Write the file: module → digest, and what else is to be known."""
    text = json.dumps({"layers": dict(layers), **facts}, indent=1, sort_keys=True)
    (directory / ORIGIN).write_text(text + "\n", encoding="utf-8")


def read_origin(directory: Path) -> dict[str, str]:
    """Module → digest; empty where nothing is known.

    Raises:
        FileFormatError: the file is there and says something else.
    """
    path = directory / ORIGIN
    if not path.is_file():
        return {}
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
    except (ValueError, KeyError, TypeError):
        layers = None
    if not isinstance(layers, dict) or not all(isinstance(d, str) for d in layers.values()):
        raise FileFormatError(
            f"{path}: it lists no layers with their digests. Save the adapter again, or remove the file."
        )
    return layers
