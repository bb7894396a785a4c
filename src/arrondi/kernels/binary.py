"""Products of signs: 32 to a word, compared by exclusive or, counted.

Owns: `pack_signs`, `sign_tiles`, `binary_linear`, its slow reference `binary_linear_reference`, and the operators
`torch.ops.arrondi.pack_signs` and `torch.ops.arrondi.binary_linear`.

Source: Rastegari, Ordonez, Redmon, Farhadi 2016, "XNOR-Net", arXiv:1603.05279. Bits that differ are products of -1, so
that Σ sign(x) sign(w) = K - 2 · popcount(x ^ w), an exact integer. With scale = mean|w| of each output and token_scale
= mean|x| of each token it is the paper's approximation of x @ w.T.

A sign is +1 above zero and -1 at zero, below it, and for NaN: as the format `binary` encodes finite numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from arrondi.errors import ShapeError
from arrondi.native import TYPES, available, native, operand, threads

_WORD: Final = 32
_BLOCK: Final = 16
_LARGEST: Final = 2**31 - 1
_RESULTS: Final = (torch.int32, torch.float32, torch.bfloat16, torch.float16)


def pack_signs(x: torch.Tensor) -> torch.Tensor:
    """The signs of x as bits: bit j of word i is 1 where x[..., 32 i + j] > 0; bits beyond the row are 0.

    Args:
        x: (..., K) in a floating type, any strides, any device.

    Returns:
        (..., ceil(K / 32)) int32.

    Raises:
        ShapeError: x has no column, or is not floating.
    """
    return torch.ops.arrondi.pack_signs(x)


def sign_tiles(bits: torch.Tensor) -> torch.Tensor:
    """A weight's signs as `binary_linear` reads them: word by word, sixteen rows beside each other.

    Args:
        bits: (N, words) int32 from `pack_signs`.

    Returns:
        (ceil(N / 16), words, 16) int32, rows that are not there filled with 0.

    Raises:
        ShapeError: bits is not an int32 matrix.
    """
    if bits.dim() != 2 or bits.dtype != torch.int32:
        raise ShapeError(f"sign_tiles takes bits (N, words) in int32, got shape {tuple(bits.shape)} in {bits.dtype}.")
    rows, words = bits.shape
    padded = torch.nn.functional.pad(bits, (0, 0, 0, -rows % _BLOCK))
    return padded.reshape(-1, _BLOCK, words).transpose(1, 2).contiguous()


def binary_linear(
    x_bits: torch.Tensor,
    w_tiles: torch.Tensor,
    shape: tuple[int, int],
    *,
    scale: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y[..., n] = Σ sign(x[..., k]) · sign(w[n, k]), exact, and times the scales where they are given.

    Args:
        x_bits: (..., ceil(K / 32)) int32 from `pack_signs`.
        w_tiles: (ceil(N / 16), ceil(K / 32), 16) int32 from `sign_tiles`, on the same device.
        shape: of the weight, (N, K).
        scale: (N,) float, of each output.
        token_scale: the shape of x_bits without its last axis, float, of each token.
        dtype: of the result. None: int32 without scales, float32 with them. Scales are applied in float32, the token's
            first, and the product is rounded once to it.

    Returns:
        (..., N).

    Raises:
        ShapeError: a tensor does not fit the shape, or has the wrong type or device.
    """
    wanted = dtype or (torch.int32 if scale is None and token_scale is None else torch.float32)
    return torch.ops.arrondi.binary_linear(x_bits, w_tiles, shape, scale, token_scale, wanted)


def binary_linear_reference(
    x_bits: torch.Tensor,
    w_tiles: torch.Tensor,
    shape: Sequence[int],
    scale: torch.Tensor | None = None,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int32,
) -> torch.Tensor:
    """The slow reference of `binary_linear`: a product of matrices of ±1, exact in float64."""
    rows, columns = shape
    w_bits = w_tiles.transpose(1, 2).reshape(-1, w_tiles.shape[1])[:rows]
    y = (_unpacked(x_bits, columns) @ _unpacked(w_bits, columns).T).to(torch.int32)
    if dtype == torch.int32:
        return y
    real = y.float()
    if token_scale is not None:
        real = real * token_scale.float()[..., None]
    if scale is not None:
        real = real * scale.float()
    return real.to(dtype)


def _unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """(..., words) int32 → (..., columns) of ±1, float64."""
    ones = bits[..., None] >> torch.arange(_WORD, dtype=torch.int32, device=bits.device) & 1
    return (2 * ones.flatten(-2)[..., :columns] - 1).double()


