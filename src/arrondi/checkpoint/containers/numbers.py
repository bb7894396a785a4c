"""Numbers as files of graphs hold them, where that is not as a model has them.

Owns: `Numbers`. Small constants are varints, matrices of products lie transposed, and biases are whole numbers under a scale; whatever is on no
grid that a scheme can say becomes the numbers that it means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from arrondi.errors import FileFormatError
from arrondi.tensor.packing import unpack

Part = Callable[[], torch.Tensor]
"""Gives a part of a grid, read when it is needed."""


@dataclass(frozen=True)
class Numbers:
    """From what is stored to what the model has.

    Attributes:
        dtype, shape: of what is stored.
        varints: name of the type whose numbers are stored as varints; None: the bytes are the numbers.
        transposed: the model has the transpose of the stored matrix.
        scales: what the codes are multiplied by, each with one number, one for each index of `axis`, or one for each block along it.
        zero: what is subtracted from the codes before.
        axis: of the stored shape, negative from the end.
        bits: of a code; below 8 several share a byte.
        signed: codes of fewer bits are signed.
        unpacked: the shape of the codes, where several share a byte.
        cast: a type of whole numbers that has all of them.
    """

    dtype: str
    shape: tuple[int, ...]
    varints: torch.dtype | None = None
    transposed: bool = False
    scales: tuple[Part, ...] = field(default=(), compare=False)
    zero: Part | None = field(default=None, compare=False)
    axis: int = 0
    bits: int = 8
    signed: bool = True
    unpacked: tuple[int, ...] = ()
    cast: torch.dtype | None = None

    def apply(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The model's tensor, of this shape.

        Raises:
            FileFormatError: other numbers than the shape has.
        """
        made = stored if self.varints is None else from_varints(stored, self.varints)
        inner = self.unpacked or (shape[::-1] if self.transposed else shape)
        if made.numel() != -(-math.prod(inner) * self.bits // 8):
            raise FileFormatError(
                f"{made.numel()} numbers are stored, and {tuple(inner)} of {self.bits} bits is said to be there. The file is damaged."
            )
        if self.scales:
            made = self._scaled(self._codes(made).reshape(inner))
        made = made.reshape(inner)
        if self.cast is not None:
            whole, made = made, made.to(self.cast)
            if not torch.equal(made.to(whole.dtype), whole):
                raise FileFormatError(f"A zero point is no {self.cast}. The file is damaged; make it again.")
        return (made.t() if self.transposed else made).reshape(shape).contiguous()

    def _codes(self, made: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return made
        count = int(np.prod(self.unpacked))
        return unpack(made.reshape(-1), self.bits, count, lowest=-(2 ** (self.bits - 1)) if self.signed else 0)

    def _scaled(self, codes: torch.Tensor) -> torch.Tensor:
        values = codes.double() if codes.dtype in (torch.int32, torch.int64, torch.uint32) else codes.float()
        if self.zero is not None:
            values = values - self._spread(self.zero().to(values.dtype), codes.shape)
        scale = None
        for part in self.scales:
            found = self._spread(part().float(), codes.shape)
            scale = found if scale is None else scale * found
        assert scale is not None
        return (values * scale.to(values.dtype)).float()

    def _spread(self, part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A part of the grid in a shape that goes with the codes."""
        if part.numel() == 1:
            return part.reshape(())
        axis = self.axis % len(shape)
        if part.ndim <= 1:
            if part.numel() != shape[axis]:
                raise FileFormatError(
                    f"A grid of {part.numel()} scales does not go with the shape {tuple(shape)}, axis {axis}."
                )
            return part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        size = -(-shape[axis] // max(part.shape[axis], 1))
        spread = part.repeat_interleave(size, dim=axis).narrow(axis, 0, shape[axis]) if size else part
        if spread.shape != shape:
            raise FileFormatError(f"A grid of the shape {tuple(part.shape)} does not go with the shape {tuple(shape)}.")
        return spread


def from_varints(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of a type that lie as varints in some bytes; of floats the bits are the numbers.

    Raises:
        FileFormatError: bytes that are no varints.
    """
    raw = stored.reshape(-1).numpy()
    ends = np.flatnonzero(raw < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends + 1 - starts
    if not len(ends) or ends[-1] != len(raw) - 1 or lengths.max() > 10:
        raise FileFormatError("Bytes that should be whole numbers of any length are none. The file is damaged.")
    values = np.zeros(len(ends), np.uint64)
    for i in range(int(lengths.max())):
        has = lengths > i
        values[has] |= (raw[starts[has] + i] & 127).astype(np.uint64) << np.uint64(7 * i)
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    return torch.from_numpy(values.astype(width)).view(dtype)
