"""What a method of low-bit training is.

Owns: `TrainingMethod`, `Layer` (what a method may know and keep of a layer), `Passed` (what it hands from the way forward to the
way back), `Gradients`, `seed`, where noise begins, and what reports say: `padding` and `lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import distributed

from arrondi.kernels.sides import engine
from arrondi.training.geometry import Geometry

Arithmetic = tuple[str, str, str]
"""In which numbers a layer's three products ran: forward, gradient of the input, gradient of the weight."""


@dataclass
class Layer:
    """What a method keeps of one layer between steps.

    Attributes:
        options: of the method, a dataclass of its own.
        learned: parameters besides weight and bias, by name, that an optimizer trains.
        kept: tensors that change from step to step and that nobody trains, by name.
        sums: (out, in) of the product.
        features: of a point of the input, in numbers; `in` is a multiple of it.
        learning_rate: by which factor the layer's step should be shortened, where a method asks for it.
    """

    options: Any
    sums: tuple[int, int]
    features: int
    learned: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    learning_rate: float = 1.0


class Passed(NamedTuple):
    """Tensors that the way back needs, and what is no tensor."""

    tensors: tuple[torch.Tensor | None, ...]
    facts: tuple[Any, ...] = ()

    @property
    def whole(self) -> tuple[torch.Tensor, ...]:
        """The tensors of a method that hands on all of them."""
        return tuple(t for t in self.tensors if t is not None)


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Geometry, Layer], tuple[torch.Tensor, Passed]]
"""(x (points, features), weight (out, taps · features), bias (out,), geometry, layer) → (y (rows, out) in the type of x, what is passed)."""

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, dict[str, torch.Tensor]]
"""Of x (points, features), of the weight (out, taps · features), of what is learned by name."""

Backward = Callable[[torch.Tensor, Passed, Geometry, Layer, tuple[bool, bool]], Gradients]
"""(gradient (rows, out), what was passed, geometry, layer, whether x and weight want theirs) → gradients."""


def nothing(weight: torch.Tensor, options: Any) -> dict[str, torch.Tensor]:
    """Of methods that learn nothing besides."""
    return {}


@dataclass(frozen=True)
class TrainingMethod:
    """One way to train in few bits.

    Attributes:
        name: what `convert_to_lowbit_training` calls it.
        title: one line.
        source: the paper.
        options: a dataclass of its options, with defaults.
        forward, backward: the products; pure but for `Layer.kept` and `Layer.learning_rate`.
        arithmetic: layer, kind of device → in which numbers its three products run there.
        learn: (weight (out, in), options) → first values of what is learned besides, by name; empty ones () that the first
            batch sets.
    """

    name: str
    title: str
    source: str
    options: type
    forward: Forward
    backward: Backward
    arithmetic: Callable[[Layer, str], Arithmetic]
    learn: Callable[[torch.Tensor, Any], dict[str, torch.Tensor]] = nothing


def padding(what: str, width: int, block: int) -> str:
    """What a report adds where a block of a transform does not divide a width."""
    return f", {width} {what} padded to {width + -width % block}" if width % block else ""


def lanes(device: str, bits: int = 8) -> str:
    """What a report adds to a product of codes of so many bits: how a kind of device multiplies them."""
    if engine(device) != "torch":
        return ", in exact float32 pieces"
    return "" if bits == 8 else ", in int8 lanes"


def seed() -> int:
    """Where the noise of one rounding begins: from PyTorch's generator, so `torch.manual_seed` repeats it, and from the rank,
    so that ranks which were seeded alike do not round alike (their errors would not average out)."""
    drawn = int(torch.randint(2**31, (), device="cpu"))
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return (drawn + rank * 0x85EBCA6B) & 0xFFFFFFFF
