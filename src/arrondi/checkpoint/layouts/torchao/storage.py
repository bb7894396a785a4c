"""One layer as torchao stores it.

Owns: `fit`, `refuse`, `specs`, `write`, `read_layer`, `kind_of`, `block_of` and `granularity_of`. Of a weight P.weight (m outputs, n inputs) in blocks of
a × b numbers:

    P._weight_qdata        int8, float8 (m, n)     codes, one a byte
    P._weight_scale        float (m/a, n/b)        float32 but of `IntxUnpackedToInt8Tensor`
    P._weight_zero_point   int8 (m/a, n/b)         of integers; 0 in every place where they are symmetric

`Placed.storage` names the class of a tensor that is not the usual one for its scheme, "-" after it where it has no zero points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.checkpoint.layouts.torchao.notes import FLOAT8, INT8, INTX
from arrondi.formats import (
    FORMATS,
    Granularity,
    LayerScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    scale_shape,
    tile_shape,
)
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED

_F8: Final = {FORMATS["fp8_e4m3"]: torch.float8_e4m3fn, FORMATS["fp8_e5m2"]: torch.float8_e5m2}
_INTS: Final = tuple(FORMATS[f"int{b}"] for b in range(2, 9))
_INPUTS: Final = {INT8: ("int8",), FLOAT8: ("fp8_e4m3", "fp8_e5m2")}


def kind_of(placed: Placed) -> str:
    """The class that holds a layer: of int8 with zero points the one whose products do not leave them out."""
    if placed.storage:
        return placed.storage.removesuffix("-")
    weights = placed.scheme.weights
    if weights.format in _F8:
        return FLOAT8
    return INT8 if weights.format.bits == 8 and weights.scale == "float32" and weights.symmetric else INTX


def usual(placed: Placed, kind: str, zeros: bool) -> Placed:
    """The layer with a word of `storage` where its class is not the usual one."""
    plain = replace(placed, storage="")
    return (
        plain
        if (kind_of(plain), kind != FLOAT8) == (kind, zeros)
        else replace(placed, storage=kind + "-" * (not zeros))
    )


def _zeros(placed: Placed) -> bool:
    return kind_of(placed) != FLOAT8 and not placed.storage.endswith("-")


def fit(scheme: LayerScheme) -> LayerScheme:
    """Scales of eight bits are float32; of others they may have 16 bits."""
    return scheme.with_scale("float32") if scheme.weights.format.bits == 8 else scheme


def refuse(placed: Placed) -> str | None:
    """Why a layer cannot be stored, as the end of a sentence; None if it can."""
    scheme, weights = placed.scheme, placed.scheme.weights
    if placed.kind != "Linear" or len(placed.shape) != 2 or placed.transposed or not placed.name.endswith(".weight"):
        return (
            f"torchao stores the weights of linear layers, and this is of kind {placed.kind} and shape {placed.shape}"
        )
    if weights.format not in (*_INTS, *_F8) or weights.zero_point == "float" or weights.apart or placed.indexed:
        return f"torchao stores int2 … int8 with or without zero points, and fp8, not {weights}"
    if weights.scale not in STORED or weights.scale == "e8m0" or (weights.format in _F8 and weights.scale != "float32"):
        return f"torchao has plain scales, and float32 ones of fp8, not {weights}"
    if not isinstance(weights.granularity, PerGroup | PerTensor | PerBlock) and weights.granularity != PerChannel():
        return f"torchao has scales of groups, blocks, outputs or a tensor, not {weights}"
    match weights.granularity:
        case PerGroup(columns):
            block = (1, columns)
        case PerBlock(rows, columns):
            block = (rows, columns)
        case _:
            block = (1, 1)
    if any(n % size for n, size in zip(placed.matrix_shape, block, strict=True)):
        return f"torchao has no shorter last block: {block[0]} × {block[1]} do not divide {placed.matrix_shape}"
    if (scheme.outputs, scheme.kv) != (None, None):
        return "torchao rounds no outputs or caches"
    return _refuse_inputs(placed)


def _refuse_inputs(placed: Placed) -> str | None:
    inputs, kind = placed.scheme.inputs, kind_of(placed)
    if inputs is None:
        return None
    rounded, plain = inputs.scheme, inputs.dynamic is True and not inputs.spread and inputs.outliers is None
    if not plain or rounded.scale != "float32" or not isinstance(rounded.granularity, PerToken | PerTensor):
        return f"torchao rounds inputs by token or by tensor as they come, not by {inputs}"
    if kind == INTX and (rounded.format, rounded.granularity, rounded.zero_point) == (
        FORMATS["int8"],
        PerToken(),
        "integer",
    ):
        return None
    if kind == INT8 and isinstance(placed.scheme.weights.granularity, PerGroup | PerBlock):
        return f"torchao rounds the inputs of int8 weights whose scales belong to outputs or to a tensor, not of {placed.scheme.weights}"
    if kind == INTX or rounded.format.name not in _INPUTS[kind] or rounded.zero_point == "float":
        return f"torchao rounds the inputs of such weights to {'int8/token/asym' if kind == INTX else ' or '.join(_INPUTS[kind])}, not to {inputs}"
    return None


def block_of(weights: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = tile_shape(weights.granularity, shape)
    return rows, columns


def granularity_of(block: tuple[int, int], shape: tuple[int, int]) -> Granularity:
    """The inverse of `block_of`; blocks have to divide the shape."""
    if block == shape:
        return PerTensor()
    if block[0] > 1:
        return PerBlock(*block)
    return PerChannel() if block[1] == shape[1] else PerGroup(block[1])


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    stem, weights = f"{placed.name.removesuffix('.weight')}._weight_", placed.scheme.weights
    grid = scale_shape(weights.granularity, placed.matrix_shape)
    found: list[TensorSpec] = [
        (f"{stem}qdata", _F8.get(weights.format, torch.int8), placed.shape),
        (f"{stem}scale", STORED[str(weights.scale)], grid),
    ]
    return [*found, (f"{stem}zero_point", torch.int8, grid)] if _zeros(placed) else found


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    stem, q = f"{placed.name.removesuffix('.weight')}._weight_", values.weight
    tensors = {
        f"{stem}qdata": q.codes.view(_F8.get(q.scheme.format, torch.int8)),
        f"{stem}scale": q.real_scale.to(STORED[str(q.scheme.scale)]),
    }
    if _zeros(placed):
        zero = torch.zeros_like(q.real_scale) if q.zero_point is None else q.zero_point
        tensors[f"{stem}zero_point"] = zero.to(torch.int8)
    return tensors


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    stem, weights = f"{placed.name.removesuffix('.weight')}._weight_", placed.scheme.weights
    codes = read(f"{stem}qdata")
    codes = codes.view(torch.uint8) if weights.format in _F8 else codes
    zero = read(f"{stem}zero_point").int() if weights.zero_point == "integer" else None
    return LayerValues(checked(placed.name, QTensor(codes, read(f"{stem}scale").float(), zero, None, weights)))
