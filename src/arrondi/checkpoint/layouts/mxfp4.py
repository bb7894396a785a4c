"""Experts in MXFP4 as gpt-oss stores them (quant_method mxfp4).

Owns: `LAYOUT`. Of a stack of experts X (E, n, m), n inputs and m outputs:

    X_blocks   uint8 (E, m, n/32, 16)   two codes a byte, the first in the low half
    X_scales   uint8 (E, m, n/32)       the exponent of each block, + 127

Everything but experts stays as it is.

Source: transformers 5.24, `integrations/mxfp4.py`; OCP Microscaling Formats 1.0, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.beside import check_beside, shape_of
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Names, Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, PerGroup, Scheme
from arrondi.tensor.packing import pack, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_scale, store_scale

_BLOCK: Final = 32
_SCHEME: Final = LayerScheme(Scheme(FORMATS["fp4_e2m1"], PerGroup(_BLOCK), scale="e8m0"))


def _refuse(placed: Placed) -> str | None:
    if len(placed.shape) != 3 or not placed.transposed:
        return f"mxfp4 stores stacks of experts (experts, inputs, outputs), and this has the shape {placed.shape}"
    if placed.scheme != _SCHEME or placed.indexed:
        return f"mxfp4 stores {_SCHEME}, not {placed.scheme}"
    if placed.shape[1] % _BLOCK:
        return f"mxfp4 has no shorter last block: {_BLOCK} does not divide {placed.shape[1]}"
    return None


def _specs(placed: Placed) -> list[TensorSpec]:
    experts, columns, rows = placed.shape
    blocks = (experts, rows, columns // _BLOCK)
    return [
        (f"{placed.name}_blocks", torch.uint8, (*blocks, _BLOCK // 2)),
        (f"{placed.name}_scales", torch.uint8, blocks),
    ]


def _write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    parts = (pack(values.weight.codes, 4), store_scale(values.weight.real_scale, "e8m0"))
    return {name: part.reshape(shape) for (name, _, shape), part in zip(_specs(placed), parts, strict=True)}


def _read(placed: Placed, read: Reader) -> LayerValues:
    rows, columns = placed.matrix_shape
    codes = unpack(read(f"{placed.name}_blocks").reshape(rows, -1), 4, columns)
    scale = load_scale(read(f"{placed.name}_scales")).reshape(rows, -1)
    return LayerValues(checked(placed.name, QTensor(codes, scale, None, None, placed.scheme.weights)))


def _config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "modules_to_not_convert": sorted(set(kept))}


def _find(config: Mapping[str, Any], names: Names, read: Reader) -> list[Placed]:
    claims = Claims(config["quantization_config"], "quantization_config")
    claims.only("quant_method", "mxfp4")
    claims.words("modules_to_not_convert")  # the stored tensors say it
    claims.remarks(["dequantize"])
    claims.done()
    placed = []
    for name in names:
        stem, _, ending = name.rpartition("_")
        if ending not in ("blocks", "scales") or names[name][0] != "U8":
            continue
        other = "scales" if ending == "blocks" else "blocks"
        if f"{stem}_{other}" not in names:
            raise FileFormatError(f"{stem}_{other} is missing, though {name} is stored.")
        if ending == "scales":
            continue
        experts, rows, blocks, half = shape_of(names, name, 4)
        if half != _BLOCK // 2:
            raise FileFormatError(f"{name} should have blocks of {_BLOCK // 2} bytes, found {half}.")
        placed.append(Placed(stem, (experts, blocks * _BLOCK, rows), _SCHEME, transposed=True))
    check_beside(placed, [s for p in placed for s in _specs(p)], names)
    return placed


LAYOUT: Final = Layout("mxfp4", _refuse, _specs, _write, _read, _config, _find)
