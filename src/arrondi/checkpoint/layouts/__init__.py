"""Layouts: how a quantized layer is stored as named tensors.

Owns: the table `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from arrondi.checkpoint.layouts import (
    arrondi,
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    exl3,
    fp8,
    ggml,
    gptq,
    hqq,
    mlx,
    modelopt,
    mxfp4,
    onnx,
    torchao,
)
from arrondi.checkpoint.layouts.layout import Layout

LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType({
    "compressed-tensors": compressed_tensors.LAYOUT,
    "arrondi": arrondi.LAYOUT,
    "gptq": gptq.LAYOUT,
    "awq": awq.LAYOUT,
    "bitsandbytes": bitsandbytes.LAYOUT,
    "auto-round": auto_round.LAYOUT,
    "fp8": fp8.LAYOUT,
    "mxfp4": mxfp4.LAYOUT,
    "exl3": exl3.LAYOUT,
    "hqq": hqq.LAYOUT,
    "torchao": torchao.LAYOUT,
    "mlx": mlx.LAYOUT,
    "modelopt": modelopt.LAYOUT,
    "gguf": ggml.LAYOUT,
    "onnx": onnx.LAYOUT,
    "onnx-qdq": onnx.STANDARD,
})  # fmt: skip
"""Every storage layout by its `quant_method`."""

CHOSEN: Final = ("compressed-tensors", "arrondi")
"""What is chosen from where nobody names a layout, the most widely read first; the second holds every scheme."""

SYNONYMS: Final[Mapping[str, str]] = MappingProxyType({"intel/auto-round": "auto-round", "tflite": "onnx"})
"""Other words of `quant_method` → name of the layout."""

MARKS: Final[Mapping[str, str]] = MappingProxyType({".W_q": "hqq"})
"""Endings of tensors of layouts that describe themselves, so that some of their files have no `quantization_config` → name of the layout."""
