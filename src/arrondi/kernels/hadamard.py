"""Hadamard matrices and the fast transform by them, which spreads outliers over a whole row before it is rounded.

Owns: `hadamard_matrix`, `is_order`, `hadamard`, its slow reference `hadamard_reference`, and the operator `torch.ops.arrondi.hadamard`.

A matrix of order n = m · 2^k is K ⊗ S: S is Sylvester's matrix of order 2^k (1867, Phil. Mag. 34), K one of Paley's two
of order m (1933, J. Math. and Phys. 12) with the smallest m there is; a power of two needs no K. With x as a matrix of
m × 2^k the product x H is Kᵀ x S: k stages of sums and differences and one small matrix product, n (k + m) operations
instead of n². QuaRot (arXiv:2404.00456) rotates activations with it.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Final

import torch

from arrondi.errors import ShapeError
from arrondi.native import TYPES, available, check_ordinary, native, operand, threads

_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def hadamard_matrix(n: int) -> torch.Tensor:
    """A matrix H of ±1 whose rows are orthogonal, H Hᵀ = n I; the same one on every machine.

    Args:
        n: m · 2^k where m is 1, q + 1 for a prime power q ≡ 3 (mod 4), or 2 (q + 1) for a prime power q ≡ 1 (mod 4):
            1, 2, 4 and 12, 20, 28, 36, 44, 52, 60, 76, 108, 140, 148 and others times powers of two.

    Returns:
        (n, n) int8. Symmetric if n is a power of two.

    Raises:
        ShapeError: there is none by these constructions; the message has the nearest orders.

    >>> hadamard_matrix(2).tolist()
    [[1, 1], [1, -1]]
    """
    m = _base_order(n)
    matrix = _paley(m)
    for _ in range((n // m).bit_length() - 1):
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu"))
    return matrix


def is_order(n: int) -> bool:
    """Whether `hadamard_matrix` has one of that order."""
    return _find_base(n) is not None


def hadamard(x: torch.Tensor, *, scale: float | None = None, transposed: bool = False) -> torch.Tensor:
    """x H · scale along the last axis, in n log n operations.

    Computed in float32 (float64 for float64) and rounded once. Differentiable; traced by torch.compile and torch.export
    as `torch.ops.arrondi.hadamard`.

    Args:
        x: (..., n) float32, bfloat16, float16 or float64; any strides, any device. The compiled kernel takes the CPU's
            first three types.
        scale: None for 1/√n, which makes the transform orthonormal.
        transposed: multiply by Hᵀ, which undoes the orthonormal transform.

    Returns:
        (..., n) in the type of x, contiguous.

    Raises:
        ShapeError: x has no axis, is not floating, or n is no order of `hadamard_matrix`.
    """
    recorded = torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad
    if type(x) is torch.Tensor and not recorded and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return _transform(x, scale, transposed)  # the way through PyTorch takes longer than the transform of a token
    return torch.ops.arrondi.hadamard(x, scale, transposed)


def hadamard_reference(x: torch.Tensor, *, scale: float | None = None, transposed: bool = False) -> torch.Tensor:
    """The slow reference of `hadamard`: a product with the matrix."""
    n = _check(x)
    matrix = hadamard_matrix(n).to(x.device, _wide(x))
    product = x.to(_wide(x)) @ (matrix.T if transposed else matrix)
    return (product * _scale(scale, n)).to(x.dtype)


def _check(x: torch.Tensor) -> int:
    check_ordinary(x=x)
    """The length of the last axis, which is an order."""
    if x.dim() == 0 or x.dtype not in _FLOATS:
        raise ShapeError(
            f"A Hadamard transform takes (..., n) in float32, bfloat16, float16 or float64, got shape {tuple(x.shape)} in {x.dtype}."
        )
    _base_order(int(x.shape[-1]), tuple(x.shape))
    return int(x.shape[-1])


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(scale: float | None, n: int) -> float:
    return 1 / math.sqrt(n) if scale is None else scale


def _base_order(n: int, shape: tuple[int, ...] | None = None) -> int:
    """The smallest m for n = m · 2^k, or the error, which names the shape that asked for it."""
    found = _find_base(n)
    if found is not None:
        return found
    below = next((k for k in range(n - 1, 0, -1) if _find_base(k)), None)
    above = next(k for k in itertools.count(max(n + 1, 1)) if _find_base(k))
    near = f"{above}" if below is None else f"{below} and {above}"
    where = "" if shape is None else f" for the last axis of shape {shape}"
    raise ShapeError(
        f"There is no Hadamard matrix of order {n}{where} by the constructions of Sylvester and Paley. "
        f"The nearest orders are {near}: pad to one, or transform blocks of a smaller one."
    )


@functools.lru_cache(maxsize=4096)
def _find_base(n: int) -> int | None:
    if n < 1:
        return None
    odd = n // (n & -n)
    if odd == 1:
        return 1
    orders = itertools.takewhile(lambda m: n % m == 0, (4 * odd << k for k in itertools.count()))
    return next((m for m in orders if _field(m - 1) or _second(m)), None)


def _second(m: int) -> tuple[int, int] | None:
    """The field of Paley's second construction."""
    return _field(m // 2 - 1) if m % 8 == 4 else None


@functools.lru_cache(maxsize=4096)
def _field(q: int) -> tuple[int, int] | None:
    """(p, r) with q = p^r and p an odd prime."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    r = round(math.log(q, p))
    return (p, r) if p**r == q else None


def _paley(m: int) -> torch.Tensor:
    """K of order m, int8: the first construction where there is one. On the CPU, whatever the default device is."""
    one = torch.ones((1, 1), dtype=torch.int8, device="cpu")
    if m == 1:
        return one
    first = _field(m - 1)
    field = first or _second(m)
    assert field is not None
    q = field[0] ** field[1]
    border = one.repeat(1, q)
    left = -border.T if first else border.T
    core = torch.cat((torch.cat((0 * one, border), 1), torch.cat((left, _differences(*field)), 1)))
    identity = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if first:
        return core + identity
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.int8, device="cpu")
    return torch.kron(core, plus) + torch.kron(identity, minus)


def _differences(p: int, r: int) -> torch.Tensor:
    """χ(a - b) for all a and b of the field of p^r elements, int8; element Σ dᵢ pⁱ has the digits dᵢ."""
    elements = torch.arange(p**r, dtype=torch.int32, device="cpu")
    number = torch.zeros((), dtype=torch.int32, device="cpu")
    for i in range(r):
        digit = elements // p**i % p
        number = number + (digit[:, None] - digit[None, :]) % p * p**i
    return torch.tensor(_character(p, r), dtype=torch.int8, device="cpu")[number.long()]


@functools.lru_cache(maxsize=16)
def _character(p: int, r: int) -> tuple[int, ...]:
    """χ of every element of the field of p^r: 1 for squares, -1 for the others, 0 for zero.

    Squares are the even powers of a generator. X is one modulo a primitive polynomial X^r - Σ cᵢ Xⁱ, and a polynomial
    is primitive if the powers of X run through all p^r - 1 elements; for r = 1, X is the number c₀.
    """
    for coefficients in itertools.product(range(p), repeat=r):
        character = [0] * p**r
        power = [1] + [0] * (r - 1)
        for exponent in range(p**r - 1):
            number = sum(digit * p**i for i, digit in enumerate(power))
            if number == 0 or character[number]:
                break
            character[number] = 1 - exponent % 2 * 2
            shifted = [0, *power[:-1]]
            power = [(low + power[-1] * c) % p for low, c in zip(shifted, coefficients, strict=True)]
        else:
            return tuple(character)
    raise AssertionError(f"{p} is no prime")


@functools.lru_cache(maxsize=8)
def _columns(m: int, transposed: bool) -> torch.Tensor:
    """K as native/transforms.h wants it, (m / 4, m, 4) float32."""
    matrix = _paley(m).T if transposed else _paley(m)
    return matrix.float().reshape(m, m // 4, 4).transpose(0, 1).contiguous()


def _transform(x: torch.Tensor, scale: float | None, transposed: bool = False) -> torch.Tensor:
    n = _check(x)
    factor = _scale(scale, n)
    if x.device.type == "cpu" and x.dtype in TYPES and available():
        return _compiled(x, factor, transposed)
    return _in_torch(x.reshape(-1, n).to(_wide(x)), factor, transposed).to(x.dtype).reshape(x.shape)


def _compiled(x: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    n = x.shape[-1]
    if x.dtype == torch.float16:
        return _compiled(x.float(), scale, transposed).half()
    m = _base_order(n)
    flat = x.reshape(-1, n)
    if flat.stride(1) != 1 or (len(flat) > 1 and flat.stride(0) < n):
        flat = flat.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    columns = _columns(m, transposed) if m > 1 else None
    assert native is not None
    native.hadamard(
        len(flat), m, (n // m).bit_length() - 1, operand("base", columns, (m // 4, m, 4), torch.float32), scale,
        operand("x", flat, (len(flat), n), x.dtype, "last"), flat.stride(0), operand("y", y, x.shape, x.dtype), n,
        TYPES[x.dtype], threads(),
    )  # fmt: skip
    return y


def _in_torch(x: torch.Tensor, scale: float, transposed: bool) -> torch.Tensor:
    """The transform of (rows, n) float32 or float64 in PyTorch's own operators: Aᵀ x B with H = A ⊗ B, both about √n wide.

    More operations than stages of sums and differences, but they are products of matrices, which are many times faster.
    """
    outer, inner = _halves(x.shape[1], x.dtype, x.device)
    y = (outer if transposed else outer.T) @ (x.reshape(len(x), len(outer), len(inner)) @ inner)
    return y.reshape(x.shape) * scale


@functools.lru_cache(maxsize=16)
def _halves(n: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, of which the second is symmetric."""
    m = _base_order(n)
    shift = max(((n // m).bit_length() - (m - 1).bit_length()) // 2, 0)
    outer = min(m << shift, n)
    return hadamard_matrix(outer).to(device, dtype), hadamard_matrix(n // outer).to(device, dtype)


def _transform_fake(x: torch.Tensor, scale: float | None, transposed: bool = False) -> torch.Tensor:
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_Inputs = tuple[torch.Tensor, float | None, bool]


def _remember(ctx: Any, inputs: _Inputs, output: torch.Tensor) -> None:
    _, ctx.scale, ctx.transposed = inputs


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """Linear: the gradient goes back through the transpose."""
    return torch.ops.arrondi.hadamard(grad, ctx.scale, not ctx.transposed), None, None


_library: Final = torch.library.Library("arrondi", "FRAGMENT")
_library.define("hadamard(Tensor x, float? scale, bool transposed=False) -> Tensor")
_library.impl("hadamard", _transform, "CompositeExplicitAutograd")
torch.library.register_fake("arrondi::hadamard", _transform_fake, lib=_library)
torch.library.register_autograd("arrondi::hadamard", _backward, setup_context=_remember, lib=_library)
