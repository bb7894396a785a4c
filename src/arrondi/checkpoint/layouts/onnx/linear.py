"""The form `linear`: codes as a tensor of a few-bit type (DequantizeLinear, and TFLite's tensors). A matrix may lie turned, (in, out), as ONNX multiplies.

Of a weight P (n numbers) that is stored in the shape S, with b bits a code, where narrow codes are one stream of bytes, the first in the lowest bits:

    P_quantized    int8, uint8 or float8 S, or uint8 (n·b/8,)     the codes
    P_scale        float (1,), (length of an axis,), or S in blocks
    P_zero_point   as the codes; left out where it is zero
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch

from arrondi.checkpoint.containers.graph_weights import CODES, SCALE, ZERO
from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.layout import Placed, Reader
from arrondi.formats import FORMATS, Granularity, PerBlock, PerChannel, PerGroup, PerTensor, Scheme, scale_shape
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale

TYPES: Final = {
    "int8": torch.int8, "uint8": torch.uint8, "int4": torch.uint8, "uint4": torch.uint8, "int2": torch.uint8, "uint2": torch.uint8,
    "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "fp4_e2m1": torch.uint8,
}  # fmt: skip
"""Formats of codes → the type in which they are stored."""
_BYTE: Final = 8


class Grid(NamedTuple):
    """Which numbers share a scale, as a file of graphs says it: an axis of the stored shape, and a block along it."""

    axis: int | None = None
    block: int = 0


def refuse(placed: Placed) -> str | None:
    """Why this form cannot hold a layer, as the end of a sentence; None if it can."""
    scheme = placed.scheme.weights
    if scheme.format.name not in TYPES:
        return f"codes of an ONNX tensor are {', '.join(TYPES)}, not {scheme.format}"
    if scheme.zero_point == "float" or scheme.apart is not None or scheme.scale not in STORED:
        return f"an ONNX tensor has plain scales and integer zero points, not {scheme}"
    if scheme.zero_point == "integer" and scheme.format.kind != "integer":
        return "floats have no zero point"
    if placed.indexed:
        return "an ONNX tensor has no index of groups (order=dynamic)"
    if len(placed.shape) < 2 or (placed.transposed and len(placed.shape) > 2):
        return f"weights of graphs are matrices or kernels, not stacks of the shape {placed.shape}"
    if grid_of(placed) is None:
        return (
            f"an ONNX tensor has one scale in all, one for each index of an axis, or blocks along an axis, not {scheme}"
        )
    return None


def grid_of(placed: Placed, turned: bool = False) -> Grid | None:
    """How a file says the granularity of a layer; None if it cannot."""
    flat = len(placed.shape) == 2
    match placed.scheme.weights.granularity:
        case PerTensor():
            return Grid()
        case PerChannel(axis):
            return Grid(axis ^ int(turned) if flat else axis) if axis in range(len(placed.shape)) else None
        case PerGroup(size) if flat:
            return Grid(1 ^ int(turned), size)
        case PerBlock(rows, 1) if flat:
            return Grid(int(turned), rows)
    return None


def granularity_of(grid: Grid, turned: bool, rank: int) -> Granularity:
    """The inverse of `grid_of`."""
    if grid.axis is None:
        return PerTensor()
    along = grid.axis ^ int(turned) if rank == 2 else grid.axis
    if not grid.block:
        return PerChannel(along)
    return PerGroup(grid.block) if along == 1 else PerBlock(grid.block, 1)


def stored_shape(placed: Placed, turned: bool) -> tuple[int, ...]:
    """The shape in which codes are stored: of a matrix (out, in), whatever its plain form is, or turned."""
    shape = placed.matrix_shape if len(placed.shape) == 2 else placed.shape
    return shape[::-1] if turned else shape


def codes_shape(placed: Placed) -> tuple[int, ...]:
    """The shape of the QTensor: a matrix where the layer has one, else that of the file."""
    return (
        placed.matrix_shape if len(placed.shape) == 2 or placed.kind in ("Conv1d", "Conv2d", "Conv3d") else placed.shape
    )


def specs(placed: Placed, turned: bool) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    scheme, name = placed.scheme.weights, placed.name
    bits, kind = scheme.format.bits, TYPES[scheme.format.name]
    numel = math.prod(placed.shape)
    shape = _scale_shape(placed, turned)
    narrow = bits < _BYTE
    found: list[TensorSpec] = [
        (name + CODES, kind, (packed_width(numel, bits),) if narrow else stored_shape(placed, turned)),
        (name + SCALE, STORED[str(scheme.scale)], shape),
    ]
    if scheme.zero_point == "integer":
        found.append((name + ZERO, kind, (packed_width(math.prod(shape), bits),) if narrow else shape))
    return found


def write(placed: Placed, q: QTensor, turned: bool) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    name, shape = placed.name, _scale_shape(placed, turned)
    stored = {
        name + CODES: _stored(_turned(q.codes, turned).reshape(stored_shape(placed, turned)), q.scheme),
        name + SCALE: _turned(q.real_scale, turned).reshape(shape).to(STORED[str(q.scheme.scale)]).contiguous(),
    }
    if q.zero_point is not None:
        dtype = torch.int8 if q.scheme.format.qmin < 0 else torch.uint8
        stored[name + ZERO] = _stored(_turned(q.zero_point, turned).reshape(shape).to(dtype), q.scheme)
    return stored


def read(placed: Placed, reader: Reader, turned: bool) -> QTensor:
    """The weight that they hold."""
    scheme, name, shape = placed.scheme.weights, placed.name, codes_shape(placed)
    codes = _turned(_loaded(reader(name + CODES), scheme, stored_shape(placed, turned)), turned).reshape(shape)
    grid, raw = _scale_shape(placed, turned), scale_shape(scheme.granularity, shape)
    scale = _turned(load_scale(reader(name + SCALE)).reshape(grid), turned).reshape(raw)
    zero = None
    if scheme.zero_point == "integer":
        zero = _turned(_loaded(reader(name + ZERO), scheme, grid).int(), turned).reshape(raw).contiguous()
    return QTensor(codes.contiguous(), scale.contiguous(), zero, None, scheme)


def facts(placed: Placed, turned: bool) -> dict[str, Any]:
    """What a config says of a layer in this form."""
    grid = grid_of(placed, turned)
    assert grid is not None
    said: dict[str, Any] = {} if grid.axis is None else {"axis": grid.axis}
    return {
        "type": placed.scheme.weights.format.name,
        **said,
        **({"block": grid.block} if grid.block else {}),
        **({"transposed": True} if turned else {}),
    }


def scheme_of(type_: str, grid: Grid, turned: bool, rank: int, scale: str, zero: bool) -> Scheme:
    """The scheme that a config says."""
    granularity = granularity_of(grid, turned, rank)
    return Scheme(FORMATS[type_], granularity, "integer" if zero else "none", scale)  # type: ignore[arg-type]


def _scale_shape(placed: Placed, turned: bool) -> tuple[int, ...]:
    """The shape of the stored scales."""
    grid, shape = grid_of(placed, turned), stored_shape(placed, turned)
    assert grid is not None
    if grid.axis is None:
        return (1,)
    if not grid.block:
        return (shape[grid.axis],)
    return tuple(-(-n // grid.block) if i == grid.axis else n for i, n in enumerate(shape))


def _turned(part: torch.Tensor, turned: bool) -> torch.Tensor:
    """A matrix in the other orientation, where the file has that."""
    return part.t() if turned and part.ndim == 2 else part


def _stored(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    bits = scheme.format.bits
    if bits < _BYTE:
        return pack(codes.contiguous().view(torch.uint8).reshape(-1) & (2**bits - 1), bits)
    return codes.contiguous().view(TYPES[scheme.format.name])


def _loaded(stored: torch.Tensor, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_stored`: int8 or uint8 codes of a shape."""
    bits, low = scheme.format.bits, scheme.format.qmin
    signed = low < 0 and scheme.format.kind == "integer"
    if bits == _BYTE:
        return stored.reshape(shape).view(torch.int8 if signed else torch.uint8)
    codes = unpack(stored.reshape(-1), bits, math.prod(shape))
    if signed:  # two's complement of a few bits
        codes = ((codes ^ -low) - -low % 256).view(torch.int8)
    return codes.reshape(shape)
