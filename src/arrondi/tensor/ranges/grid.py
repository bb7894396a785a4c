"""The grid of a tile, and what storing it does to its numbers.

Owns: `Grid` and `cat_grids`, the storage types `STORED` with their `SMALLEST` numbers, `round_scale` and `round_offset`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import torch

from arrondi.errors import DataError
from arrondi.formats import Scheme

STORED: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
"""Storage types of plain scales and offsets."""

SMALLEST: Final = {"float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}
"""The smallest positive number of each type, a subnormal one."""


class Grid(NamedTuple):
    """Where the codes of each tile lie: x ≈ scale · (value(code) - zero_point), or scale · value(code) + offset.

    All float32 except zero_point (int32), one entry for every tile. At most one of zero_point and offset is set.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Grid:
        """The grid whose parts are `change` of these."""
        zero, offset = (None if part is None else change(part) for part in (self.zero_point, self.offset))
        return Grid(change(self.scale), zero, offset)

    def reshape(self, *shape: int) -> Grid:
        """The same grid with all parts in another shape."""
        return self.map(lambda part: part.reshape(shape))


def cat_grids(grids: list[Grid]) -> Grid:
    """Grids of the same scheme, one after another."""
    if len(grids) == 1:
        return grids[0]

    def cat(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        there = [p for p in parts if p is not None]
        return torch.cat(there) if there else None

    zero, offset = cat([g.zero_point for g in grids]), cat([g.offset for g in grids])
    return Grid(torch.cat([g.scale for g in grids]), zero, offset)


def round_scale(scale: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """Scales as they will read back from storage; zero becomes one, underflow the smallest number that is not zero.

    Scales that are quantized in turn (`storage` is a scheme) are left in float32: they are rounded together with their
    peers. There zero becomes the smallest normal number, which cannot widen the range that the peers share.

    Raises:
        DataError: a scale is too large for the storage type.
    """
    if isinstance(storage, Scheme):
        return torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    _check_size(scale, storage, "scale")
    size = scale.abs().clamp(min=SMALLEST[storage])
    return torch.where(scale == 0, 1.0, torch.copysign(size, scale)).to(STORED[storage]).float()


def round_offset(offset: torch.Tensor, storage: str | Scheme) -> torch.Tensor:
    """Offsets as they will read back from storage; those that are quantized in turn are left in float32.

    Raises:
        DataError: an offset is too large for the storage type.
    """
    if isinstance(storage, Scheme) or storage == "float32":
        return offset
    _check_size(offset, storage, "offset")
    return offset.to(STORED[storage]).float()


def _check_size(values: torch.Tensor, storage: str, what: str) -> None:
    if bool((values.abs() > torch.finfo(STORED[storage]).max).any()):
        raise DataError(
            f"A {what} of {float(values.abs().max()):.3g} overflows {storage}. Store {what}s as bfloat16 or float32."
        )
