"""A value of a graph rounded to its grid, as a module: `Rounder`. Its scale can be learned, and it can be turned off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from arrondi.graph.codes import INTEGERS, rounded
from arrondi.graph.uneven import looked_at, on_uneven


class Rounder(nn.Module):
    """What the operator `QDQ` does, with one scale for a tensor.

    Attributes:
        attrs: of the node: the type of the codes and, where they are fewer, the lowest and the highest.
        on: whether anything is rounded; the original of a program has its rounders off.
        change: ρ, a number that is learned: the scale is 1 + ρ times the own one; None where it stays.
        kept: the share of elements that stay as they are, chosen anew at every call.
        generator: of that choice.

    The gradient with respect to the scale is that of Esser et al. 2020, arXiv:1902.08153 (LSQ).
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, attrs: Mapping[str, Any]) -> None:
        super().__init__()
        self.attrs, self.on, self.kept = dict(attrs), True, 0.0
        self.change: torch.Tensor | None = None
        self.generator: torch.Generator | None = None
        self.register_buffer("scale", scale.clone(), persistent=False)
        self.register_buffer("zero_point", zero_point.clone(), persistent=False)

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        low, high, _ = INTEGERS[self.attrs["codes"]]
        return self.attrs.get("low", low), self.attrs.get("high", high)

    @property
    def uneven(self) -> bool:
        """Whether it has two scales, or powers of two; then nothing of it is learned."""
        return "grid" in self.attrs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x on its grid."""
        if not self.on:
            return x
        if self.uneven:
            given = on_uneven(self.attrs, x, self.scale)
        elif self.change is None:
            given = rounded(self.attrs, x, self.scale, self.zero_point)
        else:
            given = on_grid(x, self.scale * (1 + self.change), self.zero_point.to(x.dtype), *self.ends)
        if not self.kept:
            return given
        drawn = torch.rand(x.shape, generator=self.generator, device=x.device)
        return torch.where(drawn < self.kept, x, given)

    @torch.no_grad()
    def looks(self, x: torch.Tensor, shares: Sequence[float]) -> list[torch.Tensor]:
        """Scales to choose from, for x: these shares of the one that reaches over all of it, or what an uneven grid can have."""
        if self.uneven:
            return looked_at(self.attrs, self.scale, float(x.max()), list(shares))
        self._span(x)
        whole = self.scale.clone()
        return [whole * share for share in shares]

    def _span(self, x: torch.Tensor) -> None:
        """Reach over all of x; where negative codes lie around zero, equally far on both sides."""
        low, high = self.ends
        least, most = x.min().clamp(max=0), x.max().clamp(min=0)
        if low < 0 and not self.zero_point.any():
            scale = torch.maximum(-least, most) / high
        else:
            scale = (most - least) / (high - low)
        scale = scale.clamp(min=2.0**-100).reshape(self.scale.shape)
        if low >= 0 or self.zero_point.any():
            self.zero_point.copy_((low - least / scale).round().clamp(low, high))
        self.scale.copy_(scale)

    @torch.no_grad()
    def settle(self) -> None:
        """What was learned becomes the scale."""
        if self.change is not None:
            self.scale.mul_(1 + self.change.detach().clamp(min=-0.9))
            self.change = None


def on_grid(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """x rounded, with gradients with respect to x (straight through, nothing outside the range) and to the scale."""
    steps = x / scale
    codes = (steps + (steps.round() - steps).detach() + zero).clamp(low, high)
    return (codes - zero) * scale
