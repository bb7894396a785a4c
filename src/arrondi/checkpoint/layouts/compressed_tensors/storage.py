"""How each format of the package stores a weight: a table of tensors by suffix, both ways.

Owns: `STORAGE` and `format_of`. Beside `P.weight_scale`, of a weight `P.weight`:

    pack-quantized          weight_packed int32, codes + 2^(b-1) as one little-endian bit stream a row; weight_shape int64;
                            weight_zero_point int32, packed along the outputs (int8 where blocks or the whole tensor share it);
                            weight_g_idx int32 where groups are scattered
    int-quantized           weight int8; weight_zero_point int8
    float-quantized         weight float8_e4m3
    nvfp4-pack-quantized    weight_packed uint8, first code in the low nibble; weight_scale float8_e4m3 for 16 codes;
                            weight_global_scale float32, the *reciprocal* of our tensor scale
    mxfp4-pack-quantized    weight_packed uint8; weight_scale uint8, the exponent + 127, for 32 codes
    mxfp6-pack-quantized    the same with 6-bit codes as one bit stream a row
    mxfp8-quantized         weight float8_e4m3; weight_scale uint8
    naive-quantized         int-quantized or float-quantized, whichever the type is; read, never written

Source: the package itself, version 0.20. Its packing of 3, 5, 6 and 7 bits changed in 0.18 under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from arrondi.checkpoint.layouts.checks import check_padding
from arrondi.checkpoint.layouts.compressed_tensors.args import NESTED
from arrondi.checkpoint.layouts.layout import Placed
from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, LayerScheme, PerBlock, PerChannel, PerGroup, PerTensor, Scheme, scale_shape
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale, store_scale

_F8: Final = torch.float8_e4m3fn
_WORD: Final = 4
"""Bytes of the words that integer codes are packed into."""
_INTEGERS: Final = tuple(FORMATS[f"int{bits}"] for bits in range(2, 9))

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Stored = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Storage:
    """How one format stores a weight.

    Attributes:
        takes: whether a scheme of weights is stored so.
        specs, write, read: the tensors by suffix; reading checks what the types alone do not say.
    """

    takes: Callable[[Scheme], bool]
    specs: Callable[[Placed], Specs]
    write: Callable[[Placed, QTensor], dict[str, torch.Tensor]]
    read: Callable[[Placed, Stored], QTensor]


def format_of(scheme: LayerScheme) -> str | None:
    """The format that stores this scheme when we write it, if there is one.

    Integers of fewer than 8 bits are packed, whether the inputs are rounded or not; the package's own choice for rounded inputs
    is a byte a code.
    """
    for name in ("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized", "float-quantized"):  # fmt: skip
        if STORAGE[name].takes(scheme.weights):
            return name
    if not _is_integer(scheme.weights):
        return None
    return "int-quantized" if scheme.inputs is not None and scheme.weights.format.bits == 8 else "pack-quantized"


def inferred_format(scheme: LayerScheme) -> str | None:
    """The format that the package takes where neither config nor group names one."""
    if scheme.inputs is not None and _is_integer(scheme.weights):
        return "int-quantized"
    return format_of(scheme)


# ── scales ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _scale_spec(shape: tuple[int, ...], scheme: Scheme) -> tuple[torch.dtype, tuple[int, ...]]:
    wanted = scale_shape(scheme.granularity, shape)
    if scheme.scale == "e8m0":
        return torch.uint8, wanted
    return STORED[str(scheme.scale)], (1,) if isinstance(scheme.granularity, PerTensor) else wanted


def _write_scale(q: QTensor) -> torch.Tensor:
    scale = store_scale(q.real_scale, str(q.scheme.scale))
    return scale.reshape(1) if isinstance(q.scheme.granularity, PerTensor) else scale


def _read_scale(placed: Placed, stored: torch.Tensor) -> torch.Tensor:
    return load_scale(stored).reshape(scale_shape(placed.scheme.weights.granularity, placed.matrix_shape))


# ── integers, packed ──────────────────────────────────────────────────────────────────────────────────────────────────


def _packs_zeros(scheme: Scheme) -> bool:
    """Whether zero points are packed as codes are; those of blocks and tensors take a byte each."""
    return isinstance(scheme.granularity, PerGroup | PerChannel)


def _packed_specs(placed: Placed) -> Specs:
    scheme, (rows, columns) = placed.scheme.weights, placed.matrix_shape
    bits = scheme.format.bits
    specs: Specs = {
        "weight_packed": (torch.int32, (rows, packed_width(columns, bits, _WORD) // _WORD)),
        "weight_scale": _scale_spec((rows, columns), scheme),
        "weight_shape": (torch.int64, (2,)),
    }
    if scheme.zero_point == "integer" and _packs_zeros(scheme):
        groups = scale_shape(scheme.granularity, (rows, columns))[1]
        specs["weight_zero_point"] = (torch.int32, (packed_width(rows, bits, _WORD) // _WORD, groups))
    elif scheme.zero_point == "integer":
        specs["weight_zero_point"] = (torch.int8, specs["weight_scale"][1])
    if placed.indexed:
        specs["weight_g_idx"] = (torch.int32, (columns,))
    return specs


def _packed_write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    bits, low = q.scheme.format.bits, q.scheme.format.qmin
    tensors = {
        "weight_packed": pack(q.codes, bits, word_bytes=_WORD, lowest=low).view(torch.int32),
        "weight_scale": _write_scale(q),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None and not _packs_zeros(q.scheme):
        tensors["weight_zero_point"] = q.zero_point.to(torch.int8).reshape(tensors["weight_scale"].shape)
    elif q.zero_point is not None:
        zero = (q.zero_point - low).to(torch.uint8).T.contiguous()
        tensors["weight_zero_point"] = pack(zero, bits, word_bytes=_WORD).view(torch.int32).T.contiguous()
    if q.group_index is not None:
        tensors["weight_g_idx"] = q.group_index.to(torch.int32)
    return tensors


def _packed_read(placed: Placed, tensors: Stored) -> QTensor:
    scheme, (rows, columns) = placed.scheme.weights, placed.matrix_shape
    bits, low = scheme.format.bits, scheme.format.qmin
    if tensors["weight_shape"].tolist() != [rows, columns]:
        raise FileFormatError(
            f"{placed.name}: weight_shape says {tensors['weight_shape'].tolist()}, not {[rows, columns]}."
        )
    packed = tensors["weight_packed"].view(torch.uint8)
    check_padding(placed.name, packed, bits, columns)
    zero = None
    if scheme.zero_point == "integer" and not _packs_zeros(scheme):
        zero = tensors["weight_zero_point"].int().reshape(scale_shape(scheme.granularity, (rows, columns)))
    elif scheme.zero_point == "integer":
        # Not `contiguous`, which leaves a matrix of one row or column with the strides that it had.
        stored = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        check_padding(f"{placed.name}: zero points", stored, bits, rows)
        zero = unpack(stored, bits, rows).T.int() + low
    index = tensors["weight_g_idx"] if placed.indexed else None
    codes = unpack(packed, bits, columns, lowest=low)
    return QTensor(codes, _read_scale(placed, tensors["weight_scale"]), zero, None, scheme, index)


# ── a byte or a float8 for every weight ───────────────────────────────────────────────────────────────────────────────


def _plain_specs(placed: Placed) -> Specs:
    scheme = placed.scheme.weights
    specs: Specs = {
        "weight": (torch.int8 if scheme.format.kind == "integer" else _F8, placed.matrix_shape),
        "weight_scale": _scale_spec(placed.matrix_shape, scheme),
    }
    if scheme.zero_point == "integer":
        specs["weight_zero_point"] = (torch.int8, specs["weight_scale"][1])
    return specs


def _plain_write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    tensors = {
        "weight": q.codes if q.scheme.format.kind == "integer" else q.codes.view(_F8),
        "weight_scale": _write_scale(q),
    }
    if q.zero_point is not None:
        tensors["weight_zero_point"] = q.zero_point.to(torch.int8).reshape(tensors["weight_scale"].shape)
    return tensors


def _plain_read(placed: Placed, tensors: Stored) -> QTensor:
    scheme = placed.scheme.weights
    zero = None
    if scheme.zero_point == "integer":
        zero = tensors["weight_zero_point"].int().reshape(scale_shape(scheme.granularity, placed.matrix_shape))
    codes = tensors["weight"].view(code_dtype(scheme.format))
    return QTensor(codes, _read_scale(placed, tensors["weight_scale"]), zero, None, scheme)


# ── small floats ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _float_specs(placed: Placed) -> Specs:
    scheme, (rows, columns) = placed.scheme.weights, placed.matrix_shape
    packed = torch.uint8, (rows, packed_width(columns, scheme.format.bits))
    if not isinstance(scheme.scale, Scheme):
        return {"weight_packed": packed, "weight_scale": _scale_spec((rows, columns), scheme)}
    return {
        "weight_packed": packed,
        "weight_scale": (_F8, scale_shape(scheme.granularity, (rows, columns))),
        "weight_global_scale": (torch.float32, (1,)),
    }


def _float_write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    packed = pack(q.codes, q.scheme.format.bits)
    if not isinstance(q.scale, QTensor):
        return {"weight_packed": packed, "weight_scale": _write_scale(q)}
    return {
        "weight_packed": packed,
        "weight_scale": q.scale.codes.view(_F8),
        "weight_global_scale": 1 / q.scale.real_scale.reshape(1),
    }


def _float_read(placed: Placed, tensors: Stored) -> QTensor:
    scheme, columns = placed.scheme.weights, placed.matrix_shape[1]
    codes = unpack(tensors["weight_packed"], scheme.format.bits, columns)
    scale: torch.Tensor | QTensor
    if isinstance(scheme.scale, Scheme):
        outer = 1 / tensors["weight_global_scale"]
        scale = QTensor(tensors["weight_scale"].view(torch.uint8), outer.reshape(1, 1), None, None, scheme.scale)
    else:
        scale = _read_scale(placed, tensors["weight_scale"])
    return QTensor(codes, scale, None, None, scheme)


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_integer(s: Scheme) -> bool:
    plain = isinstance(s.granularity, PerTensor | PerGroup | PerBlock) or s.granularity == PerChannel()
    return s.format in _INTEGERS and s.scale in STORED and s.zero_point != "float" and plain


def _is_fp8(s: Scheme) -> bool:
    plain = isinstance(s.granularity, PerTensor | PerGroup | PerBlock) or s.granularity == PerChannel()
    return s.format.name == "fp8_e4m3" and s.scale in STORED and plain


def _mx(name: str) -> Callable[[Scheme], bool]:
    return lambda s: s.format.name == name and s.scale == "e8m0" and s.granularity == PerGroup(32)


def _is_nvfp4(s: Scheme) -> bool:
    return s.format.name == "fp4_e2m1" and s.granularity == PerGroup(16) and s.scale == NESTED


_PACKED = (_packed_specs, _packed_write, _packed_read)
_PLAIN = (_plain_specs, _plain_write, _plain_read)
_FLOATS = (_float_specs, _float_write, _float_read)

STORAGE: Final[Mapping[str, Storage]] = MappingProxyType({
    "pack-quantized": Storage(_is_integer, *_PACKED),
    "int-quantized": Storage(_is_integer, *_PLAIN),
    "float-quantized": Storage(_is_fp8, *_PLAIN),
    "naive-quantized": Storage(lambda s: _is_integer(s) or _is_fp8(s), *_PLAIN),
    "nvfp4-pack-quantized": Storage(_is_nvfp4, *_FLOATS),
    "mxfp4-pack-quantized": Storage(_mx("fp4_e2m1"), *_FLOATS),
    "mxfp6-pack-quantized": Storage(_mx("fp6_e2m3"), *_FLOATS),
    "mxfp8-quantized": Storage(_mx("fp8_e4m3"), *_PLAIN),
})  # fmt: skip
"""Every format of the package that stores numbers in few bits."""
