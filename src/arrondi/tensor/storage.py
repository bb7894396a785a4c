"""The parts of a QTensor as files and kernels keep them.

Owns: codes without their sign (`unsigned`, `signed`) and scales in their storage type (`store_scale`, `load_scale`; powers of two
are kept as their exponent byte, exponent + 127).
"""

from __future__ import annotations

import torch

from arrondi.errors import FileFormatError
from arrondi.formats import FORMATS, Format
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.ranges.grid import STORED


def unsigned(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes counted from the smallest one, uint8; the difference wraps as two's complement does."""
    return codes.view(torch.uint8) - format.qmin % 256


def signed(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """The inverse of `unsigned`: codes as a QTensor has them."""
    return (codes + format.qmin % 256).view(torch.int8) if format.qmin < 0 else codes


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
