"""Small networks with perturbed parameters, and files of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from arrondi.graph import Graph, Node, Value


class Residual(nn.Module):
    """Two convolutions around a shortcut, with a depthwise one and an uneven padding before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(nn.functional.pad(x, (0, 1, 0, 1)))))
        x = torch.relu(x + self.two(torch.relu(self.one(x))))
        x = torch.cat([x, nn.functional.relu6(self.depth(x))], 1)
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def perturbed(module: nn.Module) -> nn.Module:
    """The module with numbers in every parameter and buffer."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dtype.is_floating_point:
                noise = 0.3 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if "var" in name else tensor + noise)
    return module.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 12, 12)"""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


class Upward(nn.Module):
    """A convolution over time, a transposed one that overlaps itself, and a transposed one in groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.down, self.slope = nn.Conv1d(3, 8, 5, 2, padding=2), nn.PReLU(8)
        self.up = nn.ConvTranspose1d(8, 16, 5, 3, padding=1, output_padding=2, dilation=2)
        self.twice = nn.ConvTranspose1d(16, 4, 3, 2, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(torch.relu(self.up(self.slope(self.down(x)))))

    def graph(self) -> Graph:
        """The same as a graph, without an exporter."""
        held = {n: p.detach().numpy() for n, p in self.named_parameters()}
        held["slope.weight"] = held["slope.weight"][:, None]
        first = {"strides": [2], "pads": [2, 2]}
        up = {"strides": [3], "pads": [1, 1], "output_padding": [2], "dilations": [2]}
        nodes = (
            Node("down", "Conv", ("x", "down.weight", "down.bias"), ("a",), first),
            Node("slope", "PRelu", ("a", "slope.weight"), ("b",)),
            Node("up", "ConvTranspose", ("b", "up.weight", "up.bias"), ("c",), up),
            Node("relu", "Relu", ("c",), ("d",)),
            Node("twice", "ConvTranspose", ("d", "twice.weight", "twice.bias"), ("y",), {"strides": [2], "group": 2}),
        )
        kind = np.dtype(np.float32)
        return Graph("up", nodes, (Value("x", kind, ("n", 3, None)),), (Value("y", kind, ("n", 4, None)),), held, 18)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions whose channels spread a hundredfold: one scale a tensor is nothing for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.depth = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 10)
        with torch.no_grad():
            gains = torch.logspace(-1, 1, 16)[torch.randperm(16)]
            self.stem.weight.mul_(gains[:, None, None, None])
            self.stem.bias.mul_(gains)  # type: ignore[union-attr]
            self.depth.weight.div_(gains[:, None, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depth(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))


class Segmenting(nn.Module):
    """What ESPNet is made of: pyramids of dilated convolutions that are added up and joined, PReLU, a transposed convolution in groups, and
    a bilinear resize back to the size of the picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.stem, self.slopes = nn.Conv2d(3, 16, 3, 2, padding=1), nn.PReLU(16)
        self.reduce = nn.Conv2d(16, 8, 1)
        self.pyramid = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=d, dilation=d) for d in (1, 2, 4)])
        self.norm, self.more = nn.BatchNorm2d(24), nn.PReLU(24)
        self.shortcut, self.up = nn.Conv2d(16, 24, 1), nn.ConvTranspose2d(24, 16, 2, 2, groups=4)
        self.classes = nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.slopes(self.stem(x))
        small = self.reduce(first)
        one, two, four = (conv(small) for conv in self.pyramid)
        joined = self.norm(torch.cat([one, one + two, one + two + four], 1)) + self.shortcut(first)
        wide = self.classes(torch.relu(self.up(self.more(joined))))
        return nn.functional.interpolate(wide, scale_factor=2, mode="bilinear", align_corners=False)
