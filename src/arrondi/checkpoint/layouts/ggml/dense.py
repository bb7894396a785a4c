"""The values of blocks of any type.

Owns: `dense_blocks`. Types without a scheme have their values in long tables, which gguf's own package brings.
"""

from __future__ import annotations

import numpy as np
import torch

from arrondi.checkpoint.imatrix import gguf_package
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.ggml.blocks import BlockType
from arrondi.checkpoint.layouts.ggml.coding import check_rows, decode_blocks
from arrondi.errors import FileFormatError


def dense_blocks(raw: torch.Tensor, kind: BlockType, name: str = "tensor") -> torch.Tensor:
    """float32 (rows, elements of a row) of rows of blocks (rows, bytes of a row) uint8.

    Raises:
        FileFormatError: a row is no whole number of blocks, or a number in it cannot be.
        MissingExtraError: a type that needs the package gguf, and it is not installed.
    """
    if kind.scheme is not None:
        return checked(name, decode_blocks(raw, kind, name)).dequantize()
    check_rows(raw, kind, name)
    gguf = gguf_package(f"{name}: the type {kind.name}")
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.number))
    if not np.isfinite(values).all():
        raise FileFormatError(f"{name}: a scale of its {kind.name} blocks is NaN or infinite. The file is damaged.")
    return torch.from_numpy(values)
