"""An optimizer's state in 8 bits: `Blocks`, log-spaced codes with a scale for every block.

Owns: `MAPS`, `Blocks`. The values are those of `arrondi.formats.dynamic_levels`, rounding is `arrondi.tensor.encoding`'s. Signed numbers (means of
gradients) and numbers without signs (means of squares) have a map each: seven decades, so that small squares are not rounded to 0, after
which a step would explode.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2021, arXiv:2110.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from arrondi.errors import DataError, unknown
from arrondi.formats import Format, codebook, dynamic_levels
from arrondi.tensor.encoding import decode, encode

MAPS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "dynamic8": codebook("dynamic8", dynamic_levels()),
        "dynamic8-unsigned": codebook("dynamic8-unsigned", dynamic_levels(False)),
    }
)
"""What a state dict calls a map → its values."""


@dataclass
class Blocks:
    """A flat state of `count` numbers.

    Attributes:
        codes: (count,) uint8.
        scale: (⌈count / block⌉,) float32, the largest magnitude of each block.
        map: a name of `MAPS`.
        block: numbers under one scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    map: str
    block: int

    @classmethod
    def zeros(cls, count: int, map: str, block: int, device: torch.device) -> Blocks:
        """A state of nothing but 0."""
        zero = encode(torch.zeros(1), MAPS[map]).item()
        codes = torch.full((count,), zero, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-count // block), device=device), map, block)

    @classmethod
    def of(cls, values: torch.Tensor, map: str, block: int) -> Blocks:
        """Numbers rounded, in the order of their memory; NaN and infinity make their block NaN."""
        flat = values.detach().reshape(-1).float()
        found = cls.zeros(flat.numel(), map, block, flat.device)
        found.write(0, flat)
        return found

    def write(self, start: int, values: torch.Tensor) -> None:
        """Round values into place.

        Args:
            start: a multiple of the block.
            values: (n,) float32; n a multiple of the block, or all that is left.
        """
        n, whole = values.numel(), -(-values.numel() // self.block)
        padded = torch.nn.functional.pad(values, (0, whole * self.block - n)).view(whole, self.block)
        scale = padded.abs().amax(dim=1)
        unit = padded / torch.where(scale == 0, 1.0, scale)[:, None]
        self.codes[start : start + n] = encode(unit, MAPS[self.map]).view(-1)[:n]
        self.scale[start // self.block : start // self.block + whole] = scale

    def read(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) float32; `start` a multiple of the block."""
        values = decode(self.codes[start:stop], MAPS[self.map])
        scale = self.scale[start // self.block : -(-stop // self.block)]
        return values * scale.repeat_interleave(self.block)[: stop - start]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + self.scale.nbytes

    def to_dict(self) -> dict[str, Any]:
        """As tensors, a number and a word, for state dicts."""
        return {"codes": self.codes, "scale": self.scale, "map": self.map, "block": self.block}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], count: int, device: torch.device) -> Blocks:
        """What `to_dict` gave, copied.

        Raises:
            DataError: it is not of so many numbers.
            SchemeError: its map is not known.
        """
        codes, scale, map, block = (given[k] for k in ("codes", "scale", "map", "block"))
        if map not in MAPS:
            raise unknown("map", str(map), MAPS)
        if codes.shape != (count,) or codes.dtype != torch.uint8 or scale.shape != (-(-count // block),):
            raise DataError(
                f"A state of {count} numbers in blocks of {block} does not have {tuple(codes.shape)} codes and {tuple(scale.shape)} scales. Load the state of this model."
            )
        return cls(codes.to(device, copy=True), scale.to(device, torch.float32, copy=True), map, block)
