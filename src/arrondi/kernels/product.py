"""A call of the compiled product.

Owns: `Product`, what stays the same from call to call handed over once, and `GATES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from arrondi.errors import ShapeError
from arrondi.native import TYPES, address, native, threads

GATES: Final = {None: 0, "silu": 1, "gelu_tanh": 2}
"""Functions that a gated product knows, as native/kernels.h numbers them."""


class Product:
    """y = x Wᵀ + bias with the packed weight bound.

    Args:
        packed: codes, scale, zero, offset, table; see `native_linear.prepack`.
        facts: of the weight; see native/bind_products.cpp.
        digits, rounding: how x is rounded; see `native_linear.rounding_of`.
        bias: (out,) or None.
        norm: (in,): x is replaced by x / √(mean(x²) + eps) · norm (RMS norm; Zhang, Sennrich, 2019, arXiv:1910.07467).
        gate: a key of `GATES`: of the results, y = gate(first half) · second half.
    """

    __slots__ = ("columns", "kept", "rows", "run", "shape")

    def __init__(
        self,
        packed: Sequence[torch.Tensor | None],
        facts: list[int],
        digits: int,
        rounding: Sequence[int] | None,
        bias: torch.Tensor | None,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gate: str | None = None,
    ) -> None:
        assert native is not None
        real, weights = (None if t is None else t.detach().float().contiguous() for t in (bias, norm))
        self.kept = (packed, real, weights)  # addresses are good as long as the tensors live
        self.rows, self.columns = facts[1:3]
        self.shape = (self.rows, self.columns)
        if gate is not None:
            self.rows //= 2
        self.run = native.Product(
            facts,
            *map(address, packed),
            digits,
            list(rounding or ()),
            address(real),
            address(weights),
            eps,
            GATES[gate],
        )

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, integers: bool = False
    ) -> torch.Tensor:
        """x (..., in) → (..., out) of the same dtype, or the exact int32 sums of activations that are rounded by token.

        Args:
            x: float32, bfloat16 or float16.
            residual: (tokens, out), added to the result; x is then float32 or bfloat16 and so is it.

        Raises:
            ShapeError: x does not fit the weight, or the residual not the result.
        """
        k = self.columns
        if x.shape[-1:] != (k,) or x.dtype not in TYPES or x.device.type != "cpu":
            raise ShapeError(
                f"x must be (..., {k}) on the CPU in float32, bfloat16 or float16 for a weight of shape {self.shape}, got {tuple(x.shape)} in {x.dtype} on {x.device}."
            )
        flat = x if x.dim() == 2 else x.reshape(-1, k)
        if flat.stride(1) != 1 or flat.stride(0) < k:
            flat = flat.contiguous()
        half = x.dtype == torch.float16
        y = torch.empty(
            (flat.shape[0], self.rows), dtype=torch.int32 if integers else torch.float32 if half else x.dtype
        )
        if residual is not None and (
            residual.shape != y.shape or residual.dtype != y.dtype or residual.stride(1) != 1 or half or integers
        ):
            raise ShapeError(
                f"The residual must be {tuple(y.shape)} in {y.dtype} with contiguous rows, as the result is, got {tuple(residual.shape)} in {residual.dtype}."
            )
        self.into(flat, y, residual, integers=integers)
        if half and not integers:
            y = y.to(torch.float16)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.rows)

    def into(
        self, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None, *, integers: bool = False
    ) -> None:
        """The same for x (tokens, in) and y (tokens, out) that are known to fit, with contiguous rows."""
        self.run(
            x.data_ptr(), TYPES[x.dtype], x.stride(0), x.shape[0], y.data_ptr(), 1 if y.dtype == torch.bfloat16 else 0,
            y.stride(0), address(residual), 0 if residual is None else residual.stride(0), integers, threads(),
        )  # fmt: skip
