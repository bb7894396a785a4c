"""The layout of NVIDIA's ModelOpt, which TensorRT-LLM, vLLM and SGLang read.

Owns: `LAYOUT`. `kinds` are the algorithms that it names and the schemes that they are, `storage` is one weight as tensors, `config` the description
of all, read and written, `find` what a file holds.
"""

from __future__ import annotations

from typing import Final

from arrondi.checkpoint.layouts.layout import Layout, Placed
from arrondi.checkpoint.layouts.modelopt.config import config
from arrondi.checkpoint.layouts.modelopt.find import find
from arrondi.checkpoint.layouts.modelopt.kinds import kind_of
from arrondi.checkpoint.layouts.modelopt.storage import read_layer, refuse_shape, specs, write


def _refuse(placed: Placed) -> str | None:
    if placed.kind != "Linear" or placed.transposed or len(placed.shape) != 2 or not placed.name.endswith(".weight"):
        return (
            f"modelopt stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
        )
    if placed.indexed:
        return "modelopt has no scattered groups"
    if kind_of(placed.scheme) is None:
        return f"modelopt has no algorithm for {placed.scheme}"
    return refuse_shape(placed)


LAYOUT: Final = Layout(
    "modelopt", _refuse, specs, write, read_layer, config, find, lambda scheme: scheme.with_scale("float32")
)
