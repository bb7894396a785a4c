"""Quantized weights with something in them that can be learned: `SoftScale` and `SoftRounding`.

Owns: how a weight's value follows from what is learned, and the QTensor that it is in the end. A stand-in has `parameters`
(leaves that want gradients), `value` (m, n) as a function of them, `limit` (back into their domain after a step of an optimizer) and `hard`.
What a stand-in computes with is what its QTensor will hold: `value` of the learned numbers equals `hard().dequantize()` but for the rounding of
scales to their storage.

Sources: learned scales are those of Esser et al. 2020, arXiv:1902.08153, with codes that stay; learned rounding is that of Cheng et al. 2023,
arXiv:2309.05516 (AutoRound), and, without bounds, the latent weights of Yao et al. 2022, arXiv:2206.01861 (ZeroQuant's distillation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch

from arrondi.formats import Scheme, tile_shape
from arrondi.formats.scheme import PLAIN
from arrondi.tensor.encoding import code_dtype
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import round_scale
from arrondi.tensor.tiling import from_tiles, to_tiles

_INSIDE: Final = 0.49
"""Of a step: how far from its code a weight begins at most."""
_TIES: Final = 1e-3
"""Share of codes that may differ from the nearest ones: ties, and weights beside them."""
_SLOW: Final = 0.3
"""Scales that are learned beside codes move by this share of the rate of these."""


class Soft(Protocol):
    """A weight (m, n) that can be learned within its format."""

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        """What is learned; leaves, float32."""

    @property
    def speeds(self) -> Sequence[float]:
        """How fast each is learned, relative to others."""

    def value(self) -> torch.Tensor:
        """(m, n) float32, differentiable with respect to the parameters."""

    def limit(self) -> None:
        """Bring the parameters back into their domain."""

    def hard(self) -> QTensor:
        """What the weight is in its format."""


def learns_scales(scheme: Scheme) -> bool:
    """Whether the scales of a scheme are numbers that can move: neither powers of two nor quantized in turn."""
    return not isinstance(scheme.scale, Scheme) and scheme.scale in PLAIN


@dataclass
class SoftScale:
    """Codes stay; every scale may change by a factor 1 + ρ.

    Attributes:
        q: the weight.
        change: ρ, in the shape of the scale, zero at first.
    """

    q: QTensor
    change: torch.Tensor

    @classmethod
    def of(cls, q: QTensor) -> SoftScale:
        return cls(q, torch.zeros_like(q.real_scale).requires_grad_())

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        return (self.change,)

    @property
    def speeds(self) -> Sequence[float]:
        return (1.0,)

    def value(self) -> torch.Tensor:
        tile = tile_shape(self.q.scheme.granularity, self.q.shape)
        units = to_tiles(self.q.units(), tile)
        if self.q.zero_point is not None:
            units = units - self.q.zero_point.reshape(-1, 1)
        values = units * (self.q.real_scale * (1 + self.change)).reshape(-1, 1)
        if (offset := self.q.real_offset) is not None:
            values = values + offset.reshape(-1, 1)
        return self.q.unturned(from_tiles(values, tile, self.q.shape))

    def limit(self) -> None:
        with torch.no_grad():
            self.change.clamp_(-0.5, 0.5)

    def hard(self) -> QTensor:
        storage = self.q.scheme.scale
        assert not isinstance(storage, Scheme)
        return replace(self.q, scale=round_scale((self.q.real_scale * (1 + self.change)).detach(), storage))


@dataclass
class SoftRounding:
    """Weights move by up to `reach` steps before they are rounded; the range of every group may shrink, or its scale change.

    Attributes:
        q: the weight as it was rounded at first.
        tiles: the weight before it is rounded, in tiles, float32 (groups, elements).
        shift: V, like the tiles, in steps; zero at first.
        shrink: β, one for each end of every group's range (groups, 1 or 2), one at first; None where ranges stay.
        change: ρ (groups, 1): scales change by a factor 1 + ρ without another rounding; None where they stay.
        reach: bound of |V|; infinite: latent weights.
    """

    q: QTensor
    tiles: torch.Tensor
    shift: torch.Tensor
    shrink: torch.Tensor | None
    change: torch.Tensor | None
    reach: float

    @classmethod
    def of(cls, q: QTensor, weight: torch.Tensor, reach: float = 0.5, shrink: bool = True) -> SoftRounding:
        """As AutoRound and ZeroQuant begin: every weight at its nearest code.

        Args:
            q: integer codes of groups, with plain scales.
            weight: (m, n), what q stands for.
        """
        tiles = to_tiles(weight.float(), tile_shape(q.scheme.granularity, q.shape)).contiguous()
        ends = 1 if q.zero_point is None else 2
        betas = torch.ones(len(tiles), ends).to(tiles).requires_grad_() if shrink else None
        return cls(q, tiles, torch.zeros_like(tiles).requires_grad_(), betas, None, reach)

    @classmethod
    def at(cls, q: QTensor, weight: torch.Tensor) -> SoftRounding:
        """Beginning at the codes that a method has chosen: every weight moves to the nearest place that is rounded so. Scales may change."""
        tile = tile_shape(q.scheme.granularity, q.shape)
        scale, codes = q.real_scale.reshape(-1, 1), to_tiles(q.codes, tile).float()
        if q.zero_point is not None:
            codes = codes - q.zero_point.reshape(-1, 1)
        steps = to_tiles(weight.float(), tile) / scale
        tiles = steps.clamp(codes - _INSIDE, codes + _INSIDE) * scale
        change = torch.zeros_like(scale).requires_grad_()
        return cls(q, tiles, torch.zeros_like(tiles).requires_grad_(), None, change, math.inf)

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        return [p for p in (self.shift, self.shrink, self.change) if p is not None]

    @property
    def speeds(self) -> Sequence[float]:
        return [s for p, s in ((self.shift, 1.0), (self.shrink, 1.0), (self.change, _SLOW)) if p is not None]

    def value(self) -> torch.Tensor:
        format = self.q.scheme.format
        tile = tile_shape(self.q.scheme.granularity, self.q.shape)
        if self.q.zero_point is None and self.change is None:
            scale = self.q.real_scale.reshape(-1, 1)
            shrink = torch.ones_like(scale) if self.shrink is None else self.shrink
            value: torch.Tensor = _Rounded.apply(self.shift, shrink, self.tiles, scale, format.qmin, format.qmax)
            return from_tiles(value, tile, self.q.shape)
        return from_tiles(self._by_operations(), tile, self.q.shape)

    def _by_operations(self) -> torch.Tensor:
        """In tiles, with all gradients left to autograd."""
        scale, zero = self._grid()
        format = self.q.scheme.format
        steps = _straight(self.tiles / scale + self.shift)
        if zero is not None:
            steps = steps + zero
        steps = steps.clamp(format.qmin, format.qmax)
        values = (steps - zero if zero is not None else steps) * scale
        if self.change is not None:
            values = values * (1 + self.change)
        return values

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zero points of the shrunken ranges, (groups, 1)."""
        scale = self.q.real_scale.reshape(-1, 1)
        zero = None if self.q.zero_point is None else self.q.zero_point.reshape(-1, 1).float()
        if self.shrink is None:
            return scale, zero
        if zero is None:
            return scale * self.shrink, None
        format = self.q.scheme.format
        low, high = scale * (format.qmin - zero), scale * (format.qmax - zero)
        low, high = low * self.shrink[:, :1], high * self.shrink[:, 1:]
        scale = ((high - low) / (format.qmax - format.qmin)).clamp(min=1e-8)
        return scale, _straight(format.qmin - low / scale).clamp(format.qmin, format.qmax)

    def limit(self) -> None:
        with torch.no_grad():
            self.shift.clamp_(-self.reach, self.reach)
            if self.shrink is not None:
                self.shrink.clamp_(0.05, 1)
            if self.change is not None:
                self.change.clamp_(-0.5, 0.5)

    @torch.no_grad()
    def hard(self) -> QTensor:
        scale, zero = self._grid()
        storage, shape = self.q.scheme.scale, self.q.real_scale.shape
        assert not isinstance(storage, Scheme)
        scale = scale if self.change is not None else round_scale(scale, storage)
        steps = torch.round(self.tiles / scale + self.shift)
        if self.change is not None:
            scale = round_scale(scale * (1 + self.change), storage)
        format = self.q.scheme.format
        codes = (steps if zero is None else steps + zero).clamp(format.qmin, format.qmax).to(code_dtype(format))
        tile = tile_shape(self.q.scheme.granularity, self.q.shape)
        points = None if zero is None else zero.round().int().reshape(shape)
        return replace(
            self.q, codes=from_tiles(codes, tile, self.q.shape), scale=scale.reshape(shape), zero_point=points
        )


