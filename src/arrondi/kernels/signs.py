"""Layers of one bit in and out of which nothing else is asked: exclusive or, popcount, and one scale a row.

Owns: `SIGNS`, a kernel for weights of the format `binary` with a scale for each row whose inputs are rounded to signs with one stored scale
(BiBERT's). It cannot multiply by anything but signs, so `choose` takes it only where it is told that inputs are.
"""

from __future__ import annotations

import torch

from arrondi.errors import DataError
from arrondi.formats import ActivationScheme, PerChannel, PerTensor, Scheme
from arrondi.kernels.binary import binary_linear, pack_signs, sign_tiles
from arrondi.kernels.kernel import Kernel, Meta, Tensors
from arrondi.native import available
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_scale, store_scale

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_COLUMNS = 1 << 24
"""More would not be exact in float32."""


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if scheme.format.name != "binary" or scheme.granularity != PerChannel() or not scheme.symmetric:
        return f"It takes binary weights with a scale for each row, got {scheme}."
    if not isinstance(scheme.scale, str) or scheme.scale == "e8m0":
        return f"It takes plain scales, got {scheme}."
    if len(shape) != 2 or not all(shape) or shape[1] > _MOST_COLUMNS:
        return f"It multiplies by matrices (out, in) of up to {_MOST_COLUMNS} columns that are not empty, got shape {shape}."
    if dtype not in _TYPES:
        return f"It gives float32, bfloat16 and float16, got {dtype}."
    return None if device.type == "cpu" and available() else "It runs on the CPU, by the compiled kernels."


def _rounds(weights: Scheme, inputs: ActivationScheme) -> bool:
    of = inputs.scheme
    plain = of.format.name == "binary" and of.symmetric and isinstance(of.granularity, PerTensor)
    return (
        plain
        and inputs.dynamic is False
        and inputs.outliers is None
        and isinstance(of.scale, str)
        and of.scale != "e8m0"
    )


def _prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    assert isinstance(q.scale, torch.Tensor) and isinstance(q.scheme.scale, str)
    tiles = sign_tiles(pack_signs(q.codes.float() - 0.5))
    return {"codes": tiles, "scale": store_scale(q.scale, q.scheme.scale).reshape(-1).clone()}


def _unpack(tensors: Tensors, meta: Meta) -> QTensor:
    rows, columns = meta.shape
    words = tensors["codes"].transpose(1, 2).reshape(-1, tensors["codes"].shape[1])[:rows]
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    codes = bits.flatten(-2)[:, :columns].to(torch.uint8)
    return QTensor(codes, load_scale(tensors["scale"]).reshape(-1, 1), None, None, meta.scheme)


def _linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    if not bool(torch.isfinite(x).all()):
        raise DataError("inputs: the values hold NaN or infinity. Repair or exclude the tensor.")
    scale = load_scale(tensors["scale"]) * tensors["input_scale"]
    y = binary_linear(pack_signs(x), tensors["codes"], meta.shape, scale=scale, dtype=meta.dtype)
    return y if bias is None else y + bias


SIGNS = Kernel("signs", _refuse, _prepack, _unpack, _linear, _rounds)
"""Error: sums are exact integers; their product with the scale is rounded once, and so is the sum with the bias."""
