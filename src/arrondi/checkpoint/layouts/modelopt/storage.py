"""One weight as ModelOpt stores it.

Owns: `refuse_shape`, `specs`, `write` and `read_layer`. Of a weight P.weight (m outputs, n inputs):

    P.weight            float8_e4m3 (m, n), int8 (m, n); of int4 uint8 (m/2, n), two *rows* a byte, the first in the low half, as two's
                        complement; of fp4 uint8 (m, n/2), two columns a byte, the first in the low half
    P.weight_scale      what codes are multiplied by, float32: one number (), (m,) of rows, (m, n/g) of groups, (⌈m/128⌉, 1, ⌈n/128⌉, 1) of blocks
                        (() where there is one); uint8, exponent + 127, for 32 codes (MX); float8_e4m3 for 16 codes (NVFP4)
    P.weight_scale_2    float32 (), by which these are multiplied in turn (NVFP4)
    P.input_scale       float32 (), the static scale of inputs; of NVFP4 the outer one

Source: modelopt 0.47, `torch/export/quant_utils.py` (`to_quantized_weight`, `pack_int4_in_uint8`) and `torch/quantization/qtensor`.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked, checked_grid
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.formats import PerBlock, PerChannel, PerGroup, PerTensor, Scheme, scale_shape
from arrondi.tensor.packing import pack, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.storage import load_scale, store_scale

_F8: Final = torch.float8_e4m3fn


def refuse_shape(placed: Placed) -> str | None:
    """Why a scheme that is stored is not in this shape, as the end of a sentence; None if it is."""
    (rows, columns), weights = placed.matrix_shape, placed.scheme.weights
    if isinstance(weights.granularity, PerGroup) and columns % weights.granularity.size:
        return f"modelopt has no shorter last group: {weights.granularity.size} does not divide {columns}"
    if weights.format.name == "int4" and rows % 2:
        return f"modelopt stores int4 in pairs of rows, and {rows} is odd"
    return None


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    path, (rows, columns), weights = placed.name.removesuffix(".weight"), placed.matrix_shape, placed.scheme.weights
    code = {"fp8_e4m3": _F8, "int8": torch.int8}.get(weights.format.name, torch.uint8)
    shape = {"int4": (rows // 2, columns), "fp4_e2m1": (rows, columns // 2)}.get(weights.format.name, (rows, columns))
    scale = torch.float32 if weights.scale == "float32" else torch.uint8 if weights.scale == "e8m0" else _F8
    found: list[TensorSpec] = [(placed.name, code, shape), (f"{path}.weight_scale", scale, _shape(placed))]
    if isinstance(weights.scale, Scheme):
        found.append((f"{path}.weight_scale_2", torch.float32, ()))
    if _static(placed):
        found.append((f"{path}.input_scale", torch.float32, ()))
    return found


def _static(placed: Placed) -> bool:
    return placed.scheme.inputs is not None and placed.scheme.inputs.dynamic is not True


def _shape(placed: Placed) -> tuple[int, ...]:
    """The shape of the stored scales."""
    granularity, shape = (
        placed.scheme.weights.granularity,
        scale_shape(placed.scheme.weights.granularity, placed.matrix_shape),
    )
    if isinstance(granularity, PerTensor) or (isinstance(granularity, PerBlock) and shape == (1, 1)):
        return ()
    if isinstance(granularity, PerBlock):
        return shape[0], 1, shape[1], 1
    return shape[:1] if isinstance(granularity, PerChannel) or granularity == PerChannel() else shape


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    path, q = placed.name.removesuffix(".weight"), values.weight
    tensors = {placed.name: _stored(q)}
    if isinstance(q.scale, QTensor):
        tensors[f"{path}.weight_scale"] = q.scale.codes.view(_F8)
        tensors[f"{path}.weight_scale_2"] = q.scale.real_scale.reshape(())
    else:
        tensors[f"{path}.weight_scale"] = store_scale(q.scale, str(q.scheme.scale)).reshape(_shape(placed))
    if _static(placed):
        assert values.inputs is not None, (
            f"{placed.name}: the scheme asks for a static scale of inputs, and none is given"
        )
        tensors[f"{path}.input_scale"] = values.inputs.scale.float().reshape(())
    return tensors


def _stored(q: QTensor) -> torch.Tensor:
    match q.scheme.format.name:
        case "fp8_e4m3":
            return q.codes.view(_F8)
        case "int8":
            return q.codes
        case "int4":
            halves = q.codes.view(torch.uint8) & 15
            return halves[::2] | halves[1::2] << 4
    return pack(q.codes, q.scheme.format.bits)


def read_layer(placed: Placed, read: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    path, weights = placed.name.removesuffix(".weight"), placed.scheme.weights
    codes, stored = _codes(placed, read(placed.name)), read(f"{path}.weight_scale")
    shape = scale_shape(weights.granularity, placed.matrix_shape)
    scale: torch.Tensor | QTensor
    if isinstance(weights.scale, Scheme):
        outer = read(f"{path}.weight_scale_2").reshape(1, 1)
        scale = QTensor(stored.view(torch.uint8), outer, None, None, weights.scale)
    else:
        scale = load_scale(stored).reshape(shape)
    grid = None
    if placed.scheme.inputs is not None and _static(placed):
        grid = Grid(read(f"{path}.input_scale").reshape(1, 1), None, None)
        checked_grid(f"{path}.input_scale", grid, placed.scheme.inputs.scheme.format)
    return LayerValues(checked(placed.name, QTensor(codes, scale, None, None, weights)), grid)


def _codes(placed: Placed, stored: torch.Tensor) -> torch.Tensor:
    format, (rows, columns) = placed.scheme.weights.format, placed.matrix_shape
    match format.name:
        case "fp8_e4m3":
            return stored.view(torch.uint8)
        case "int8":
            return stored
        case "int4":
            signed = stored.view(torch.int8)
            return torch.stack(((signed << 4) >> 4, signed >> 4), dim=1).reshape(rows, columns)
    return unpack(stored, format.bits, columns)
