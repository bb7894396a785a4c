"""What one token needs beside quantized products: ordinary weights at memory speed, and attention.

Owns: `dense_linear`, `attend` and `rotate`. PyTorch's own operators are made for many rows: with one row its bfloat16 product reads
memory at less than half speed, and its attention starts threads for a few microseconds of work. Compiled; the references are
`torch.nn.functional.linear` and `scaled_dot_product_attention`, which also take what these refuse.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.native import TYPES, check_ordinary, native, operand, threads

FEW: Final = 4
"""Rows up to which `dense_linear` is faster than PyTorch."""

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_ATTENDED: Final = (torch.float32, torch.bfloat16)
_WIDEST: Final = 256
"""Of a head, for which the kernels have registers."""
_LARGEST: Final = 2**31 - 1


def takes_dense(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `dense_linear` computes this: up to four rows, on the CPU, without gradients."""
    return (
        native is not None
        and type(x) is torch.Tensor
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1] > 0
        and x.numel() <= FEW * weight.shape[1]
        and weight.dtype in TYPES
        and x.dtype == weight.dtype
        and weight.device.type == x.device.type == "cpu"
        and weight.stride(1) == 1
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
    )


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` for what `takes_dense`; sums in float32, rounded once.

    Args:
        x: (..., in), at most four rows.
        weight: (out, in), rows contiguous, of the type of x.
        bias: (out,) or None.

    Raises:
        ShapeError: shapes, types or devices do not go together, or x has more rows.
    """
    check_ordinary(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    n, k = weight.shape if weight.dim() == 2 else (0, 0)
    if x.dim() == 0 or not k or x.shape[-1] != k or x.dtype != weight.dtype or n > _LARGEST or k > _LARGEST:
        raise ShapeError(
            f"dense_linear takes x (..., in) and a weight (out, in) of its type, got x {tuple(x.shape)} in {x.dtype} and a weight {tuple(weight.shape)} in {weight.dtype}."
        )
    if x.numel() > FEW * k:
        raise ShapeError(
            f"dense_linear takes up to {FEW} rows, got x of shape {tuple(x.shape)}. Use torch.nn.functional.linear."
        )
    rows = x.reshape(-1, k).float().contiguous()
    real = None if bias is None else bias.float().contiguous()
    y = torch.empty((rows.shape[0], n), dtype=torch.float32, device="cpu")
    x_at, bias_at = operand("x", rows, (len(rows), k), torch.float32), operand("bias", real, (n,), torch.float32)
    weight_at = operand("weight", weight, (n, k), _FLOATS, "last")
    _module().dense(
        len(rows), n, k, x_at, weight_at, TYPES[weight.dtype], weight.stride(0), bias_at, y.data_ptr(), threads()
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def takes_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` computes this: one sequence, one new token, heads of up to 256 in steps of 16, no gradients."""
    return (
        native is not None
        and type(query) is torch.Tensor
        and query.dim() == key.dim() == value.dim() == 4
        and query.shape[0] == 1
        and query.shape[2] == 1
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % 16 == 0
        and 0 < query.shape[3] <= _WIDEST
        and key.shape == value.shape
        and key.shape[0] == 1
        and key.shape[2] > 0
        and key.shape[1] > 0
        and query.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _ATTENDED
        and key.stride(3) == value.stride(3) == 1
        and query.device.type == key.device.type == value.device.type == "cpu"
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not torch.compiler.is_compiling()
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for what `takes_attention`, computed in float32. NaN and infinite scores give NaN, as in PyTorch.

    Args:
        query: (1, heads, 1, width).
        key, value: (1, key heads, length, width), the last axis contiguous; every key head serves heads / key heads queries
            in a row.

    Returns:
        (1, 1, heads, width), as transformers' attention functions do.

    Raises:
        ShapeError: shapes, types or devices do not go together.
    """
    if not (type(query) is type(key) is type(value) is torch.Tensor and query.layout is torch.strided):
        check_ordinary(query=query, key=key, value=value)
    asked, kept = query.shape, key.shape
    if len(asked) != 4 or len(kept) != 4 or asked[0] != 1 or asked[2] != 1 or kept[0] != 1:
        raise ShapeError(
            f"attend takes a query (1, heads, 1, width) and keys (1, key heads, length, width), got {tuple(asked)} and {tuple(kept)}."
        )
    heads, width, key_heads, length = asked[1], asked[3], kept[1], kept[2]
    if width % 16 or not 0 < width <= _WIDEST or not key_heads or not length or heads % key_heads or not heads:
        raise ShapeError(
            f"attend takes heads of 16 to {_WIDEST} numbers in steps of 16, keys that are not empty and as many queries to each, got a query {tuple(asked)} and keys {tuple(kept)}."
        )
    dtype, shape = query.dtype, (1, key_heads, length, width)
    query = query.contiguous()
    y = torch.empty((1, 1, heads, width), dtype=dtype, device="cpu")
    query_at = operand("query", query, asked, _ATTENDED)
    key_at, value_at = operand("key", key, shape, dtype, "last"), operand("value", value, shape, dtype, "last")
    _module().attend(
        heads, key_heads, width, length, query_at, key_at, key.stride(1), key.stride(2), value_at, value.stride(1),
        value.stride(2), y.data_ptr(), TYPES[dtype], scale, threads(),
    )  # fmt: skip
    return y


def rotate(
    x: torch.Tensor,
    heads: int,
    key_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotary positions in halves (Su et al., 2021, arXiv:2104.09864), in place: a · cos + (-second half, first half) · sin.

    Args:
        x: (tokens, at least (heads + key heads) · width), float32 or bfloat16, rows contiguous; heads, then key heads.
        cos, sin: (tokens, width), the dtype of x, contiguous.
        norm, key_norm: (width,) float32 contiguous: each head is divided by its root mean square and multiplied by it before.

    Raises:
        ShapeError: an odd width or one above 256, or tensors that do not fit it.
    """
    if not type(x) is type(cos) is type(sin) is torch.Tensor:
        check_ordinary(x=x, cos=cos, sin=sin)
    angles, found = cos.shape, x.shape
    if len(angles) == len(found) == 2:
        width, columns = angles[1], found[1]
    else:
        width = columns = 0
    if width % 2 or not 0 < width <= _WIDEST or heads < 0 or key_heads < 0 or columns < (heads + key_heads) * width:
        raise ShapeError(
            f"rotate takes x (tokens, at least (heads + key heads) · width) and cosines (tokens, width) of an even width of up to {_WIDEST}, got x {tuple(x.shape)}, {heads} + {key_heads} heads and cosines {tuple(cos.shape)}."
        )
    dtype, rows = x.dtype, angles[0]
    x_at = operand("x", x, (rows, columns), _ATTENDED, "rows")
    cos_at, sin_at = operand("cos", cos, angles, dtype), operand("sin", sin, angles, dtype)
    norm_at = key_norm_at = 0
    if norm is not None or key_norm is not None:
        norm_at = operand("norm", norm, (width,), torch.float32)
        key_norm_at = operand("key_norm", key_norm, (width,), torch.float32)
    _module().rotate(
        rows,
        heads,
        key_heads,
        width,
        x_at,
        x.stride(0),
        cos_at,
        sin_at,
        TYPES[dtype],
        norm_at,
        key_norm_at,
        eps,
        threads(),
    )


def _module() -> Any:
    if native is None:
        raise SchemeError(
            "The compiled kernels are not there: install a C++ compiler, then arrondi anew, or use PyTorch's own operators."
        )
    return native