def learns_rounding(q: QTensor) -> bool:
    """Whether `SoftRounding` can stand for it: integers with plain scales, in groups that are contiguous, without offsets."""
    plain = q.scheme.format.kind == "integer" and learns_scales(q.scheme)
    return plain and q.group_index is None and q.offset is None


def is_nearest(q: QTensor, weight: torch.Tensor) -> bool:
    """Whether codes are, but for ties, the nearest ones of their scales, and no method has chosen others.

    Args:
        q: integer codes of groups, with plain scales.
        weight: (m, n), what q stands for.
    """
    nearest = SoftRounding.of(q, weight, shrink=False).hard().codes
    return bool((nearest != q.codes).float().mean() < _TIES)


def _straight(x: torch.Tensor) -> torch.Tensor:
    """Rounded half to even; gradients pass as if it were not (a straight-through estimate)."""
    return x + (x.round() - x).detach()


class _Rounded(torch.autograd.Function):
    """round(w / (s β) + V) s β within the codes, in one pass each way: what `SoftRounding._by_operations` gives for symmetric grids."""

    @staticmethod
    def forward(ctx: Any, shift: torch.Tensor, shrink: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:  # fmt: skip
        now = scale * shrink
        there = tiles / now
        steps = (there + shift).round_()
        kept = steps.clamp(low, high)
        ctx.save_for_backward(there, steps, kept, scale, now)
        return kept * now

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        (slope,) = slopes
        there, steps, kept, scale, now = ctx.saved_tensors
        inside = steps == kept
        by_shift = slope * now * inside
        by_shrink = None
        if ctx.needs_input_grad[1]:
            by_shrink = (slope * kept - slope * there * inside).sum(1, keepdim=True) * scale
        return by_shift, by_shrink, None, None, None, None
