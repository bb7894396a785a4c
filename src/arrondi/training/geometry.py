"""How a layer is a product of matrices: y = x wᵀ with x (rows, in), w (out, in).

Owns: `Geometry` and its two kinds, of a linear layer and of a convolution. An input is points, each with its features: tokens, or
pixels with their channels. Points are rounded and turned before windows repeat them in the rows of the product, so that what is
computed for each of them, and what is kept for the way back, is no larger than the input.
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

    def points(self, x: torch.Tensor) -> torch.Tensor:
        """x → (points, features)."""
        ...

    def shaped(self, points: torch.Tensor) -> torch.Tensor:
        """(points, features) → x's shape."""
        ...

    def units(self, points: torch.Tensor) -> torch.Tensor:
        """Points as a matrix of which each row has one scale: tokens, or pictures."""
        ...

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales of units → those of the rows of the product."""
        ...

    def matrix(self, points: torch.Tensor) -> torch.Tensor:
        """(points, features), of any number of features → (rows, taps · features)."""
        ...

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        """(rows, taps · features), a gradient → (points, features); the transpose of `matrix`."""
        ...

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight → (out, taps · features)."""
        ...

    def like_weight(self, slope: torch.Tensor) -> torch.Tensor:
        """(out, taps · features), a gradient → the shape of the layer's weight."""
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

    def points(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, self.shape[-1])

    def shaped(self, points: torch.Tensor) -> torch.Tensor:
        return points.reshape(self.shape)

    def units(self, points: torch.Tensor) -> torch.Tensor:
        return points

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        return scale

    def matrix(self, points: torch.Tensor) -> torch.Tensor:
        return points

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        return slope

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def like_weight(self, slope: torch.Tensor) -> torch.Tensor:
        return slope

    def result(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(*self.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Windows:
    """Of a two-dimensional convolution without groups, whose input is (pictures, channels, height, width).

    Channels come last everywhere in between, as in `torch.channels_last`: windows are then copied in runs of channels, and a network
    whose layers are all converted never changes its order.
    """

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

    def points(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).reshape(-1, self.shape[1])

    def shaped(self, points: torch.Tensor) -> torch.Tensor:
        pictures, channels, height, width = self.shape
        return points.reshape(pictures, height, width, channels).permute(0, 3, 1, 2)

    def units(self, points: torch.Tensor) -> torch.Tensor:
        return points.reshape(self.shape[0], -1)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(math.prod(self.out))

    def matrix(self, points: torch.Tensor) -> torch.Tensor:
        pictures, _, height, width = self.shape
        x = points.reshape(pictures, height, width, -1)
        if any(self.padding):
            x = F.pad(x, (0, 0, self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        n, h, w, c = x.stride()
        sizes = (pictures, *self.out, *self.kernel, x.shape[3])
        steps = (n, h * self.stride[0], w * self.stride[1], h * self.dilation[0], w * self.dilation[1], c)
        return x.as_strided(sizes, steps).reshape(pictures * math.prod(self.out), -1)

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        pictures, _, height, width = self.shape
        below, aside = self.padding
        taps = slope.reshape(pictures, *self.out, *self.kernel, -1)
        total = slope.new_zeros((pictures, height + 2 * below, width + 2 * aside, taps.shape[-1]))
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                total[:, self._seen(0, i), self._seen(1, j)] += taps[:, :, :, i, j]
        return total[:, below : below + height, aside : aside + width].reshape(-1, taps.shape[-1])

    def _seen(self, axis: int, tap: int) -> slice:
        """The pixels of the padded input that one tap of the kernel meets."""
        start = tap * self.dilation[axis]
        return slice(start, start + (self.out[axis] - 1) * self.stride[axis] + 1, self.stride[axis])

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)

    def like_weight(self, slope: torch.Tensor) -> torch.Tensor:
        return slope.reshape(len(slope), *self.kernel, self.shape[1]).permute(0, 3, 1, 2)

    def result(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(self.shape[0], *self.out, -1).permute(0, 3, 1, 2)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return int(values[0]), int(values[1])
