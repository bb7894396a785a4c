"""The compressed-tensors layout: QTensors ↔ the named tensors and the `quantization_config` that its readers expect.

Owns: `LAYOUT` and the storage of each format; the config is in `compressed_tensors_config`. Read by transformers (with the compressed-tensors package), vLLM and SGLang. Per weight `P.weight`:

    pack-quantized          P.weight_packed int32, codes + 2^(b-1) as one little-endian bit stream a row;
                            P.weight_scale; P.weight_shape int64; P.weight_zero_point int32, packed along the outputs
    int-quantized           P.weight int8; P.weight_scale; P.weight_zero_point int8
    float-quantized         P.weight float8_e4m3; P.weight_scale
    nvfp4-pack-quantized    P.weight_packed uint8, first code in the low nibble; P.weight_scale float8_e4m3 for 16 codes;
                            P.weight_global_scale float32, the *reciprocal* of our tensor scale
    mxfp4-pack-quantized    P.weight_packed uint8; P.weight_scale uint8, the exponent + 127, for 32 codes
    mxfp8-quantized         P.weight float8_e4m3; P.weight_scale uint8

Source: the package itself, version 0.20. Its packing of 3, 5, 6 and 7 bits changed in 0.18 under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.compressed_tensors_config import args_of, config, find, format_of, notes_of, parse_args
from arrondi.checkpoint.layouts.layout import Layout, Placed
from arrondi.errors import FileFormatError
from arrondi.formats import (
    ActivationScheme,
    LayerScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    scale_shape,
)
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED
from arrondi.tensor.storage import load_scale, store_scale

_F8 = torch.float8_e4m3fn
_WORD = 4
"""Bytes of the words that integer codes are packed into."""


@dataclass(frozen=True)
class _Storage:
    """How one of the package's formats stores a weight: tensors by suffix, both ways."""

    specs: Callable[[tuple[int, ...], Scheme], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
    write: Callable[[QTensor], dict[str, torch.Tensor]]
    read: Callable[[Mapping[str, torch.Tensor], Scheme], QTensor]


def _scale_spec(shape: tuple[int, ...], scheme: Scheme) -> tuple[torch.dtype, tuple[int, ...]]:
    if scheme.scale == "e8m0":
        return torch.uint8, scale_shape(scheme.granularity, shape)
    wanted = scale_shape(scheme.granularity, shape)
    return STORED[str(scheme.scale)], (1,) if isinstance(scheme.granularity, PerTensor) else wanted


def _write_scale(q: QTensor) -> torch.Tensor:
    scale = store_scale(q.real_scale, str(q.scheme.scale))
    return scale.reshape(1) if isinstance(q.scheme.granularity, PerTensor) else scale


def _read_scale(stored: torch.Tensor, shape: tuple[int, ...], scheme: Scheme) -> torch.Tensor:
    return load_scale(stored).reshape(scale_shape(scheme.granularity, shape))


def _packed_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, columns = shape
    bits = scheme.format.bits
    specs = {
        "weight_packed": (torch.int32, (rows, packed_width(columns, bits, _WORD) // _WORD)),
        "weight_scale": _scale_spec(shape, scheme),
        "weight_shape": (torch.int64, (2,)),
    }
    if scheme.zero_point == "integer":
        groups = scale_shape(scheme.granularity, shape)[1]
        specs["weight_zero_point"] = (torch.int32, (packed_width(rows, bits, _WORD) // _WORD, groups))
    return specs


def _packed_write(q: QTensor) -> dict[str, torch.Tensor]:
    bits = q.scheme.format.bits
    tensors = {
        "weight_packed": pack(q.codes, bits, word_bytes=_WORD, lowest=q.scheme.format.qmin).view(torch.int32),
        "weight_scale": _write_scale(q),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_point is not None:
        zero = (q.zero_point - q.scheme.format.qmin).to(torch.uint8)
        tensors["weight_zero_point"] = (
            pack(zero.T.contiguous(), bits, word_bytes=_WORD).view(torch.int32).T.contiguous()
        )
    return tensors


def _packed_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    shape = tuple(tensors["weight_shape"].tolist())
    bits = scheme.format.bits
    codes = unpack(tensors["weight_packed"].view(torch.uint8), bits, shape[1], lowest=scheme.format.qmin)
    zero = None
    if scheme.zero_point == "integer":
        stored = tensors["weight_zero_point"].T.contiguous().view(torch.uint8)
        zero = unpack(stored, bits, shape[0]).T.int() + scheme.format.qmin
    return QTensor(codes, _read_scale(tensors["weight_scale"], shape, scheme), zero, None, scheme)


def _plain_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs = {
        "weight": (torch.int8 if scheme.format.kind == "integer" else _F8, shape),
        "weight_scale": _scale_spec(shape, scheme),
    }
    if scheme.zero_point == "integer":
        specs["weight_zero_point"] = (torch.int8, specs["weight_scale"][1])
    return specs


def _plain_write(q: QTensor) -> dict[str, torch.Tensor]:
    tensors = {
        "weight": q.codes if q.scheme.format.kind == "integer" else q.codes.view(_F8),
        "weight_scale": _write_scale(q),
    }
    if q.zero_point is not None:
        tensors["weight_zero_point"] = q.zero_point.to(torch.int8).reshape(tensors["weight_scale"].shape)
    return tensors


def _plain_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    stored = tensors["weight"]
    shape = tuple(stored.shape)
    zero = None
    if scheme.zero_point == "integer":
        zero = tensors["weight_zero_point"].int().reshape(scale_shape(scheme.granularity, shape))
    return QTensor(
        stored.view(code_dtype(scheme.format)), _read_scale(tensors["weight_scale"], shape, scheme), zero, None, scheme
    )


def _mxfp4_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "weight_packed": (torch.uint8, (shape[0], packed_width(shape[1], 4))),
        "weight_scale": _scale_spec(shape, scheme),
    }


def _mxfp4_write(q: QTensor) -> dict[str, torch.Tensor]:
    return {"weight_packed": pack(q.codes, 4), "weight_scale": _write_scale(q)}


def _mxfp4_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    shape = (tensors["weight_packed"].shape[0], tensors["weight_packed"].shape[1] * 2)
    codes = unpack(tensors["weight_packed"], 4, shape[1])
    return QTensor(codes, _read_scale(tensors["weight_scale"], shape, scheme), None, None, scheme)


def _nvfp4_specs(shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {
        "weight_packed": (torch.uint8, (shape[0], packed_width(shape[1], 4))),
        "weight_scale": (_F8, scale_shape(scheme.granularity, shape)),
        "weight_global_scale": (torch.float32, (1,)),
    }


def _nvfp4_write(q: QTensor) -> dict[str, torch.Tensor]:
    assert isinstance(q.scale, QTensor)
    return {
        "weight_packed": pack(q.codes, 4),
        "weight_scale": q.scale.codes.view(_F8),
        "weight_global_scale": 1 / q.scale.real_scale.reshape(1),
    }


def _nvfp4_read(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    assert isinstance(scheme.scale, Scheme)
    columns = tensors["weight_packed"].shape[1] * 2
    inner = QTensor(
        tensors["weight_scale"].view(torch.uint8),
        (1 / tensors["weight_global_scale"]).reshape(1, 1),
        None,
        None,
        scheme.scale,
    )
    return QTensor(unpack(tensors["weight_packed"], 4, columns), inner, None, None, scheme)


_PLAIN = _Storage(_plain_specs, _plain_write, _plain_read)
_STORAGE: Final[Mapping[str, _Storage]] = {
    "pack-quantized": _Storage(_packed_specs, _packed_write, _packed_read),
    "int-quantized": _PLAIN,
    "float-quantized": _PLAIN,
    "mxfp8-quantized": _PLAIN,
    "mxfp4-pack-quantized": _Storage(_mxfp4_specs, _mxfp4_write, _mxfp4_read),
    "nvfp4-pack-quantized": _Storage(_nvfp4_specs, _nvfp4_write, _nvfp4_read),
}


def _refuse(scheme: LayerScheme, name: str, shape: tuple[int, ...]) -> str | None:
    weights = scheme.weights
    if format_of(scheme) is None:
        return f"compressed-tensors has no format for {scheme}"
    if weights.zero_point == "float":
        return "compressed-tensors stores integer zero points only"
    if len(shape) != 2:
        return f"compressed-tensors stores matrices, and this is a stack of shape {shape}"
    if not name.endswith(".weight"):
        return "compressed-tensors stores parameters named weight only"
    if not isinstance(weights.granularity, PerTensor | PerGroup | PerBlock) and weights.granularity != PerChannel():
        return f"compressed-tensors has no granularity {weights.granularity}"
    if not weights.symmetric and not isinstance(weights.granularity, PerGroup | PerChannel):
        return "compressed-tensors stores zero points of groups and channels only"
    if scheme.outputs is not None or scheme.kv is not None:
        return f"compressed-tensors stores no outputs or key/value cache here, got {scheme}"
    inputs = scheme.inputs
    if inputs is not None:
        if inputs.dynamic is not True:
            return f"compressed-tensors stores no static scales of inputs here, got {scheme}"
        known = isinstance(inputs.scheme.granularity, PerTensor | PerToken | PerGroup)
        if not known or _back(inputs) != inputs.scheme:
            return f"compressed-tensors cannot say that activations become {inputs.scheme}"
    return None


def _back(inputs: ActivationScheme) -> Scheme | None:
    """A scheme as it is read again from the config, None if it is not."""
    try:
        return parse_args(args_of(inputs.scheme, inputs.dynamic))
    except FileFormatError:
        return None


def _specs(placed: Placed) -> list[TensorSpec]:
    storage = _STORAGE[str(format_of(placed.scheme))]
    prefix = placed.name.removesuffix("weight")
    return [
        (prefix + suffix, dtype, shape)
        for suffix, (dtype, shape) in storage.specs(placed.shape, placed.scheme.weights).items()
    ]


def _write(placed: Placed, q: QTensor) -> dict[str, torch.Tensor]:
    prefix = placed.name.removesuffix("weight")
    return {prefix + suffix: tensor for suffix, tensor in _STORAGE[str(format_of(placed.scheme))].write(q).items()}


def _read(placed: Placed, read: Callable[[str], torch.Tensor]) -> QTensor:
    prefix = placed.name.removesuffix("weight")
    storage = _STORAGE[str(format_of(placed.scheme))]
    suffixes = storage.specs(placed.shape, placed.scheme.weights)
    return storage.read({suffix: read(prefix + suffix) for suffix in suffixes}, placed.scheme.weights)


LAYOUT: Final = Layout(
    "compressed-tensors", "transformers, vLLM, SGLang, arrondi", _refuse, _specs, _write, _read, config, find, notes_of
)  # fmt: skip
