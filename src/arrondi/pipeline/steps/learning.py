"""What repairs learn: stand-ins of weights, norms and biases of a model, and the loop that learns them within one unit.

Owns: `StandIns` and `Learner`. What stands in for a weight is on floor 2 (`arrondi.repair.soft`); steps choose what is learned, from what and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Literal

import torch

from arrondi.model import Instance, Passage, Site, Source
from arrondi.pipeline.work import Work
from arrondi.repair.soft import Soft

_COMPARED: Final = 4
"""Every so-manieth batch says whether what was learned is better than what was there."""

Rule = Literal["adam", "sign"]
"""Adam, or the sign of the gradient alone."""

Targets = Callable[[int], torch.Tensor]
"""Calibration batch → what the unit should give for it."""


class StandIns:
    """A filled model in which some numbers are leaves.

    Attributes:
        instance: the model.
        soft: site → what stands in for its weight.
        plain: tensor of the file → (its value at first, its unit, its change in that unit), of norms and biases.
    """

    def __init__(
        self,
        instance: Instance,
        sites: Sequence[Site],
        soft: Mapping[str, Soft],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self.instance, self.soft = instance, soft
        self.sites: dict[str, list[Site]] = {}
        for site in sites:
            if site.name in soft:
                self.sites.setdefault(site.param, []).append(site)
        self.plain = {name: _plain(value) for name, value in tensors.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Everything that is learned."""
        return [p for p, _ in self.paced()]

    def paced(self) -> list[tuple[torch.Tensor, float]]:
        """Everything that is learned, and how fast."""
        found = [pair for s in self.soft.values() for pair in zip(s.parameters, s.speeds, strict=True)]
        return found + [(change, 1.0) for _, _, change in self.plain.values()]

    def limit(self) -> None:
        """Bring what is learned back into its domain."""
        for s in self.soft.values():
            s.limit()

    def add_gradient(self, loss: torch.Tensor) -> None:
        """Add the gradient of a number to that of what is learned, and of nothing else in the model."""
        parameters = self.parameters
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the model computes with the stand-ins."""
        instance, values = self.instance, self._values()
        before = {param: instance.parameter(param) for param in values}
        for param, value in values.items():
            for name in instance.names.names_of(param):
                instance.hold(name, value)
        try:
            yield
        finally:
            for param, parameter in before.items():
                for name in instance.names.names_of(param):
                    instance.hold(name, parameter)

    def _values(self) -> dict[str, torch.Tensor]:
        found = {}
        for param, sites in self.sites.items():
            held = self.instance.parameter(param).detach()
            if len(sites) == 1 and _same_layout(sites[0].region(held), held):
                found[param] = self.soft[sites[0].name].value().to(held.dtype)
                continue
            whole = held.clone()
            for site in sites:
                site.region(whole).copy_(self.soft[site.name].value())
            found[param] = whole
        for name, value in self.plain_values().items():
            param = self.instance.names.targets_of[name][0]
            found[param] = value.to(self.instance.parameter(param).dtype)
        return found

    def plain_values(self) -> dict[str, torch.Tensor]:
        """Norms and biases as they are now, float32."""
        return {name: value + unit * change for name, (value, unit, change) in self.plain.items()}


class Learner:
    """The loop within one unit; `stand` is what is learned."""

    def __init__(
        self, work: Work, sites: Sequence[Site], soft: Mapping[str, Soft], tensors: Sequence[str] = ()
    ) -> None:
        self.work, self.sites = work, sites
        self.passages = [p for p in work.forwards if isinstance(p, Passage)]
        self.stand = StandIns(work.instance, sites, soft, {name: work.tensor(name) for name in tensors})

    def learn(self, targets: Targets, rule: Rule, rate: float, iterations: int, seed: int = 0) -> None:
        """Follow the gradient of the squared error of the outputs, one calibration batch at a time.

        Args:
            rate: at first; it falls to zero in a line.
            iterations: batches that are looked at, in random order.
        """
        paced = self.stand.paced()
        if not paced or not self.passages:
            return
        groups = [{"params": [p], "lr": rate} for p, _ in paced]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95)) if rule == "adam" else None
        order = _order(len(self.passages), iterations, seed)
        for i, j in enumerate(order):
            now = rate * (1 - i / iterations)
            for parameter, _ in paced:
                parameter.grad = None
            with torch.enable_grad():
                self.stand.add_gradient(self.loss(j, targets))
            if optimizer is not None:
                for group, (_, speed) in zip(optimizer.param_groups, paced, strict=True):
                    group["lr"] = now * speed
                optimizer.step()
            else:
                with torch.no_grad():
                    for parameter, speed in paced:
                        if parameter.grad is not None:
                            parameter.sub_(parameter.grad.sign(), alpha=now * speed)
            self.stand.limit()

    def loss(self, j: int, targets: Targets) -> torch.Tensor:
        """Squared error of the unit's outputs on batch j over the squares that are wanted."""
        with self.stand.held():
            given = self.passages[j].differentiable()
        wanted = targets(j).to(given.device)
        return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)

    @torch.no_grad()
    def total(self, targets: Targets) -> float:
        """The mean loss of the batches that are looked at to compare: every so-manieth, so that the whole text counts."""
        compared = range(0, len(self.passages), _COMPARED if len(self.passages) >= 2 * _COMPARED else 1)
        return sum(float(self.loss(j, targets)) for j in compared) / max(len(compared), 1)

    @torch.no_grad()
    def keep(self, **facts: object) -> None:
        """Let the quantized model have what was learned."""
        for site in self.sites:
            if site.name in self.stand.soft:
                self.work.replace(site, self.stand.soft[site.name].hard(), **facts)
        for name, value in self.stand.plain_values().items():
            self.work.change(name, value)


def norms_and_biases(source: Source, sites: Sequence[Site], outside: bool = False) -> tuple[str, ...]:
    """Tensors of one axis in the units of some sites, by their names in the file; `outside` adds those outside all units."""
    blocks = {s.block for s in sites if s.block is not None} | ({None} if outside else set())
    parameters = source.names.params
    return tuple(
        t.name
        for t in source.tensors
        if t.block in blocks and len(t.shape) == 1 and not t.sites and len(t.params) == 1
        and t.params[0] in parameters and not t.converted and parameters[t.params[0]].dtype.is_floating_point
    )  # fmt: skip


def _plain(value: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    kept = value.detach().float().clone()
    return kept, max(float(kept.square().mean().sqrt()), 1e-3), torch.zeros_like(kept).requires_grad_()


def _same_layout(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a view of a tensor is all of it, in its order."""
    return part.shape == whole.shape and part.stride() == whole.stride()


def _order(count: int, iterations: int, seed: int) -> list[int]:
    """Every batch once in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < iterations:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:iterations]
