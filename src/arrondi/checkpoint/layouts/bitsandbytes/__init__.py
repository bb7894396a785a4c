"""The layout of bitsandbytes, which transformers (with bitsandbytes), peft, vLLM and SGLang read.

Owns: `LAYOUT`. `blocks` is a weight of 4 bits as tensors, `rows` one of 8 bits (LLM.int8), `config` the description of all, read and
written, `find` what a file holds.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.bitsandbytes import blocks, rows
from arrondi.checkpoint.layouts.bitsandbytes.config import config, together
from arrondi.checkpoint.layouts.bitsandbytes.find import find
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, Placed, Reader


def _refuse(placed: Placed) -> str | None:
    if placed.kind not in ("Linear", "Conv1D") or len(placed.shape) != 2 or not placed.name.endswith(".weight"):
        return f"bitsandbytes stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
    if placed.indexed:
        return "bitsandbytes has no scattered groups"
    if placed.scheme.weights.format.kind == "integer":
        return rows.refuse(placed)
    return blocks.refuse(placed)


def _specs(placed: Placed) -> list[TensorSpec]:
    return rows.specs(placed) if rows.has(placed) else blocks.specs(placed)


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    return rows.write(placed, values) if rows.has(placed) else blocks.write(placed, values)


def _read(placed: Placed, read: Reader) -> LayerValues:
    return rows.read_layer(placed, read) if rows.has(placed) else blocks.read_layer(placed, read)


LAYOUT: Final = Layout(
    "bitsandbytes", _refuse, _specs, _write, _read, config, find, lambda scheme: scheme.with_scale("float32"), together
)
