"""Weights of graphs: `linear` and `blocks` are the forms in which their codes lie, `layer` the layouts made of them.

Owns: `LAYOUT` (`onnx`) and `STANDARD` (`onnx-qdq`). The weights of TFLite files are those of the first.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from arrondi.checkpoint.layouts.layout import Layout
from arrondi.checkpoint.layouts.onnx import layer

LAYOUT: Final = Layout("onnx", layer.refuse, layer.specs, layer.write, layer.read, layer.config, layer.find)
STANDARD: Final = Layout(
    "onnx-qdq",
    partial(layer.refuse, standard=True),
    partial(layer.specs, standard=True),
    partial(layer.write, standard=True),
    partial(layer.read, standard=True),
    partial(layer.config, standard=True),
    partial(layer.find, standard=True),
)
