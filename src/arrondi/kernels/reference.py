"""The slow, obvious reference: packed codes that become floats again at every call.

Owns: `REFERENCE`, which takes every scheme on every device.
"""

from __future__ import annotations

import torch

from arrondi.formats import Scheme
from arrondi.kernels.kernel import Kernel, Meta, Tensors
from arrondi.kernels.packed import CHUNK, WIDE_CHUNK, decoded_rows, pack_weight, unpack_weight
from arrondi.tensor.qtensor import QTensor


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if len(shape) != 2:
        return f"It multiplies by matrices (out, in), got shape {shape}."
    return None if dtype.is_floating_point else f"It computes in a floating type, got {dtype}."


def _prepack(q: QTensor, dtype: torch.dtype) -> Tensors:
    return pack_weight(q)


def _unpack(tensors: Tensors, meta: Meta) -> QTensor:
    return unpack_weight(tensors, meta.scheme, meta.shape)


def _linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty((*x.shape[:-1], meta.shape[0]))
    chunk = CHUNK if x.numel() <= 16 * meta.shape[1] else WIDE_CHUNK
    for rows, weight in decoded_rows(tensors, meta.scheme, meta.shape, meta.dtype, chunk):
        y[..., rows] = torch.nn.functional.linear(x, weight, None if bias is None else bias[rows])
    return y


REFERENCE = Kernel("reference", _refuse, _prepack, _unpack, _linear)
"""Error: that of `torch.nn.functional.linear` on the dequantized weight, which is rounded once to the dtype of x."""
