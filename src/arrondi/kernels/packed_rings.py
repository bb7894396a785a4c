"""A packed weight of a trellis as numbers, some whole rings at a time: what the reference does with it.

Owns: `decoded_rings`, and `rings_at`, single rows. The codes are those of `store_codes`, a stream of bits a column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from arrondi.formats import Scheme
from arrondi.formats.trellis import RING, SIDE
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.storage import load_codes
from arrondi.tensor.turned import Sides, block_of, sides_of, unturn


@dataclass(frozen=True)
class Rings:
    """A packed weight.

    Attributes:
        codes: uint8 (in, bytes).
        scale: float32, of each row or of all.
        sides: of a turned tensor that brings its own.
        scheme, shape: of the weight, (out, in).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    sides: Sides | None
    scheme: Scheme
    shape: tuple[int, int]

    def parts(self, step: int) -> Iterator[slice]:
        """Rows that can be decoded without the others: whole rings in whole blocks of a turned side, at least `step` where there are as many."""
        rows, trellis, turned = self.shape[0], self.scheme.format.trellis, self.scheme.turned
        assert trellis is not None
        ring = RING if trellis.ring == "rows" else SIDE
        tall = ring if turned is None else math.lcm(ring, block_of(rows, turned))
        # The last ring has what is left over, too.
        last = max(rows // ring - (rows % ring > 0), 0) * ring // tall * tall
        step = -(-step // tall) * tall
        for start in range(0, last, step):
            yield slice(start, min(start + step, last))
        if last < rows:
            yield slice(last, rows)

    def decode(self, part: slice) -> torch.Tensor:
        """One of the parts, float32."""
        rows, columns = self.shape
        trellis, turned = self.scheme.format.trellis, self.scheme.turned
        assert trellis is not None
        # Parts begin at whole bytes: sixteen codes have two bytes for every bit of one.
        first, stop = part.start * sum(trellis.bits) // 16, part.stop * sum(trellis.bits) // 16
        stream = self.codes[:, first : self.codes.shape[1] if part.stop == rows else stop].contiguous()
        codes = load_codes(stream, (part.stop - part.start, columns), self.scheme.format)
        scale = self.scale if len(self.scale) == 1 and rows > 1 else self.scale[part]
        values = QTensor(codes, scale, None, None, replace(self.scheme, turned=None)).dequantize()
        if turned is None:
            return values
        sides = self.sides or sides_of(self.shape, turned, codes.device)
        return unturn(values, Sides(sides.rows[part], sides.columns), turned, rows=rows)


def decoded_rings(rings: Rings, step: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in float32, at least `step` rows at a time where there are as many."""
    for part in rings.parts(step):
        yield part, rings.decode(part)


def rings_at(rings: Rings, ids: torch.Tensor) -> torch.Tensor:
    """Rows (n,) of the weight, float32 (n, in), each with all of its ring."""
    found = torch.empty(len(ids), rings.shape[1], device=ids.device)
    for part in rings.parts(1):
        inside = (ids >= part.start) & (ids < part.stop)
        if bool(inside.any()):
            found[inside] = rings.decode(part)[ids[inside] - part.start]
    return found
