"""One layer held to what it should give, on a sample of the rows that it multiplies: `LayerRows`, `LayerLoss` and `descend`.

A row of a convolution is a patch. Layers in groups have one row for each group, and every group its own outputs.

Sources: Nagel et al. 2020, arXiv:2004.10568 (the activation in the loss, inputs of the quantized network); Hubara et al. 2020,
arXiv:2006.10518 (weights, bias and both grids learned together, the best iterate on samples that are held out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Operator = Callable[[Tensor], Tensor]

_HELD_OUT = 8
"""One row of so many is only looked at to choose the best iterate."""


@dataclass(frozen=True)
class LayerRows:
    """A sample of what a layer reads and should give.

    Attributes:
        x: (rows, groups, K), what the quantized network has there.
        y: (rows, outputs), what the original gives for the same rows, before the activation.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def part(self, held: bool) -> LayerRows:
        """Those that are held out, or the others."""
        mask = torch.arange(len(self)) % _HELD_OUT == 0
        mask = mask if held else ~mask
        return LayerRows(self.x[mask], self.y[mask])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, groups, K) times (outputs, K), each group with its own outputs → (rows, outputs)."""
    groups = x.shape[1]
    if groups == 1:
        return x[:, 0] @ weight.T
    split = weight.reshape(groups, -1, weight.shape[1])
    return torch.einsum("ngk,gok->ngo", x, split).reshape(len(x), -1)


@dataclass(frozen=True)
class LayerLoss:
    """The squared error of a layer behind its activation, in units of the mean square that is wanted.

    Attributes:
        activation: what follows the layer.
        rounds: what happens to a row before it is multiplied.
    """

    activation: Operator
    rounds: Operator

    def __call__(self, rows: LayerRows, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = product(self.rounds(rows.x), weight)
        if bias is not None:
            given = given + bias
        wanted = self.activation(rows.y)
        return (self.activation(given) - wanted).square().mean() / wanted.square().mean().clamp(min=1e-30)


def descend(
    loss: Callable[[Tensor, int], Tensor],
    paced: Sequence[tuple[Tensor, float]],
    count: int,
    *,
    batch: int,
    iterations: int,
    falls: bool,
    limit: Callable[[], None] = lambda: None,
    judge: Callable[[], float] | None = None,
    seed: int = 0,
) -> float | None:
    """Adam on random samples.

    Args:
        loss: (indices of samples, iteration) → what is to fall.
        paced: what is learned and how fast.
        count: samples.
        falls: rates fall to zero in a line; else they stay.
        limit: brings what is learned back into its domain after every step.
        judge: how good the present numbers are; the best ones are kept, those at the beginning among them.

    Returns:
        what `judge` said of the best.
    """
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in paced])
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p, _ in paced]
    best, kept = (None, []) if judge is None else (judge(), [p.detach().clone() for p in parameters])
    every = max(iterations // 10, 1)
    for step in range(iterations):
        chosen = torch.randint(count, (min(batch, count),), generator=generator)
        with torch.enable_grad():
            value = loss(chosen, step)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        if falls:
            for group, (_, rate) in zip(optimizer.param_groups, paced, strict=True):
                group["lr"] = rate * (1 - step / iterations)
        optimizer.step()
        limit()
        if judge is not None and best is not None and ((step + 1) % every == 0 or step + 1 == iterations):
            now = judge()
            if now < best:
                best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=False):
            parameter.copy_(value)
    return best


@torch.no_grad()
def errors(loss: LayerLoss, rows: LayerRows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(outputs,): the squared error of every output."""
    given = product(loss.rounds(rows.x), weight)
    given = given if bias is None else given + bias
    return (loss.activation(given) - loss.activation(rows.y)).square().sum(0)
