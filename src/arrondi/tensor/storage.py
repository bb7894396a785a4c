"""The parts of a QTensor as files and kernels keep them.

Owns: codes without their sign (`unsigned`, `signed`), codes as bits (`store_codes`, `load_codes`: a stream a row, or of a trellis a stream a
column, in which its rings follow each other) and scales in their storage type (`store_scale`, `load_scale`; powers of two are kept as
their exponent byte, exponent + 127).
"""

from __future__ import annotations

import math

import torch

from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, Format
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.packing import pack, packed_width, unpack
from arrondi.tensor.ranges.grid import STORED


def unsigned(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes counted from the smallest one, uint8; the difference wraps as two's complement does."""
    return codes.view(torch.uint8) - format.qmin % 256


def signed(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The inverse of `unsigned`: codes as a QTensor has them."""
    return (codes + format.qmin % 256).view(torch.int8) if format.qmin < 0 else codes


def code_line(shape: tuple[int, ...], format: Format) -> tuple[int, int]:
    """How many stored codes are in a line, and their bits. Those of half a bit are stored in pairs."""
    if format.trellis is None:
        return shape[-1], format.bits
    even, odd = format.trellis.bits
    return (shape[0], even) if even == odd else (-(-shape[0] // 2), even + odd)


def stored_shape(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """The shape of stored codes, uint8: rows of bytes, or columns of bytes of a trellis."""
    lines = shape[:-1] if format.trellis is None else shape[1:]
    return (*lines, packed_width(*code_line(shape, format)))


def code_bits(shape: tuple[int, ...], format: Format) -> int:
    """Bits of stored codes."""
    return 8 * math.prod(stored_shape(shape or (1,), format))


def store_codes(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes as bits, uint8 of `stored_shape`."""
    if format.trellis is None:
        return pack(codes, format.bits, lowest=format.qmin)
    lines, (even, odd) = codes.T.contiguous(), format.trellis.bits
    if even != odd:
        lines = torch.nn.functional.pad(lines, (0, lines.shape[1] % 2))
        lines = lines[:, ::2] | lines[:, 1::2] << even
    return pack(lines, code_line(tuple(codes.shape), format)[1])


def load_codes(stored: torch.Tensor, shape: tuple[int, ...], format: Format) -> torch.Tensor:
    """The inverse of `store_codes`: codes as a QTensor of `shape` has them."""
    if format.trellis is None:
        return unpack(stored, format.bits, shape[-1], lowest=format.qmin)
    count, bits = code_line(shape, format)
    lines, (even, odd) = unpack(stored, bits, count), format.trellis.bits
    if even != odd:
        lines = torch.stack((lines & (2**even - 1), lines >> even), dim=-1).flatten(1)[:, : shape[0]]
    return lines.T.contiguous()


def store_scale(scale: torch.Tensor, storage: str) -> torch.Tensor:
    """Float32 scales, already rounded to `storage`, in that type; for e8m0 uint8."""
    return encode(scale, FORMATS["e8m0"]) if storage == "e8m0" else scale.to(STORED[storage])


def load_scale(stored: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32; bytes are exponents of powers of two.

    Raises:
        FileFormatError: they are neither bytes nor floating-point numbers.
    """
    if stored.dtype == torch.uint8:
        return decode(stored, FORMATS["e8m0"])
    if not stored.dtype.is_floating_point:
        raise FileFormatError(
            f"Scales are stored as floating-point numbers or as bytes (uint8, exponents of powers of two), got {stored.dtype}."
        )
    return stored.float()
