"""An activation, what reads it and what makes it, and scales that go from the one into the other: `Fold`, `apply_fold`.

Source: Xiao et al. 2023, arXiv:2211.10438 (SmoothQuant), section 4: (X / s) (s W)ᵀ = X Wᵀ, where 1 / s goes into the norm before X; Nagel
et al. 2019, arXiv:1906.04721, section 4.1: into the rows of a matrix, also through functions for which f(s·x) = s·f(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.model.site import Site


@dataclass(frozen=True)
class Producer:
    """What makes an activation, channel by channel.

    Attributes:
        kind: "norm", a parameter that activations are multiplied by; "linear", the rows of a matrix.
        param: that parameter.
        count: number of channels.
        offset: a norm multiplies by (offset + parameter): 0 or 1.
        bias: a parameter that is added, and scaled along.
        rows: of a linear producer, its part of the matrix along the axis of outputs; None for all.
        index: which matrix of a stack.
        axis: the axis of the matrix along which its outputs lie: -2, or -1 where the parameter holds (in, out).
    """

    kind: Literal["norm", "linear"]
    param: str
    count: int
    offset: float = 0.0
    bias: str | None = None
    rows: slice | None = field(default=None, hash=False)
    index: int | None = None
    axis: int = -2


@dataclass(frozen=True)
class Fold:
    """An activation, the sites that read it, and what makes it.

    Attributes:
        consumers: the name of every site that reads it.
        producer: what makes it, None where that has no channels.
        channels: column j of every consumer is channel channels[j] of the producer; grouped-query attention repeats channels.
        reason: why scales cannot be folded, None if they can.
        sites: the consumers.
    """

    consumers: tuple[str, ...]
    producer: Producer | None
    channels: tuple[int, ...] = ()
    reason: str | None = None
    sites: tuple[Site, ...] = field(default=(), repr=False, compare=False)

    @property
    def unit(self) -> int | None:
        """The unit of the consumers, None outside of all."""
        return self.sites[0].block if self.sites else None


def channels_in_words(channels: tuple[int, ...]) -> str | list[int]:
    """ "same" where column j is channel j; "repeated" where blocks of channels come several times, as heads do; else all of them."""
    n = len(channels)
    if channels == tuple(range(n)):
        return "same"
    block = next((j for j in range(1, n) if channels[j] != j), n)
    for size in range(1, block + 1):
        times = next((j for j in range(size, n + 1, size) if j == n or channels[j] == size), n) // size
        if channels == tuple(size * (j // (size * times)) + j % size for j in range(n)):
            return f"blocks of {size} repeated ×{times}"
    return list(channels)


def apply_fold(
    fold: Fold, scale: torch.Tensor, get: Callable[[str], torch.Tensor], put: Callable[[str, torch.Tensor], None]
) -> None:
    """Divide what the producer makes by `scale`, and multiply the consumers' columns by it: the model computes the same.

    Args:
        fold: one without a reason.
        scale: (producer.count,), positive. Channels that no column reads are left alone.
        get: parameter → its value, which is not changed.
        put: takes a parameter's new value, float32; called once for each.

    Raises:
        SchemeError: nothing can be folded here.
        ShapeError: the scale has another shape, or is not positive everywhere.
    """
    producer = fold.producer
    if fold.reason is not None or producer is None:
        raise SchemeError(f"Nothing can be folded for {fold.consumers[0]}: {fold.reason}.")
    if tuple(scale.shape) != (producer.count,) or not bool((scale.isfinite() & (scale > 0)).all()):
        raise ShapeError(
            f"A scale for {producer.param} needs {producer.count} positive numbers, got shape {tuple(scale.shape)}."
        )
    channels = torch.tensor(fold.channels)
    read = torch.zeros(producer.count, dtype=torch.bool).index_fill_(0, channels, True)
    factors = torch.where(read.to(scale.device), scale.float(), 1.0)
    values = dict(_consumed(fold, factors[channels.to(scale.device)], get))
    for name, value in _produced(producer, factors, lambda n: values[n] if n in values else get(n)):
        values[name] = value
    for name, value in values.items():
        put(name, value)


def _consumed(
    fold: Fold, columns: torch.Tensor, get: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    values: dict[str, torch.Tensor] = {}
    for site in fold.sites:
        if site.param not in values:
            values[site.param] = get(site.param).detach().float().clone()
        site.region(values[site.param]).mul_(columns.to(values[site.param].device))
    yield from values.items()


def _produced(
    producer: Producer, factors: torch.Tensor, get: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    weight = get(producer.param).detach().float().clone()
    factors = factors.to(weight.device)
    if producer.kind == "norm":
        yield producer.param, (weight + producer.offset) / factors.reshape(weight.shape) - producer.offset
    else:
        matrix = weight if producer.index is None else weight[producer.index]
        outputs = matrix.movedim(producer.axis, 0)
        outputs[producer.rows or slice(None)] /= factors[:, None]
        yield producer.param, weight
    if producer.bias is not None:
        bias = get(producer.bias).detach().float().clone()
        bias.view(-1)[producer.rows or slice(None)] /= factors
        yield producer.bias, bias
