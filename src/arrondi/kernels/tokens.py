"""What one token needs beside quantized products: ordinary weights at memory speed, and attention.

Owns: `dense_linear`, `attend` and `rotate`. PyTorch's own operators are made for many rows: with one row its bfloat16 product reads
memory at less than half speed, and its attention starts threads for a few microseconds of work. Compiled; the twins are
`torch.nn.functional.linear` and `scaled_dot_product_attention`, which also take what these refuse.
"""

from __future__ import annotations

from typing import Final

import torch

from arrondi.native import TYPES, address, native, threads

FEW: Final = 4
"""Rows up to which `dense_linear` is faster than PyTorch."""


def takes_dense(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `dense_linear` computes this: up to four rows, on the CPU, without gradients."""
    return (
        native is not None
        and type(x) is torch.Tensor
        and x.numel() <= FEW * x.shape[-1]
        and weight.dtype in TYPES
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
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
        weight: (out, in), rows contiguous.
        bias: (out,) or None.
    """
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    n, k = weight.shape
    y = torch.empty((rows.shape[0], n), dtype=torch.float32)
    real = None if bias is None else bias.float().contiguous()
    assert native is not None
    native.dense(
        rows.shape[0], n, k, address(rows), address(weight), TYPES[weight.dtype], weight.stride(0), address(real),
        address(y), threads(),
    )  # fmt: skip
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def takes_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` computes this: one sequence, one new token, heads of up to 256 in steps of 16, no gradients."""
    return (
        native is not None
        and type(query) is torch.Tensor
        and query.dim() == 4
        and query.shape[0] == 1
        and query.shape[2] == 1
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % 16 == 0
        and query.shape[3] <= 256
        and key.shape == value.shape
        and key.shape[2] > 0
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and key.stride(3) == value.stride(3) == 1
        and query.device.type == "cpu"
        and not (torch.is_grad_enabled() and query.requires_grad)
        and not torch.compiler.is_compiling()
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for what `takes_attention`, computed in float32.

    Args:
        query: (1, heads, 1, width).
        key, value: (1, key heads, length, width); every key head serves heads / key heads queries in a row.

    Returns:
        (1, 1, heads, width), as transformers' attention functions do.
    """
    _, heads, _, width = query.shape
    query = query.contiguous()
    y = torch.empty((1, 1, heads, width), dtype=query.dtype)
    assert native is not None
    native.attend(
        heads, key.shape[1], width, key.shape[2], address(query), address(key), key.stride(1), key.stride(2),
        address(value), value.stride(1), value.stride(2), address(y), TYPES[query.dtype], scale, threads(),
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
        ValueError: an odd width, or one above 256.
    """
    rows, width = cos.shape
    assert native is not None
    native.rotate(
        rows, heads, key_heads, width, address(x), x.stride(0), address(cos), address(sin), TYPES[x.dtype],
        address(norm), address(key_norm), eps, threads(),
    )  # fmt: skip
