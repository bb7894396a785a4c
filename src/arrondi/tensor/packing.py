"""Codes ↔ bytes, lossless, no arithmetic on values.

Owns: `pack` and `unpack` with their slow references. The layout is one little-endian bit stream for every row (last axis): code j of width b occupies
bits [j·b, (j+1)·b) of its row, so the first code sits in the lowest bits, and 3-, 5-, 6- and 7-bit codes cross byte and
word borders. A row is padded with zero bits to a whole number of words. Read as int32 words, this is the `weight_packed`
of compressed-tensors (since its version 0.18) and the column stream of GPTQ's `qweight`.
"""

from __future__ import annotations

import torch

from arrondi.arguments import check_arguments
from arrondi.errors import ShapeError
from arrondi.native import native, operand, threads

_LARGEST_WORD = 1024
_LANES = 8
"""Codes handled at a time: 8 codes of b bits fill exactly b bytes."""


def packed_width(columns: int, bits: int, word_bytes: int = 1) -> int:
    """Bytes of one packed row of `columns` codes, padded to whole words.

    >>> packed_width(100, 4), packed_width(100, 3), packed_width(100, 3, word_bytes=4)
    (50, 38, 40)
    """
    used = -(-columns * bits // 8)
    return -(-used // word_bytes) * word_bytes


def pack(codes: torch.Tensor, bits: int, *, word_bytes: int = 1, lowest: int = 0) -> torch.Tensor:
    """Unsigned codes → bytes.

    Args:
        codes: (..., K) uint8, or int8 where `lowest` is negative; every code less `lowest` is below 2**bits.
        bits: 1 to 8.
        word_bytes: rows are padded to a multiple of this many bytes.
        lowest: the code that is stored as zero, `qmin` of signed formats.

    Returns:
        (..., packed_width(K, bits, word_bytes)) uint8.

    Raises:
        ShapeError: codes have another type or are a scalar, or `bits` is out of range.

    >>> pack(torch.tensor([[1, 8, 15, 7]], dtype=torch.uint8), 4).tolist()
    [[129, 127]]
    """
    check_arguments(pack, locals(), ShapeError)
    if word_bytes not in range(1, _LARGEST_WORD + 1) or lowest not in range(-128, 1):
        raise ShapeError(
            f"Words have 1 to {_LARGEST_WORD} bytes and the lowest code is -128 to 0, got {word_bytes} and {lowest}."
        )
    if lowest >= 0 or codes.dtype != torch.int8:
        _check(codes, bits)
    else:
        _check(codes.view(torch.uint8), bits)
    if native is None or codes.device.type != "cpu" or type(codes) is not torch.Tensor or not codes.numel():
        return pack_reference(codes.view(torch.uint8) - lowest % 256 if lowest else codes, bits, word_bytes=word_bytes)
    codes = codes.contiguous()
    columns = codes.shape[-1]
    width = packed_width(columns, bits, word_bytes)
    packed = torch.empty((*codes.shape[:-1], width), dtype=torch.uint8, device="cpu")
    rows = codes.numel() // columns
    codes_at = operand("codes", codes, codes.shape, (torch.uint8, torch.int8))
    packed_at = operand("packed codes", packed, packed.shape, torch.uint8)
    native.pack_rows(codes_at, rows, columns, bits, lowest, packed_at, width, threads())
    return packed


def pack_reference(codes: torch.Tensor, bits: int, *, word_bytes: int = 1) -> torch.Tensor:
    """The slow reference of `pack`, for codes that are uint8 already; on any device."""
    columns = codes.shape[-1]
    width = packed_width(columns, bits, word_bytes)
    if not codes.numel():
        return codes.new_zeros((*codes.shape[:-1], width))
    stored = width * 8 // bits if bits in (4, 8) else -(-width // bits) * _LANES
    if stored != columns:
        codes = torch.nn.functional.pad(codes, (0, stored - columns))
    if bits == 8:
        return _plain(codes).clone() if stored == columns else codes
    if bits == 4:
        # The low byte of a 16-bit lane holds the even code: (hi << 8 | lo) becomes hi << 4 | lo.
        aligned = codes.clone() if codes.storage_offset() % 2 else codes
        pairs = _plain(aligned).view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    lanes = codes.reshape(*codes.shape[:-1], -1, _LANES).to(torch.int64)
    word = torch.zeros(lanes.shape[:-1], dtype=torch.int64, device=codes.device)
    for j in range(_LANES):
        word |= lanes[..., j] << (j * bits)
    packed = word.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return _plain(packed[..., :width])


def unpack(packed: torch.Tensor, bits: int, columns: int, *, lowest: int = 0) -> torch.Tensor:
    """Bytes → codes; the inverse of `pack` for any word size.

    Args:
        packed: (..., at least packed_width(columns, bits)) uint8.
        bits: 1 to 8.
        columns: codes wanted of every row.
        lowest: the code that is stored as zero, `qmin` of signed formats.

    Returns:
        (..., columns) uint8, or int8 where `lowest` is negative.

    Raises:
        ShapeError: not uint8, or the rows are too short for `columns` codes.
    """
    check_arguments(unpack, locals(), ShapeError)
    if columns < 0 or lowest not in range(-128, 1):
        raise ShapeError(f"Rows have 0 or more codes, the lowest of which is -128 to 0, got {columns} and {lowest}.")
    _check(packed, bits)
    need = packed_width(columns, bits)
    if packed.shape[-1] < need:
        raise ShapeError(
            f"{columns} codes of {bits} bits need {need} bytes a row, got {packed.shape[-1]}. Is the width right?"
        )
    dtype = torch.int8 if lowest < 0 else torch.uint8
    if native is None or packed.device.type != "cpu" or type(packed) is not torch.Tensor or not packed.numel():
        return (unpack_reference(packed, bits, columns) + lowest % 256).view(dtype)
    packed = packed.contiguous()
    codes = torch.empty((*packed.shape[:-1], columns), dtype=dtype, device="cpu")
    width = packed.shape[-1]
    packed_at, codes_at = (
        operand("packed codes", packed, packed.shape, torch.uint8),
        operand("codes", codes, codes.shape, dtype),
    )
    native.unpack_stream(packed_at, width, bits, lowest, packed.numel() // width, columns, codes_at, threads())
    return codes


def unpack_reference(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The slow reference of `unpack`, for rows that are long enough; unsigned codes, on any device."""
    if bits == 8:
        return packed[..., :columns].clone()
    if bits == 4:
        both = torch.stack((packed & 15, packed >> 4), dim=-1)
        return both.flatten(-2)[..., :columns].contiguous()
    groups = -(-columns // _LANES)
    wide = torch.nn.functional.pad(packed[..., : groups * bits], (0, max(groups * bits - packed.shape[-1], 0)))
    lanes = torch.nn.functional.pad(wide.reshape(*packed.shape[:-1], groups, bits), (0, 8 - bits))
    word = lanes.contiguous().view(torch.int64)
    mask = 2**bits - 1
    codes = torch.stack([(word[..., 0] >> (j * bits)) & mask for j in range(_LANES)], dim=-1)
    return codes.flatten(-2)[..., :columns].to(torch.uint8)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, strides included: the transpose of a column calls itself contiguous, and yet `view` refuses it."""
    x = x.contiguous()
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


def _check(values: torch.Tensor, bits: int) -> None:
    if values.dtype != torch.uint8:
        raise ShapeError(
            f"Packing moves unsigned bytes, got {values.dtype}. Call quantize() first and subtract format.qmin."
        )
    if not values.ndim:
        raise ShapeError("Packing works along the last axis, got a scalar. Reshape it to (1,).")
    if not 1 <= bits <= 8:
        raise ShapeError(f"Codes have 1 to 8 bits, got {bits}.")
