"""A call of the compiled product.

Owns: `Product`, what stays the same from call to call checked and handed over once, and `GATES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from arrondi.errors import ShapeError, unknown
from arrondi.kernels.native_linear.prepack import check_parts
from arrondi.kernels.native_linear.rounding import check_rounding
from arrondi.native import TYPES, native, operand, threads

GATES: Final = {None: 0, "silu": 1, "gelu_tanh": 2}
"""Functions that a gated product knows, as native/kernels.h numbers them."""

_FLOATS: Final = tuple(TYPES)
_RESULTS: Final = (torch.float32, torch.bfloat16)


class Product:
    """y = x Wᵀ + bias with the packed weight bound.

    Args:
        parts, facts: of the weight; see `native_linear.prepack`.
        digits, rounding: how x is rounded; see `native_linear.rounding`.
        bias: (out,) or None.
        norm: (in,): x is replaced by x / √(mean(x²) + eps) · norm (RMS norm; Zhang, Sennrich, 2019, arXiv:1910.07467).
        gate: a key of `GATES`: of the results, y = gate(first half) · second half.

    Raises:
        ShapeError: tensors or numbers do not fit each other.
        SchemeError: there is no such gate.
    """

    __slots__ = ("columns", "kept", "rows", "run", "shape")

    def __init__(
        self,
        parts: Sequence[torch.Tensor | None],
        facts: Sequence[int],
        digits: int,
        rounding: Sequence[int] | None,
        bias: torch.Tensor | None,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gate: str | None = None,
    ) -> None:
        if gate not in GATES:
            raise unknown("gate", str(gate), [name for name in GATES if name])
        found, weight, addresses = check_parts(parts, facts)
        rounded = check_rounding(digits, rounding)
        real, weights = (None if t is None else t.detach().float().contiguous() for t in (bias, norm))
        self.kept = (found, real, weights)  # addresses are good as long as the tensors live
        self.shape = (weight.rows, weight.columns)
        self.rows, self.columns = (weight.rows if gate is None else weight.rows // 2), weight.columns
        assert native is not None
        *of_weight, input_scale, input_zero = addresses
        bias_at = operand("bias", real, (weight.rows,), torch.float32)
        norm_at = operand("norm", weights, (weight.columns,), torch.float32)
        scales = (input_scale, input_zero) if rounded else (0, 0)
        try:
            self.run = native.Product(
                list(weight), *of_weight, digits, list(rounded or ()), *scales, bias_at, norm_at, eps, GATES[gate]
            )
        except ValueError as error:  # what depends on several facts at once is checked there
            raise ShapeError(f"A compiled product of shape {self.shape} cannot be: {error}.") from None

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
        if x.shape[-1:] != (k,) or x.dtype not in TYPES or not x.is_cpu:
            raise ShapeError(
                f"x must be (..., {k}) on the CPU in float32, bfloat16 or float16 for a weight of shape {self.shape}, got {tuple(x.shape)} in {x.dtype} on {x.device}."
            )
        flat = x if x.dim() == 2 else x.reshape(-1, k)
        if flat.stride(1) != 1 or flat.stride(0) < k:
            flat = flat.contiguous()
        half = x.dtype is torch.float16
        result = torch.int32 if integers else torch.float32 if half else x.dtype
        y = torch.empty((flat.shape[0], self.rows), dtype=result, device="cpu")
        if residual is not None and (half or integers):
            raise ShapeError(
                f"Something is added to results of float32 or bfloat16 activations, got {x.dtype}. Add it afterwards."
            )
        if residual is None and type(flat) is torch.Tensor and flat.layout is torch.strided and not flat.is_neg():
            self._compute(flat, flat.data_ptr(), y, y.data_ptr())  # they were made to fit
        else:
            self.into(flat, y, residual)
        if half and not integers:
            y = y.to(torch.float16)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.rows)

    def into(self, x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """The same for x (tokens, in), written into y (tokens, out); both with contiguous rows. An int32 y takes exact sums.

        Raises:
            ShapeError: x or y does not fit the weight, or the residual y.
        """
        tokens = x.shape[0] if x.dim() == 2 else -1
        dtypes = torch.int32 if y.dtype is torch.int32 else _RESULTS
        x_at = operand("x", x, (tokens, self.columns), _FLOATS, "rows")
        y_at = operand("y", y, (tokens, self.rows), dtypes, "rows")
        self._compute(x, x_at, y, y_at, residual, operand("residual", residual, (tokens, self.rows), y.dtype, "last"))

    def _compute(
        self,
        x: torch.Tensor,
        x_at: int,
        y: torch.Tensor,
        y_at: int,
        residual: torch.Tensor | None = None,
        added: int = 0,
    ) -> None:
        dtype = y.dtype
        try:
            self.run(
                x_at, TYPES[x.dtype], x.stride(0), x.shape[0], y_at, 1 if dtype is torch.bfloat16 else 0, y.stride(0), added,
                0 if residual is None else residual.stride(0), dtype is torch.int32, threads(),
            )  # fmt: skip
        except ValueError as error:  # what depends on several facts at once is checked there
            raise ShapeError(f"A compiled product of shape {self.shape} cannot be: {error}.") from None
