"""A quantized weight of which every element learns to which side it is rounded: `SoftSides`, AdaRound's stand-in.

Like the stand-ins of `arrondi.repair.soft`, with a regulariser that brings every element to one of its two sides.

Source: Nagel et al. 2020, arXiv:2004.10568; Li et al. 2021, arXiv:2102.05426 (BRECQ) learns the same for all layers of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from arrondi.formats import tile_shape
from arrondi.rounding.adaround import rectified, unrectified
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.tiling import from_tiles, to_tiles

_INSIDE = 1e-4
"""How close to a whole side an element begins; nearer, V would be infinite."""


@dataclass
class SoftSides:
    """Scales stay; every element is its lower neighbour on the grid plus h(V) steps.

    Attributes:
        q: the weight as it was rounded at first; only its grid is used.
        floor: the lower neighbours in steps, in tiles (groups, elements).
        v: V, like the tiles.
    """

    q: QTensor
    floor: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, q: QTensor, weight: torch.Tensor) -> SoftSides:
        """Beginning at the weight itself.

        Args:
            q: integer codes of groups, with plain scales.
            weight: (m, n), what q stands for.
        """
        tiles = to_tiles(weight.float(), tile_shape(q.scheme.granularity, q.shape)) / q.real_scale.reshape(-1, 1)
        floor = torch.floor(tiles)
        share = (tiles - floor).clamp(_INSIDE, 1 - _INSIDE)
        return cls(q, floor, unrectified(share).requires_grad_())

    @classmethod
    def at(cls, q: QTensor, weight: torch.Tensor) -> SoftSides:
        """Beginning at the codes that a method has chosen: halfway between the weight and its code, so that every element keeps its side."""
        made, tile = cls.of(q, weight), tile_shape(q.scheme.granularity, q.shape)
        codes = to_tiles(q.codes, tile).float()
        chosen = (codes if made._zero is None else codes - made._zero) - made.floor
        share = (rectified(made.v.detach()) + chosen.clamp(0, 1)) / 2
        return cls(q, made.floor, unrectified(share.clamp(_INSIDE, 1 - _INSIDE)).requires_grad_())

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        return (self.v,)

    @property
    def speeds(self) -> Sequence[float]:
        return (1.0,)

    def value(self) -> torch.Tensor:
        return from_tiles(self._levels(rectified(self.v)) * self.q.real_scale.reshape(-1, 1), self._tile, self.q.shape)

    def undecided(self, beta: float) -> torch.Tensor:
        """The mean of 1 - |2 h(V) - 1|^β, which is nothing once every element has a side; nothing for an infinite β, too."""
        if math.isinf(beta):
            return self.v.new_zeros(())
        return (1 - (2 * rectified(self.v) - 1).abs() ** beta).mean()

    def limit(self) -> None:
        """V may be any number."""

    @torch.no_grad()
    def hard(self) -> QTensor:
        zero = self._zero
        codes = self._levels((self.v >= 0).float()) + (0 if zero is None else zero)
        return replace(self.q, codes=from_tiles(codes.to(code_dtype(self.q.scheme.format)), self._tile, self.q.shape))

    def _levels(self, side: torch.Tensor) -> torch.Tensor:
        """Steps from zero, within the codes that there are."""
        format, zero = self.q.scheme.format, self._zero
        if zero is None:
            return (self.floor + side).clamp(format.qmin, format.qmax)
        return (self.floor + side + zero).clamp(format.qmin, format.qmax) - zero

    @property
    def _zero(self) -> torch.Tensor | None:
        return None if self.q.zero_point is None else self.q.zero_point.reshape(-1, 1).float()

    @property
    def _tile(self) -> tuple[int, ...]:
        return tile_shape(self.q.scheme.granularity, self.q.shape)
