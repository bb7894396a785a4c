"""Products with packed weights on a GPU, by programs in Triton.

Owns: `TRITON`, and what it refuses. How codes lie in memory: `words`; the programs: `programs` (imported at the first product, since
Triton is slow to import and need not be there); which of them runs, and in what blocks: `launch`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Final

import torch

from arrondi.formats import PerTensor, Scheme, tile_shape
from arrondi.kernels.kernel import Kernel
from arrondi.kernels.triton_linear.launch import bind, linear, prepack, unpack
from arrondi.native import TYPES

_MOST_WORDS: Final = 2**31 - 1

_STEP: Final = 16
"""Columns of a group come in this many."""


def _refuse(scheme: Scheme, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"It runs on a GPU, got {device}."
    if not _installed():
        return "Triton is not installed. It comes with PyTorch for CUDA on Linux."
    if dtype not in TYPES:
        return f"It takes float32, bfloat16 and float16 activations, got {dtype}."
    if len(shape) != 2 or not all(shape):
        return f"It multiplies by matrices (out, in) that are not empty, got shape {shape}."
    if shape[0] * (shape[1] + 1024) > _MOST_WORDS:
        return f"It takes up to 2³¹ weights, got shape {shape}."
    width = tile_shape(scheme.granularity, shape)[1]
    if width < shape[1] and width % _STEP:
        return f"It takes groups of a multiple of {_STEP} columns, got {width}."
    if isinstance(scheme.offset, Scheme) or (isinstance(scheme.scale, Scheme) and not _plain_fp8(scheme.scale)):
        return "It takes scales and offsets that are stored as numbers, and scales of fp8_e4m3 with one outer scale."
    return None


def _plain_fp8(scales: Scheme) -> bool:
    """Scales of NVFP4: small floats with one float32 for all of them."""
    return (
        scales.format.name == "fp8_e4m3"
        and scales.granularity == PerTensor()
        and scales.symmetric
        and scales.scale == "float32"
    )


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


TRITON: Final = Kernel("triton", _refuse, prepack, unpack, linear, bind=bind)
"""Weights are decoded to float32 and never rounded where one token is multiplied (float32: up to eight); else codes are multiplied in the
type of x, exactly, and scaled in float32. With an offset, and with many tokens, weights are rounded to the type of x once, as by
`reference`. The pattern of fp8_e4m3 that is NaN counts as 480. Memory beside the packed weight: with many tokens up to 2²⁶ decoded
weights at a time. Rows are padded to a multiple of 512 or 1024 columns."""

__all__ = ["TRITON"]
