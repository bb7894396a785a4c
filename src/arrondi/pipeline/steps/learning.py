"""The loop that learns within one unit: stand-ins of its weights, and its norms and biases, against outputs that are wanted.

Owns: `Learner`. What stands in for a weight is on floor 2 (`arrondi.repair.soft`); steps choose what is learned, from what and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from arrondi.model import Passage, Site, Source
from arrondi.pipeline.work import Work
from arrondi.repair.soft import Soft

Rule = Literal["adam", "sign"]
"""Adam, or the sign of the gradient alone."""

Targets = Callable[[int], torch.Tensor]
"""Calibration batch → what the unit should give for it."""


class Learner:
    """A unit in which some numbers are leaves.

    Attributes:
        soft: site → what stands in for its weight.
        plain: tensor of the file → (its value at first, its unit, its change in that unit), of norms and biases.
    """

    def __init__(
        self, work: Work, sites: Sequence[Site], soft: Mapping[str, Soft], tensors: Sequence[str] = ()
    ) -> None:
        self.work, self.soft = work, soft
        self.passages = [p for p in work.forwards if isinstance(p, Passage)]
        self.sites: dict[str, list[Site]] = {}
        for site in sites:
            if site.name in soft:
                self.sites.setdefault(site.param, []).append(site)
        self.plain = {name: _plain(work.tensor(name)) for name in tensors}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Everything that is learned."""
        return [p for p, _ in self._paced()]

    def _paced(self) -> list[tuple[torch.Tensor, float]]:
        """Everything that is learned, and how fast."""
        found = [pair for s in self.soft.values() for pair in zip(s.parameters, s.speeds, strict=True)]
        return found + [(change, 1.0) for _, _, change in self.plain.values()]

    def learn(self, targets: Targets, rule: Rule, rate: float, iterations: int, seed: int = 0) -> None:
        """Follow the gradient of the squared error of the outputs, one calibration batch at a time.

        Args:
            rate: at first; it falls to zero in a line.
            iterations: batches that are looked at, in random order.
        """
        if not self.parameters or not self.passages:
            return
        paced = self._paced()
        groups = [{"params": [p], "lr": rate} for p, _ in paced]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95)) if rule == "adam" else None
        order = _order(len(self.passages), iterations, seed)
        for i, j in enumerate(order):
            now = rate * (1 - i / iterations)
            for parameter, _ in paced:
                parameter.grad = None
            with torch.enable_grad():
                self.loss(j, targets).backward()
            if optimizer is not None:
                for group, (_, speed) in zip(optimizer.param_groups, paced, strict=True):
                    group["lr"] = now * speed
                optimizer.step()
            else:
                with torch.no_grad():
                    for parameter, speed in paced:
                        if parameter.grad is not None:
                            parameter.sub_(now * speed * parameter.grad.sign())
            for s in self.soft.values():
                s.limit()

    def loss(self, j: int, targets: Targets) -> torch.Tensor:
        """Squared error of the unit's outputs on batch j over the squares that are wanted."""
        wanted = targets(j)
        with self._held():
            given = self.passages[j].differentiable()
        return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)

    @torch.no_grad()
    def total(self, targets: Targets) -> float:
        """The mean loss of all batches."""
        return sum(float(self.loss(j, targets)) for j in range(len(self.passages))) / max(len(self.passages), 1)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Inside, the unit computes with the stand-ins."""
        instance, values = self.work.instance, self._values()
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
        instance = self.work.instance
        found = {}
        for param, sites in self.sites.items():
            whole = instance.parameter(param).detach().clone()
            for site in sites:
                site.region(whole).copy_(self.soft[site.name].value())
            found[param] = whole
        for name, (value, unit, change) in self.plain.items():
            found[instance.names.targets_of[name][0]] = value + unit * change
        return found

    @torch.no_grad()
    def keep(self, **facts: object) -> None:
        """Let the quantized model have what was learned."""
        for sites in self.sites.values():
            for site in sites:
                self.work.replace(site, self.soft[site.name].hard(), **facts)
        for name, (value, unit, change) in self.plain.items():
            self.work.change(name, value + unit * change)


def norms_and_biases(source: Source, sites: Sequence[Site]) -> tuple[str, ...]:
    """Tensors of one axis in the units of some sites, by their names in the file."""
    blocks = {s.block for s in sites if s.block is not None}
    parameters = source.names.params
    return tuple(
        t.name
        for t in source.tensors
        if t.block in blocks and len(t.shape) == 1 and not t.sites and len(t.params) == 1
        and t.params[0] in parameters and not t.converted and parameters[t.params[0]].dtype.is_floating_point
    )  # fmt: skip


def _plain(value: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    kept = value.detach().clone()
    return kept, max(float(kept.square().mean().sqrt()), 1e-3), torch.zeros_like(kept).requires_grad_()


def _order(count: int, iterations: int, seed: int) -> list[int]:
    """Every batch once in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < iterations:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:iterations]
