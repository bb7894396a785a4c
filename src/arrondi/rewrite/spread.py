"""The transform that spreads an input over its channels while a model runs: `spread`, and `unspread`.

Where what makes an activation cannot take a rotation over (a gated product, attention that mixes heads), the activation itself is
multiplied by S = diag(r) H, and the weight that reads it is stored as W S, so that (x S)(W S)ᵀ = x Wᵀ. H is the Hadamard
matrix of the compiled transform, in blocks where there is none of the whole order.

r are the signs of Rudin and Shapiro, r_i = (-1)^(number of neighbouring ones in the binary form of i), which needs no seed. Their
transform is flat, so that an input with a constant part (after ReLU or GELU) is spread too; plain H would gather it in one channel.
"""

from __future__ import annotations

import functools

import torch

from arrondi.errors import SchemeError
from arrondi.kernels.hadamard import hadamard, is_order
from arrondi.rewrite.rotation import block_of

SMALLEST: int = 16
"""Channels of a block below which spreading is not worth its time."""


def spread(x: torch.Tensor, block: int) -> torch.Tensor:
    """x S, block by block along the last axis, in the type of x; n log n operations.

    Args:
        x: (…, n) float.
        block: an order of a Hadamard matrix that divides n.
    """
    signed = x * _signs(x.shape[-1], block, x.dtype, x.device)
    return hadamard(signed) if block == x.shape[-1] else hadamard(signed.reshape(-1, block)).view(x.shape)


def unspread(x: torch.Tensor, block: int) -> torch.Tensor:
    """What `spread` made this of: x Sᵀ."""
    plain = hadamard(x.reshape(-1, block), transposed=True).view(x.shape)
    return plain * _signs(x.shape[-1], block, x.dtype, x.device)


def spread_weight(weight: torch.Tensor, block: int) -> None:
    """W S in the place of W (out, n); computed in float64."""
    step = max(_NUMBERS // weight.shape[1], 1)
    for part in weight.split(step):
        part.copy_(spread(part.double(), block))


def best_block(n: int) -> int:
    """The largest blocks in which n channels can be spread; 0 if they would be too small.

    >>> best_block(768), best_block(11008), best_block(90)
    (768, 11008, 0)
    """
    block = block_of(n)
    return block if block >= SMALLEST else 0


def check_block(n: int, block: int) -> None:
    """Refuse blocks in which n channels cannot be spread.

    Raises:
        SchemeError: there is no Hadamard matrix of that order, or it does not divide n.
    """
    refusal = refuse_block(n, block)
    if refusal:
        raise SchemeError(f"{refusal}. The largest that can be is {block_of(n)}.")


def refuse_block(n: int, block: int) -> str | None:
    """Why n channels cannot be spread in such blocks, None if they can."""
    if block and (n % block or not is_order(block)):
        return f"{n} channels cannot be spread in blocks of {block}"
    return None


_NUMBERS = 1 << 19
"""Numbers that are computed at a time."""


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # tensors made in inference mode could not be used outside
def _signs(n: int, block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """r of every block, (n,)."""
    numbers = torch.arange(block, device="cpu")
    pairs = numbers & (numbers >> 1)
    for shift in (16, 8, 4, 2, 1):
        pairs = pairs ^ (pairs >> shift)
    return (1 - 2 * (pairs & 1)).to(device, dtype).repeat(n // block)
