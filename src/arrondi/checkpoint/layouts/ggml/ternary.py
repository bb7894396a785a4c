"""Five codes of three values in a byte, as ggml's TQ1_0 has them.

Owns: `read_trits` and `write_trits`. With t₀ … t₄ in 0 … 2, the first most significant, a byte is ⌈256 v / 243⌉ for the number v that they
are in base 3. Multiplied by 3 in turn, what overflows the byte is the next of them.
"""

from __future__ import annotations

from typing import Final

import torch

_RUNS: Final = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""First byte, bytes, and how many codes there are in each: the first of every byte come first, then the second."""


def read_trits(blocks: torch.Tensor) -> torch.Tensor:
    """Codes 0 … 2 (n, 256) of blocks (n, at least 52) uint8."""
    codes = blocks.new_empty((len(blocks), 256))
    done = 0
    for at, count, each in _RUNS:
        rest = blocks[:, at : at + count].contiguous()
        for _ in range(each):
            codes[:, done : done + count] = (rest.to(torch.int16) * 3 >> 8).to(torch.uint8)
            rest = rest * 3  # what is above 255 falls away
            done += count
    return codes


def write_trits(blocks: torch.Tensor, codes: torch.Tensor) -> None:
    """The inverse; `blocks` (n, at least 52) uint8 are written to."""
    done = 0
    for at, count, each in _RUNS:
        value = torch.zeros((len(codes), count), dtype=torch.int32, device=codes.device)
        for _ in range(each):
            value = value * 3 + codes[:, done : done + count]
            done += count
        value *= 3 ** (5 - each)
        blocks[:, at : at + count] = ((value * 256 + 242) // 243).to(torch.uint8)
