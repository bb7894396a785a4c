"""An ONNX file as a model directory: its weights by the names of the modules that they belong to, and the config that lies beside it.

Owns: `is_onnx`, `graph_in`, `view_of` and `View`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arrondi.checkpoint.containers.graph_weights import directory_of
from arrondi.checkpoint.containers.json_file import read_json
from arrondi.checkpoint.containers.onnx.header import Model, read_model
from arrondi.checkpoint.containers.onnx.weights import Found, find_weights
from arrondi.checkpoint.containers.tensor_file import Entry
from arrondi.errors import FileFormatError

SUFFIX: Final = ".onnx"


@dataclass(frozen=True)
class View:
    """What a model directory would hold.

    Attributes:
        model: what the file says.
        found: its weights.
        config: config.json from beside the file or from the folder above, if there is one; its quantization_config says how packed weights lie.
        entries: tensors by the names of weights.
        home: the folder of that config, or the file's own.
    """

    model: Model
    found: Found
    config: dict[str, Any]
    entries: dict[str, Entry]
    home: Path


def is_onnx(path: Path) -> bool:
    """Whether a file is called as an ONNX file is."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def graph_in(path: Path) -> Path:
    """The ONNX file of a folder that holds one, and no safetensors files, as its model; any other path stays what it is."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return path
    graphs = [p for p in path.iterdir() if is_onnx(p)]
    return graphs[0] if len(graphs) == 1 else path


def view_of(path: Path) -> View:
    """What an ONNX file would be as a directory.

    Raises:
        FileFormatError: a file that lies, or weights in a form that is not known here.
    """
    model = read_model(path)
    found = find_weights(model)
    said, entries = directory_of("onnx", found.packed, found.plain)
    if not entries:
        raise FileFormatError(f"{path}: holds no weight. Give the file of a network.")
    home = config_beside(path) or path.parent
    config = read_json(home / "config.json", "Download it again.") if (home / "config.json").is_file() else {}
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    return View(model, found, {**config, **({"quantization_config": said} if said else {})}, entries, home)


def config_beside(path: Path) -> Path | None:
    """The folder of the config.json that goes with a file: its own, or the one above where the file's is `onnx`."""
    folders = [path.parent, *([path.parent.parent] if path.parent.name == "onnx" else [])]
    return next((f for f in folders if (f / "config.json").is_file()), None)
