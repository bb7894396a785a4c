"""Products with packed weights, and the operator by which they are traced.

Owns: `torch.ops.arrondi.linear`, `linear`, `bind`, `product_of`, and `integer_linear` (exact int32 sums). The kernels are in
`native/`; other codes than integers are multiplied in float32, or as pairs of bfloat16 where x is bfloat16 and has many rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.kernels.kernel import Bound, Meta, Tensors
from arrondi.kernels.native_linear.coding import INTEGERS
from arrondi.kernels.native_linear.prepack import Facts, Parts, facts_of, parts_of
from arrondi.kernels.native_linear.rounding import DIGITS, rounding_of
from arrondi.kernels.product import Product

_MOST_COLUMNS_ZERO_POINT: Final = 32768
"""Int8 weights with activations that have a zero point: code - zero point has nine bits, and int32 sums of more may overflow."""

_COLUMNS_BACK: Final = 256
"""Columns of the weight that are decoded at a time for a gradient."""


def linear(x: torch.Tensor, tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) → (..., out); through `torch.ops.arrondi.linear`, so that it can be traced."""
    facts = facts_of(tensors, meta)
    return torch.ops.arrondi.linear(x, parts_of(tensors), facts, bias, *rounding_of(meta, facts.kind))


def bind(tensors: Tensors, meta: Meta, bias: torch.Tensor | None) -> Bound:
    """The product with all that does not depend on x worked out once."""
    return product_of(tensors, meta, bias)


def product_of(
    tensors: Tensors,
    meta: Meta,
    bias: torch.Tensor | None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: str | None = None,
) -> Product:
    """The product with what may come before and after it; see `Product`."""
    facts = facts_of(tensors, meta)
    return Product(parts_of(tensors), facts, *rounding_of(meta, facts.kind), bias, norm=norm, eps=eps, gate=gate)


def integer_linear(x: torch.Tensor, tensors: Tensors, meta: Meta) -> torch.Tensor:
    """The exact sums behind a product with integer activations: Σ (code(x) - zero point) · (code(w) - zero point), int32
    (..., out).

    Args:
        x: (..., in), rounded by `meta.inputs`.
        tensors, meta: of `NATIVE.prepack`; one scale a row.

    Raises:
        SchemeError: the weight or x has several groups, `meta.inputs` is not set, or it has a zero point and the weight
            more than 32768 columns.
    """
    facts = facts_of(tensors, meta)
    digits, rounding = rounding_of(meta, facts.kind)
    if rounding is None or rounding.group or facts.groups != 1:
        raise SchemeError(
            f"Exact sums need activations rounded to integers by token and one scale a row, got {meta.inputs} and {meta.scheme}."
        )
    if digits > 1 and meta.shape[1] > _MOST_COLUMNS_ZERO_POINT:
        raise SchemeError(
            f"Exact sums with a zero point of activations have up to {_MOST_COLUMNS_ZERO_POINT} columns, got shape {meta.shape}."
        )
    return Product(parts_of(tensors), facts, digits, rounding, None)(x, integers=True)


_library: Final = torch.library.Library("arrondi", "FRAGMENT")
_library.define("linear(Tensor x, Tensor?[] parts, int[] facts, Tensor? bias, int digits, int[]? rounding) -> Tensor")


def _linear_cpu(
    x: torch.Tensor,
    parts: Sequence[torch.Tensor | None],
    facts: Sequence[int],
    bias: torch.Tensor | None,
    digits: int,
    rounding: Sequence[int] | None,
) -> torch.Tensor:
    return Product(parts, facts, digits, rounding, bias)(x)


def _linear_fake(
    x: torch.Tensor, parts: Any, facts: Sequence[int], bias: Any, digits: int, rounding: Sequence[int] | None
) -> torch.Tensor:
    if len(facts) != len(Facts._fields) or x.dim() == 0 or x.shape[-1] != facts[2]:
        raise ShapeError(f"x must be (..., columns of the weight) for the facts {list(facts)}, got {tuple(x.shape)}.")
    if any(part is not None and part.device != x.device for part in parts):
        raise ShapeError(f"x and the weight must be on one device, got x on {x.device}.")
    return x.new_empty((*x.shape[:-1], facts[1]))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.parts, ctx.facts = Parts(*inputs[1]), Facts(*inputs[2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """grad @ W, some columns of W at a time. Rounding x counts as the identity."""
    facts = ctx.facts
    digits = DIGITS[torch.float32] if facts.kind in INTEGERS else 0
    parts = ctx.parts._replace(input_scale=None, input_zero_point=None)
    flat = grad.reshape(-1, facts.rows).float()
    found = []
    for start in range(0, facts.columns, _COLUMNS_BACK):
        count = min(_COLUMNS_BACK, facts.columns - start)
        unit = torch.zeros(count, facts.columns)
        unit[:, start : start + count].fill_diagonal_(1)
        found.append(flat @ torch.ops.arrondi.linear(unit, parts, facts, None, digits, None).T)
    return torch.cat(found, dim=1).to(grad.dtype).reshape(*grad.shape[:-1], facts.columns), *(None,) * 5


_library.impl("linear", _linear_cpu, "CPU")
torch.library.register_fake("arrondi::linear", _linear_fake, lib=_library)
torch.library.register_autograd("arrondi::linear", _backward, setup_context=_keep_for_backward, lib=_library)
