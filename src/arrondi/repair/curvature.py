"""How much a network's predictions mind what one of its units gives: `factors` of their Fisher information, and `Curved`, a loss made of them.

The Fisher information of classes is the second derivative of the divergence of predictions at the point where there is none. Its rank for one
sample is less than the number of classes; with a diagonal beside it, it also holds for errors that other samples would show.

Sources: Wu et al. 2025, arXiv:2506.11543 (FIMA-Q: a diagonal and a part of low rank); Li et al. 2021, arXiv:2102.05426 (the diagonal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

_LEAST = 1e-30


@torch.enable_grad()
def factors(
    parts: Sequence[Callable[[Tensor], Tensor]], z: Tensor, draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Vectors a of which every sample's information is Σ a aᵀ, at least on average, for a unit and all after it, in one way back.

    Args:
        parts: what follows the unit, one after the other, the last with (n, classes); of outputs that are no classes the squared difference
            counts.
        z: (n, …), what the unit gives; samples do not look at each other.
        draws: vectors for every sample. Of as many classes or fewer all are taken, and nothing is left to chance.

    Returns:
        for z and for what every part gives: (draws or classes, n, …), bfloat16.
    """
    given = [z.detach().requires_grad_()]
    for part in parts:
        given.append(part(given[-1]))
    output = given[-1].float()
    found: list[tuple[Tensor, ...]] = []
    if output.ndim != 2 or output.shape[1] < 2:
        noise = [torch.randn(output.shape, generator=generator) / draws**0.5 for _ in range(draws)]
        sums = [(output * part).sum() for part in noise]
    else:
        logs = output.log_softmax(1)
        p = logs.detach().exp()
        if output.shape[1] <= draws:
            sums = [(logs[:, k] * p[:, k].sqrt()).sum() for k in range(output.shape[1])]
        else:
            drawn = torch.multinomial(p, draws, replacement=True, generator=generator)
            sums = [logs.gather(1, drawn[:, k : k + 1]).sum() / draws**0.5 for k in range(draws)]
    for k, own in enumerate(sums):
        slopes = torch.autograd.grad(own, given, retain_graph=k + 1 < len(sums))
        found.append(tuple(slope.detach().bfloat16() for slope in slopes))
    return [torch.stack(own) for own in zip(*found, strict=True)]


@dataclass
class Curved:
    """dᵀ (F + diagonal) d of errors d, each part over what it is at first.

    Attributes:
        low: (draws, n, …), of which F is made for every sample.
        diagonal: (…), the same for all samples.
        share: of the diagonal part.
        norms: both parts at first, see `begin`.
    """

    low: Tensor
    diagonal: Tensor
    share: float
    norms: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, low: Tensor, share: float) -> Curved:
        return cls(low, low.float().square().sum(0).mean(0), share)

    def begin(self, errors: Tensor) -> None:
        """Let the loss of these errors, of all samples, be one."""
        along, spread = self._parts(errors, torch.arange(len(errors)))
        self.norms = max(float(along), _LEAST), max(float(spread), _LEAST)

    def __call__(self, errors: Tensor, chosen: Tensor) -> Tensor:
        """Of the samples `chosen`, a mean."""
        along, spread = self._parts(errors, chosen)
        return (1 - self.share) * along / self.norms[0] + self.share * spread / self.norms[1]

    def _parts(self, errors: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        along = (self.low[:, chosen] * errors).flatten(2).sum(2).square().sum(0).mean()
        return along, (self.diagonal * errors.square()).flatten(1).sum(1).mean()
