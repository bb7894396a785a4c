"""Backward products in few bits, with the forward product untouched.

Owns: `HLQ`, `low_frequencies`, `compressed`, `turned_weight`. The gradient of the input is an int4 product after a Hadamard transform; that of the
weight an int8 product of what neighbouring rows have in common, of which x is computed on the way forward: an eighth of x in
float32 is all that waits for the way back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Final

import torch
from torch.nn import functional as F

from arrondi.arguments import Between, check_fields
from arrondi.errors import SchemeError
from arrondi.kernels import hadamard, hadamard_matrix
from arrondi.kernels.sides import integer_product, scaled
from arrondi.training.geometry import Geometry
from arrondi.training.method import Arithmetic, Gradients, Layer, Passed, TrainingMethod, lanes, padding, seed
from arrondi.training.scales import Rounded, padded, rounded

_STRIP: Final = 256
"""Inputs of a weight that are transformed at a time."""


@dataclass(frozen=True)
class HlqOptions:
    """Of `hlq`.

    Attributes:
        block: rows, or outputs, that a transform mixes; a power of two.
        rank: of them, frequencies that the gradient of the weight keeps; `block` keeps all, for rows without smoothness.
        input_rank: the same for the gradient of the input, to compare; 0 takes the int4 product instead.
    """

    block: Annotated[int, Between(2, 256)] = 16
    rank: Annotated[int, Between(1, 256)] = 8
    input_rank: Annotated[int, Between(0, 256)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block & (self.block - 1) or self.rank > self.block or self.input_rank > self.block:
            raise SchemeError(
                f"hlq: block is a power of two and ranks are at most block, got block {self.block}, rank {self.rank}, input_rank {self.input_rank}."
            )


@functools.lru_cache(maxsize=16)
def low_frequencies(block: int, rank: int) -> torch.Tensor:
    """The first `rank` rows of the orthonormal Walsh-Hadamard matrix in the order of their sign changes, (rank, block) float32."""
    matrix = hadamard_matrix(block)
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return (matrix[changes.argsort()[:rank]].float() / block**0.5).contiguous()


def compressed(x: torch.Tensor, line: int, block: int, rank: int) -> torch.Tensor:
    """What the rows of each block have in common: their first `rank` Walsh coefficients.

    Args:
        x: (rows, width) floating.
        line: rows of one sequence; blocks do not reach over its end. Rows at its beginning that fill no block, often a class
            token, are kept as they are: padded, they would lose half of their share.
        block, rank: of the transform.

    Returns:
        (lines · (rows left over + blocks · rank), width) float32.
    """
    lines = x.float().reshape(-1, max(line, 1), x.shape[1])
    head, blocks = lines[:, : line % block], lines[:, line % block :]
    basis = low_frequencies(block, rank).to(x.device)
    low = basis @ blocks.reshape(len(lines), line // block, block, x.shape[1])
    return torch.cat((head, low.flatten(1, 2)), 1).flatten(0, 1)


def _restored(y: torch.Tensor, rows: int, line: int, block: int, rank: int) -> torch.Tensor:
    """The transpose of `compressed`: (lines · (rows left over + blocks · rank), width) → (rows, width)."""
    count, width, left = rows // max(line, 1), y.shape[1], line % block
    lines = y.reshape(count, left + line // block * rank, width)
    basis = low_frequencies(block, rank).to(y.device)
    blocks = basis.T @ lines[:, left:].reshape(count, line // block, rank, width)
    return torch.cat((lines[:, :left], blocks.flatten(1, 2)), 1).flatten(0, 1)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, layer: Layer
) -> tuple[torch.Tensor, Passed]:
    options: HlqOptions = layer.options
    matrix = geometry.matrix(x)
    y = F.linear(matrix, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    codes, scale = rounded(compressed(matrix, geometry.line, options.block, options.rank), by_column=True)
    return y, Passed((codes, scale, weight))


def _backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    codes, scale, weight = passed.whole
    options: HlqOptions = layer.options
    rows, line, block = len(slope), geometry.line, options.block
    by_x = by_weight = None
    if wanted[0] and options.input_rank:
        left = rounded(compressed(slope, line, block, options.input_rank), seed=seed())
        by_x = _restored(_product(left, rounded(weight, by_column=True)), rows, line, block, options.input_rank)
    elif wanted[0]:
        there = padded(slope.float(), block)
        left = rounded(hadamard(there.reshape(-1, block)).reshape(there.shape), 7, seed=seed())
        by_x = _product(left, turned_weight(weight, block))
    if wanted[1]:
        left = rounded(compressed(slope, line, block, options.rank), by_column=True, seed=seed())
        by_weight = scaled(integer_product(left.codes.T, codes.T), left.scale, scale, None, torch.float32)
    return None if by_x is None else geometry.back(by_x), by_weight, {}


def turned_weight(weight: torch.Tensor, block: int) -> Rounded:
    """A weight times a Hadamard matrix along its outputs, in codes of 4 bits with a scale for each input.

    Args:
        weight: (out, in) floating.
        block: outputs that the transform mixes; zeros fill the last block.

    Returns:
        Codes (out, in) int8, and scales (in,).
    """
    outputs, inputs = weight.shape
    basis = (hadamard_matrix(block).float() / block**0.5).to(weight.device)
    codes = torch.empty((outputs + -outputs % block, inputs), dtype=torch.int8, device=weight.device)
    scales = []
    for start in range(0, inputs, _STRIP):  # strips stay in cache, and their memory is used again
        strip = weight[:, start : start + _STRIP].float()
        strip = padded(strip, block, dim=0).reshape(-1, block, strip.shape[1])
        found = rounded((basis @ strip).reshape(len(codes), -1), 7, by_column=True)
        codes[:, start : start + _STRIP] = found.codes
        scales.append(found.scale)
    return Rounded(codes, torch.cat(scales))


def _product(left: Rounded, right: Rounded) -> torch.Tensor:
    """(rows, out) with a scale for each row times (out, in) with one for each input."""
    return scaled(integer_product(left.codes, right.codes.T), left.scale, right.scale, None, torch.float32)


def _arithmetic(layer: Layer, device: str) -> Arithmetic:
    options: HlqOptions = layer.options
    low = f"int8 × int8 → int32, low rank along sequences{lanes(device)}"
    high = f"int4 × int4 → int32{lanes(device, 4)}" + padding("outputs", layer.sums[0], options.block)
    return "as before", low if options.input_rank else high, low


HLQ: Final = TrainingMethod(
    "hlq",
    "Backward only: int4 after a Hadamard transform for the input, low-rank int8 for the weight.",
    "Kim, Park, 2024, arXiv:2406.15102",
    HlqOptions,
    _forward,
    _backward,
    _arithmetic,
)
