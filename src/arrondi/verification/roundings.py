"""What consumers round besides the weights: `Rounding`, and how a sum's last bits are moved.

llama.cpp's blocks are those of its quantizers `quantize_row_q8_0` and `quantize_row_q8_K` (ggml-quants.c), which every one of its products with
quantized weights puts its inputs through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

Round = Callable[[torch.Tensor], torch.Tensor]

LAST_BITS: Final = 2.0**-21
"""By how much a float32 sum may differ with the order of its terms, relative."""


@dataclass(frozen=True)
class Rounding:
    """What one product does to what it reads and gives; None leaves it alone."""

    inputs: Round | None = None
    outputs: Round | None = None


def blocks_of_32(x: torch.Tensor) -> torch.Tensor:
    """x (…, n), n a multiple of 32, as ggml's Q8_0 has it: the codes by a scale in float32, which is then kept in float16."""
    groups = x.float().reshape(*x.shape[:-1], -1, 32)
    most = groups.abs().amax(-1, keepdim=True)
    codes = torch.round(groups * torch.where(most > 0, 127 / most, 0))
    return (codes * (most / 127).half().float()).reshape(x.shape)


def blocks_of_256(x: torch.Tensor) -> torch.Tensor:
    """x (…, n), n a multiple of 256, as ggml's Q8_K has it: the largest number, with its sign, is −127."""
    groups = x.float().reshape(*x.shape[:-1], -1, 256)
    most = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    inverse = torch.where(most != 0, -127 / most, 0)
    codes = torch.round(groups * inverse).clamp(max=127)
    return torch.where(inverse != 0, codes / inverse, 0).reshape(x.shape)


def half(x: torch.Tensor) -> torch.Tensor:
    """x as float16 has it."""
    return x.half().to(x.dtype)


def bfloat(x: torch.Tensor) -> torch.Tensor:
    """x as bfloat16 has it."""
    return x.bfloat16().to(x.dtype)


def last_bits(x: torch.Tensor) -> torch.Tensor:
    """x with its last bits moved, the same way for the same shape."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return x * (1 + LAST_BITS * noise)
