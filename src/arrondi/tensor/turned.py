"""Another basis for a matrix: both sides times signs, then times Hadamard matrices in blocks.

Owns: `Sides` (the numbers of both sides), `sides_of`, `turn` and `unturn`. With D the diagonal matrices of the sides and H the orthonormal
Sylvester matrices in blocks, a weight W is kept as V = H D_r⁻¹ W D_c⁻¹ H, so that W = D_r H V H D_c; with signs D⁻¹ is D.

Source: Tseng, Chee, Sun, Kuleshov, De Sa 2024, arXiv:2402.04396 (QuIP#, random Hadamard transforms of both sides).
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import torch

from arrondi.formats import Turned

_ROUNDS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_STEP: Final = 0x9E3779B97F4A7C15
_STREAM: Final = 0xD1342543DE82EF95
_MASK: Final = 2**64 - 1


class Sides(NamedTuple):
    """What rows and columns of a turned matrix are multiplied by: float32 (m,) and (n,)."""

    rows: torch.Tensor
    columns: torch.Tensor

    def to(self, device: torch.device | str) -> Sides:
        """The same on a device."""
        return Sides(self.rows.to(device), self.columns.to(device))


def wrong_sides(sides: Sides | None) -> str | None:
    """What is wrong with stored sides, None if nothing is."""
    for what, numbers in () if sides is None else sides._asdict().items():
        if not bool(torch.isfinite(numbers).all()):
            return f"a number of the side of its {what} is NaN or infinite"
    return None


def block_of(size: int, turned: Turned) -> int:
    """The blocks in which a side is turned: the largest power of two up to `turned.block` that divides it.

    >>> block_of(768, Turned()), block_of(90, Turned())
    (128, 2)
    """
    return min(size & -size, turned.block) if size else 1


def sides_of(shape: tuple[int, ...], turned: Turned, device: torch.device | str = "cpu") -> Sides:
    """The signs of a seed, the same on every machine. They repeat with the blocks, so that whole blocks of rows can stand alone."""
    assert turned.seed is not None
    rows, columns = (
        _signs(block_of(size, turned), 2 * turned.seed + side).repeat(size // block_of(size, turned))
        for side, size in zip((1, 0), shape, strict=True)
    )
    return Sides(rows, columns).to(device)


def turn(x: torch.Tensor, sides: Sides, turned: Turned) -> torch.Tensor:
    """V of W (m, n), those of columns being signs: float32 or float64 as x is."""
    return hadamard_rows(turn_columns(x, sides, turned) / sides.rows.to(x)[:, None], turned)


def turn_columns(x: torch.Tensor, sides: Sides, turned: Turned) -> torch.Tensor:
    """x (…, n) as the columns of V meet it: x D_c H, D_c being signs."""
    return hadamard_columns(x * sides.columns.to(x), turned)


def unturn(v: torch.Tensor, sides: Sides, turned: Turned, *, rows: int | None = None) -> torch.Tensor:
    """W of V (m, n); `rows` of the whole matrix where these are some of its blocks."""
    whole = hadamard_rows(hadamard_columns(v, turned), turned, rows)
    return whole.mul_(sides.columns.to(v)).mul_(sides.rows.to(v)[:, None])


def hadamard_columns(x: torch.Tensor, turned: Turned) -> torch.Tensor:
    """x H along the last axis."""
    block = block_of(x.shape[-1], turned)
    if block == 1:
        return x.clone()
    return (x.reshape(-1, block) @ sylvester(block, x.dtype, str(x.device))).reshape(x.shape)


def hadamard_rows(x: torch.Tensor, turned: Turned, rows: int | None = None) -> torch.Tensor:
    """H x along the first axis of a matrix, or of whole blocks of one of so many rows."""
    block = block_of(x.shape[0] if rows is None else rows, turned)
    if block == 1:
        return x.clone()
    return (sylvester(block, x.dtype, str(x.device)) @ x.reshape(-1, block, x.shape[1])).reshape(x.shape)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # tensors made in inference mode could not be used outside
def sylvester(order: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The orthonormal matrix of an order that is a power of two, symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(order.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / order**0.5).to(device, dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _signs(count: int, stream: int) -> torch.Tensor:
    """±1, float32 (count,): the top bits of splitmix64, which needs no library that may change."""
    state, signs = (stream + 1) * _STREAM & _MASK, []
    for _ in range(count):
        state = (state + _STEP) & _MASK
        z = state
        for shift, factor in _ROUNDS:
            z = (z ^ (z >> shift)) * factor & _MASK
        signs.append(1.0 - 2.0 * ((z ^ (z >> 31)) >> 63))
    return torch.tensor(signs, dtype=torch.float32, device="cpu")
