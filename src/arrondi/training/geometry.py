"""How a layer is a product of matrices: y = x wᵀ with x (rows, in), w (out, in).

Owns: `Geometry` and its two kinds, of a linear layer and of a convolution. Codes are taken apart into rows after rounding, so
that what is kept for the way back is no larger than the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F


class Geometry(Protocol):
    """The way from a layer's input, of one shape, to the sides of its product and back."""

    @property
    def line(self) -> int:
        """Rows that follow each other in one sequence or picture."""
        ...

    def units(self, x: torch.Tensor) -> torch.Tensor:
        """x as a matrix of which each row has one scale: tokens, or pictures."""
        ...

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales of units → those of the rows of the product."""
        ...

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        """x, or its codes in its shape → (rows, in)."""
        ...

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        """(rows, in), a gradient → x's shape; the transpose of `matrix`."""
        ...

    def result(self, y: torch.Tensor) -> torch.Tensor:
        """(rows, out) → the shape of the layer's output."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Of a linear layer, whose input is (..., in)."""

    shape: torch.Size

    @property
    def line(self) -> int:
        return int(self.shape[-2]) if len(self.shape) > 2 else 1  # rows of a plain matrix are samples

    def units(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.shape[-1])

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        return scale

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.shape[-1])

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        return slope.reshape(self.shape)

    def result(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(*self.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Windows:
    """Of a two-dimensional convolution without groups, whose input is (pictures, channels, height, width)."""

    shape: torch.Size
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, conv: nn.Conv2d, shape: torch.Size) -> Windows:
        """Of what a convolution does to an input of this shape; its padding is zeros."""
        pads = conv.padding
        if isinstance(
            pads, str
        ):  # 'same' pads alike on both sides here, since refuse() in `convert` left the others out
            both = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
            pads = (0, 0) if pads == "valid" else (both[0], both[1])
        return cls(shape, _pair(conv.kernel_size), _pair(conv.stride), _pair(pads), _pair(conv.dilation))

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (self.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    @property
    def line(self) -> int:
        return math.prod(self.out)

    def units(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(self.shape[0], -1)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(math.prod(self.out))

    def matrix(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(self.shape)
        if any(self.padding):
            x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        pictures, channels = self.shape[:2]
        n, c, h, w = x.stride()
        sizes = (pictures, *self.out, channels, *self.kernel)
        steps = (n, h * self.stride[0], w * self.stride[1], c, h * self.dilation[0], w * self.dilation[1])
        return x.as_strided(sizes, steps).reshape(pictures * math.prod(self.out), -1)

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        columns = slope.reshape(self.shape[0], math.prod(self.out), -1).transpose(1, 2)
        return F.fold(
            columns, self.shape[2:], self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride
        )

    def result(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(self.shape[0], *self.out, -1).permute(0, 3, 1, 2)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