def _check_signs(x: torch.Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.dtype.is_floating_point:
        raise ShapeError(
            f"pack_signs takes (..., K) in a floating type, K > 0, got shape {tuple(x.shape)} in {x.dtype}."
        )


def _pack(x: torch.Tensor) -> torch.Tensor:
    _check_signs(x)
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    words = -(-columns // _WORD)
    if x.device.type == "cpu" and x.dtype in TYPES and columns <= _LARGEST - _WORD and available():
        if flat.stride(1) != 1 or (len(flat) > 1 and flat.stride(0) < columns):
            flat = flat.contiguous()
        out = torch.empty((*x.shape[:-1], words), dtype=torch.int32, device="cpu")
        assert native is not None
        flat_at = operand("x", flat, (len(flat), columns), x.dtype, "last")
        out_at = operand("bits", out, (*x.shape[:-1], words), torch.int32)
        native.pack_signs(len(flat), columns, flat_at, flat.stride(0), TYPES[x.dtype], out_at, threads())
        return out
    bits = torch.nn.functional.pad((flat > 0).int(), (0, -columns % _WORD)).unflatten(-1, (words, _WORD))
    # The top bit makes a word negative: shifts and sums in int32 wrap as the compiled kernel's do.
    packed = (bits << torch.arange(_WORD, dtype=torch.int32, device=x.device)).sum(dim=-1, dtype=torch.int32)
    return packed.reshape(*x.shape[:-1], words)


def _pack_fake(x: torch.Tensor) -> torch.Tensor:
    _check_signs(x)
    return x.new_empty((*x.shape[:-1], (x.shape[-1] + _WORD - 1) // _WORD), dtype=torch.int32)


def _check(
    x_bits: torch.Tensor,
    w_tiles: torch.Tensor,
    shape: Sequence[int],
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    if len(shape) != 2 or not 0 <= shape[0] <= _LARGEST or not 0 < shape[1] <= _LARGEST - _WORD:
        raise ShapeError(f"The shape of a binary weight is (N, K) with K > 0, got {tuple(shape)}.")
    rows, columns = shape
    words = -(-columns // _WORD)
    wanted = (-(-rows // _BLOCK), words, _BLOCK)
    if tuple(w_tiles.shape) != wanted or w_tiles.dtype != torch.int32:
        raise ShapeError(
            f"The tiles of a binary weight of shape {(rows, columns)} are {wanted} in int32, got {tuple(w_tiles.shape)} in {w_tiles.dtype}. Make them with sign_tiles."
        )
    if x_bits.shape[-1:] != (words,) or x_bits.dtype != torch.int32:
        raise ShapeError(
            f"x_bits must be (..., {words}) in int32 for a binary weight of shape {(rows, columns)}, got {tuple(x_bits.shape)} in {x_bits.dtype}."
        )
    for name, part, size in (("scale", scale, (rows,)), ("token_scale", token_scale, tuple(x_bits.shape[:-1]))):
        if part is not None and (tuple(part.shape) != size or not part.dtype.is_floating_point):
            raise ShapeError(f"{name} must be {size} in a floating type, got {tuple(part.shape)} in {part.dtype}.")
    if dtype not in _RESULTS or (dtype == torch.int32 and (scale is not None or token_scale is not None)):
        scales = [name for name, part in (("scale", scale), ("token_scale", token_scale)) if part is not None]
        raise ShapeError(
            f"The result is int32 without scales, or float32, bfloat16 or float16, got {dtype} with {' and '.join(scales) or 'none'} for {tuple(shape)}."
        )
    devices = {t.device for t in (x_bits, w_tiles, scale, token_scale) if t is not None}
    if len(devices) > 1:
        raise ShapeError(
            f"x_bits, w_tiles and scales must be on one device, got {', '.join(sorted(map(str, devices)))}."
        )


def _linear(
    x_bits: torch.Tensor,
    w_tiles: torch.Tensor,
    shape: Sequence[int],
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check(x_bits, w_tiles, shape, scale, token_scale, dtype)
    if x_bits.device.type != "cpu" or not available():
        return binary_linear_reference(x_bits, w_tiles, shape, scale, token_scale, dtype)
    if dtype == torch.float16:
        return _linear(x_bits, w_tiles, shape, scale, token_scale, torch.float32).half()
    rows, columns = shape
    bits, tiles = x_bits.contiguous(), w_tiles.contiguous()
    scales = [None if part is None else part.float().contiguous() for part in (token_scale, scale)]
    y = torch.empty((*x_bits.shape[:-1], rows), dtype=dtype, device="cpu")
    integers = dtype == torch.int32
    tokens, words = bits.shape[:-1].numel(), bits.shape[-1]
    assert native is not None
    native.multiply_signs(
        tokens, rows, columns, operand("x_bits", bits, (*x_bits.shape[:-1], words), torch.int32),
        operand("w_tiles", tiles, (-(-rows // _BLOCK), words, _BLOCK), torch.int32), operand("y", y, tuple(y.shape), dtype),
        0 if integers else TYPES[dtype], integers, operand("token_scale", scales[0], x_bits.shape[:-1], torch.float32),
        operand("scale", scales[1], (rows,), torch.float32), threads(),
    )  # fmt: skip
    return y


def _linear_fake(
    x_bits: torch.Tensor,
    w_tiles: torch.Tensor,
    shape: Sequence[int],
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    _check(x_bits, w_tiles, shape, scale, token_scale, dtype)
    return x_bits.new_empty((*x_bits.shape[:-1], shape[0]), dtype=dtype)


_library: Final = torch.library.Library("arrondi", "FRAGMENT")
_library.define("pack_signs(Tensor x) -> Tensor")
_library.define(
    "binary_linear(Tensor x_bits, Tensor w_tiles, int[] shape, Tensor? scale, Tensor? token_scale, ScalarType dtype) -> Tensor"
)
_library.impl("pack_signs", _pack, "CompositeExplicitAutograd")
_library.impl("binary_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("arrondi::pack_signs", _pack_fake, lib=_library)
torch.library.register_fake("arrondi::binary_linear", _linear_fake, lib=_library)
