"""The forms of com.microsoft's own operators: `blocks` (MatMulNBits, GatherBlockQuantized) and `bnb4` (MatMulBnb4).

Of a weight P (m outputs, n inputs), b bits a code, in G blocks of B inputs, the last of which may be cut off by n:

    P_quantized    uint8 (m, G, B·b/8)   codes counted from zero, the first in the lowest bits
    P_scale        float (m, G)
    P_zero_point   uint8 (m, G·b/8)      zero points counted from zero; left out where they are the middle, 2^(b-1)
                   float (m, G)          of the type of the scales: zero points that are no codes, which are read and not written
    P_g_idx        int32 (n,)            the block of each input, where blocks are scattered

and of bnb4, in G blocks of B numbers of the flattened matrix:

    P_quantized    uint8 (m·n/2,)   codes of four bits, the first in the high half
    P_scale        float (G,)
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from arrondi.checkpoint.containers.graph_weights import CODES, INDEX, SCALE, ZERO
from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.layout import Placed, Reader
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, PerGroup, PerRun, Scheme, scale_shape
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale, unsigned

BLOCKS: Final = (16, 32, 64, 128, 256)
"""Sizes of blocks that ONNX Runtime multiplies."""
_BITS: Final = (2, 4, 8)


def refuse(placed: Placed) -> str | None:
    """Why MatMulNBits cannot hold a layer, as the end of a sentence; None if it can."""
    scheme = placed.scheme.weights
    format, granularity = scheme.format, scheme.granularity
    if placed.kind not in ("Linear", "Conv1D") or len(placed.shape) != 2:
        return f"MatMulNBits is for linear layers, not a {placed.kind} of shape {placed.shape}"
    if format.name not in (f"{sign}{bits}" for sign in ("int", "uint") for bits in _BITS):
        return f"MatMulNBits has codes of 2, 4 or 8 bits, not {format}"
    if not isinstance(granularity, PerGroup) or granularity.size not in BLOCKS:
        return f"MatMulNBits has blocks of {', '.join(map(str, BLOCKS))}, not {scheme}"
    if scheme.scale not in STORED or scheme.apart is not None or scheme.zero_point == "float":
        return f"MatMulNBits has plain scales and zero points that are codes, not {scheme}"
    if scheme.zero_point == "none" and format.qmin == 0:
        return f"MatMulNBits counts codes without zero points from their middle, not {format}"
    if placed.indexed and scheme.zero_point != "none":
        return "ONNX Runtime computes something else of scattered groups with zero points (order=dynamic)"
    return None


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    scheme, name, (rows, columns) = placed.scheme.weights, placed.name, placed.matrix_shape
    assert isinstance(scheme.granularity, PerGroup)
    size, bits, stored = scheme.granularity.size, scheme.format.bits, STORED[str(scheme.scale)]
    count = -(-columns // size)
    found: list[TensorSpec] = [
        (name + CODES, torch.uint8, (rows, count, size * bits // 8)),
        (name + SCALE, stored, (rows, count)),
    ]
    if scheme.zero_point == "float":
        found.append((name + ZERO, stored, (rows, count)))
    elif scheme.zero_point == "integer":
        found.append((name + ZERO, torch.uint8, (rows, packed_width(count, bits))))
    return [*found, (name + INDEX, torch.int32, (columns,))] if placed.indexed else found


def write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    assert isinstance(q.scheme.granularity, PerGroup)
    name, (rows, columns), size, format = placed.name, placed.matrix_shape, q.scheme.granularity.size, q.scheme.format
    count = -(-columns // size)
    codes = torch.nn.functional.pad(unsigned(q.codes, format), (0, count * size - columns))
    stored = {
        name + CODES: pack(codes.reshape(rows, count, size), format.bits),
        name + SCALE: q.real_scale.to(STORED[str(q.scheme.scale)]).contiguous(),
    }
    if q.zero_point is not None:
        stored[name + ZERO] = pack((q.zero_point - format.qmin).to(torch.uint8).contiguous(), format.bits)
    if q.group_index is not None:
        stored[name + INDEX] = q.group_index.to(torch.int32)
    return stored


def read(placed: Placed, reader: Reader) -> QTensor:
    """The weight that they hold."""
    scheme, name, (rows, columns) = placed.scheme.weights, placed.name, placed.matrix_shape
    bits, low = scheme.format.bits, scheme.format.qmin
    raw = reader(name + CODES)
    codes = unpack(raw.reshape(rows, -1), bits, columns, lowest=low).contiguous()
    scale = load_scale(reader(name + SCALE)).contiguous()
    zero, offset = None, None
    if scheme.zero_point == "float":
        offset = -(reader(name + ZERO).float() * scale)
    elif scheme.zero_point == "integer":
        zero = unpack(reader(name + ZERO), bits, scale.shape[1]).int() + low
    index = reader(name + INDEX)[:columns].contiguous() if placed.indexed else None
    return QTensor(codes, scale, zero, offset, scheme, index)


def scheme_of(type_: str, block: int, scale: str, zero: str) -> Scheme:
    """The scheme that a config says; `zero` is "none", "integer" or "float"."""
    format = FORMATS[f"u{type_}" if zero == "float" and type_.startswith("int") else type_]
    return Scheme(format, PerGroup(block), zero, scale)  # type: ignore[arg-type]


def facts(placed: Placed) -> dict[str, Any]:
    """What a config says of a layer in this form."""
    scheme = placed.scheme.weights
    assert isinstance(scheme.granularity, PerGroup)
    return {"type": scheme.format.name, "block": scheme.granularity.size}


def flat_specs(placed: Placed) -> list[TensorSpec]:
    """The tensors of a layer in the form `bnb4`."""
    scheme, numel = placed.scheme.weights, math.prod(placed.shape)
    count = math.prod(scale_shape(scheme.granularity, placed.matrix_shape))
    return [(placed.name + CODES, torch.uint8, (-(-numel // 2),)), (placed.name + SCALE, STORED[str(scheme.scale)], (count,))]  # fmt: skip


def flat_read(placed: Placed, reader: Reader) -> QTensor:
    """The weight that they hold."""
    scheme, shape = placed.scheme.weights, placed.matrix_shape
    raw = reader(placed.name + CODES)
    codes = unpack(raw << 4 | raw >> 4, 4, math.prod(shape)).reshape(shape)
    scale = load_scale(reader(placed.name + SCALE)).reshape(scale_shape(scheme.granularity, shape))
    return QTensor(codes.contiguous(), scale.contiguous(), None, None, scheme)


def flat_scheme(type_: str, block: int, shape: tuple[int, ...], scale: str) -> Scheme:
    """The scheme that a config says of this form.

    Raises:
        FileFormatError: blocks that run across rows and do not hold whole ones.
    """
    if shape[1] % block and block % shape[1]:
        raise FileFormatError(f"blocks of {block} numbers end inside of rows of {shape[1]}, which no scheme says.")
    granularity = PerRun(block) if shape[1] < block else PerGroup(block)
    return Scheme(FORMATS[type_], granularity, "none", scale)  # type: ignore[arg-type]
