"""Repairs of networks that learn all layers of a unit together: `block-sides` (BRECQ), `block-drop` (QDrop) and `block-fisher` (FIMA-Q).

A unit of a network ends where one value alone goes on: a residual block, or a layer between two. It is held to what it gives in the original, every
number alike, or as much as the predictions of the original depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import torch

from arrondi.arguments import Between
from arrondi.graph import Rounder
from arrondi.model import Site
from arrondi.pipeline.step import Step
from arrondi.pipeline.steps.layers import entering, inside_only
from arrondi.pipeline.steps.learning import StandIns
from arrondi.pipeline.steps.options import Batch, Iterations, Rate, Regular, Share
from arrondi.pipeline.steps.reconstruct import FLOATS, of_units, refuse_plain
from arrondi.pipeline.work import Work
from arrondi.repair.curvature import Curved, factors
from arrondi.repair.layer import descend
from arrondi.repair.sides import SoftSides
from arrondi.repair.soft import learns_rounding
from arrondi.rounding.adaround import beta_of

_FACTORS: WeakKeyDictionary[torch.nn.Module, dict[int, torch.Tensor]] = WeakKeyDictionary()
"""The original → unit → factors that its step has not asked for yet."""


@dataclass
class Block:
    """A unit of a network under a repair.

    Attributes:
        inputs: what enters it in the quantized network, every sample below another; float_inputs: in the original.
        wanted: what the original gives.
        rounders: what rounds values in it and nowhere else.
    """

    part: Any
    inputs: list[torch.Tensor]
    float_inputs: list[torch.Tensor]
    wanted: torch.Tensor
    rounders: list[Rounder]
    norm: float
    curved: Curved | None = None

    @classmethod
    def of(cls, work: Work, sites: Sequence[Site]) -> Block | None:
        """None, and a word in the report, where samples do not lie along the first axis of everything that enters and leaves."""
        assert work.original is not None, "a step that needs float outputs says so"
        number = int(sites[0].modules[0].partition(".")[0])
        part, other = work.instance.model[number], work.original.instance.model[number]
        ours, theirs = entering(part, work.forwards), entering(other, work.original.forwards)
        with work.targets() as outputs:
            parts = [outputs[j] for j in range(len(outputs))]
        batches = [len(one[0]) for one in ours]
        uneven = any(p.shape[1:] != parts[0].shape[1:] or len(p) != n for p, n in zip(parts, batches, strict=True))
        if uneven or any(
            len(x) != n for both in (ours, theirs) for one, n in zip(both, batches, strict=True) for x in one
        ):
            for site in sites:
                work.facts.setdefault(site.tensor, {})["not_learned"] = "samples do not lie along the first axis"
            return None
        inputs, others = ([torch.cat(own) for own in zip(*both, strict=True)] for both in (ours, theirs))
        wanted = torch.cat(parts)
        norm = max(float(wanted.square().mean()), 1e-30)
        return cls(part, inputs, others, wanted, inside_only(work.instance.model, number), norm)

    def loss(
        self, chosen: torch.Tensor, dropped: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The squared error over the mean square that is wanted, on some samples.

        Args:
            dropped: the share of elements of the input that are the original's.
        """
        given = [x[chosen] for x in self.inputs]
        if dropped:
            others = [x[chosen] for x in self.float_inputs]
            masks = [torch.rand(x.shape, generator=generator) < dropped for x in given]
            given = [torch.where(mask, f, x) for mask, f, x in zip(masks, others, given, strict=True)]
        errors = self.part(*given) - self.wanted[chosen]
        return errors.square().mean() / self.norm if self.curved is None else self.curved(errors, chosen)

    def weigh(self, work: Work, sites: Sequence[Site], draws: int, share: float) -> None:
        """Let errors count by what the predictions of the original make of them."""
        assert work.original is not None, "a step that needs float outputs says so"
        model, number = work.original.instance.model, int(sites[0].modules[0].partition(".")[0])
        known = _FACTORS.setdefault(model, {})
        if number not in known:  # the first unit asks, and later ones find what the same way back has left
            generator = torch.Generator().manual_seed(0)
            found = [factors(list(model)[number + 1 :], z, draws, generator) for z in self.wanted.split(64)]
            known |= {number + i: torch.cat(own, 1) for i, own in enumerate(zip(*found, strict=True))}
        self.curved = Curved.of(known.pop(number), share)
        with torch.no_grad():
            chunks = torch.arange(len(self.wanted)).split(64)
            self.curved.begin(torch.cat([self.part(*(x[c] for x in self.inputs)) - self.wanted[c] for c in chunks]))

    @torch.no_grad()
    def total(self) -> float:
        """The mean loss of all samples."""
        parts = torch.arange(len(self.wanted)).split(64)
        return sum(float(self.loss(part)) * len(part) for part in parts) / len(self.wanted)


def block_sides(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Iterations = 400,
    rate: Rate = 0.01,
    regular: Regular = 1.0,
    batch: Batch = 16,
    steps: bool = True,
    step_rate: Rate = 0.002,
) -> None:
    """Learn to which side every weight of a unit is rounded, then the scales of what flows in it.

    Args:
        iterations: of Adam for the sides, while nothing that flows in the unit is rounded; half as many for the scales.
        rate: of Adam, of V.
        regular: weight of the regulariser, beside the error in units of what the first codes leave.
        batch: samples of one iteration.
        steps: learn scales of what flows.
        step_rate: of Adam, by which scales change.
    """
    if not sites:
        return
    block = Block.of(work, sites)
    if block is None:
        return
    as_found = block.total()
    for rounder in block.rounders:
        rounder.on = False
    try:
        soft = _learn(work, sites, block, iterations, rate, regular, batch)
    finally:
        for rounder in block.rounders:
            rounder.on = True
    _keep(work, sites, block, soft, as_found)
    if steps and block.rounders:
        _learn_scales(block, iterations // 2, step_rate, batch)


def block_drop(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Iterations = 400,
    rate: Rate = 0.01,
    regular: Regular = 1.0,
    batch: Batch = 16,
    drop: Share = 0.5,
    step_rate: Rate = 0.001,
) -> None:
    """Learn sides and scales of a unit together, while some of what flows is rounded and the rest is not.

    Args:
        iterations: of Adam.
        rate: of Adam, of V.
        regular: weight of the regulariser, beside the error in units of what the first codes leave.
        batch: samples of one iteration.
        drop: the share of elements that are not rounded, and of those that enter as in the original.
        step_rate: of Adam, by which scales change.
    """
    if not sites:
        return
    block = Block.of(work, sites)
    if block is not None:
        _drop(work, sites, block, iterations, rate, regular, batch, drop, step_rate)


def _drop(
    work: Work, sites: Sequence[Site], block: Block, iterations: int, rate: float, regular: float, batch: int,
    drop: float, step_rate: float,
) -> None:  # fmt: skip
    as_found = block.total()
    generator = torch.Generator().manual_seed(0)
    for rounder in block.rounders:
        rounder.kept, rounder.generator = drop, generator
    try:
        soft = _learn(work, sites, block, iterations, rate, regular, batch, step_rate, drop, generator)
    finally:
        for rounder in block.rounders:
            rounder.kept, rounder.generator = 0.0, None
    _keep(work, sites, block, soft, as_found)


def block_fisher(
    work: Work,
    sites: Sequence[Site],
    *,
    iterations: Iterations = 400,
    rate: Rate = 0.01,
    regular: Regular = 1.0,
    batch: Batch = 16,
    drop: Share = 0.5,
    step_rate: Rate = 0.001,
    draws: Annotated[int, Between(1, 1000)] = 4,
    share: Share = 0.2,
) -> None:
    """Learn sides and scales of a unit together, held by what the network's predictions make of its errors.

    Args:
        iterations: of Adam.
        rate: of Adam, of V.
        regular: weight of the regulariser, beside the error in units of what the first codes leave.
        batch: samples of one iteration.
        drop: the share of elements that are not rounded, and of those that enter as in the original.
        step_rate: of Adam, by which scales change.
        draws: directions for every sample in which errors count; all that there are of no more classes.
        share: of the loss that every number's mean importance has, beside these directions.
    """
    block = Block.of(work, sites) if sites else None
    if block is not None:
        block.weigh(work, sites, draws, share)
        _drop(work, sites, block, iterations, rate, regular, batch, drop, step_rate)


def _learn(
    work: Work, sites: Sequence[Site], block: Block, iterations: int, rate: float, regular: float, batch: int,
    step_rate: float = 0.0, drop: float = 0.0, generator: torch.Generator | None = None,
) -> dict[str, SoftSides]:  # fmt: skip
    soft = {
        s.name: SoftSides.at(work.results[s.name].q, work.before[s.name])
        for s in sites
        if s.name in work.results and learns_rounding(work.results[s.name].q)
    }
    stand = StandIns(work.instance, sites, soft, {})
    first, total = max(block.total(), 1e-12), sum(s.v.numel() for s in soft.values())

    def loss(chosen: torch.Tensor, step: int) -> torch.Tensor:
        beta = beta_of(step, iterations)
        with stand.held():
            error = block.loss(chosen, drop, generator) / first
        return error + regular * sum(
            (s.undecided(beta) * (s.v.numel() / total) for s in soft.values()), torch.zeros(())
        )

    with _scales(block.rounders if step_rate else []) as changes:
        paced = [(s.v, rate) for s in soft.values()] + [(c, step_rate) for c in changes]
        descend(loss, paced, len(block.wanted), batch=batch, iterations=iterations, falls=False)
    return soft


def _learn_scales(block: Block, iterations: int, rate: float, batch: int) -> None:
    with _scales(block.rounders) as changes:
        descend(
            lambda chosen, step: block.loss(chosen), [(c, rate) for c in changes], len(block.wanted), batch=batch,
            iterations=iterations, falls=True, judge=block.total,
        )  # fmt: skip


def _keep(work: Work, sites: Sequence[Site], block: Block, soft: dict[str, SoftSides], as_found: float) -> None:
    """What was learned, if the unit is nearer to the original with it."""
    before = {name: work.results[name].q for name in soft}
    chosen = [s for s in sites if s.name in soft]
    for site in chosen:
        work.replace(site, soft[site.name].hard())
    learned = block.total()
    for site in chosen:
        if learned < as_found:
            changed = float((work.results[site.name].q.codes != before[site.name].codes).float().mean())
            work.results[site.name].facts |= {"unit_error": [as_found, learned], "codes_changed": changed}
        else:
            work.replace(site, before[site.name], unit_error=[as_found, as_found], codes_changed=0.0)


class _scales:
    """Inside, the scales of rounders are learned as factors 1 + ρ; at the end they have what was learned."""

    def __init__(self, rounders: Sequence[Rounder]) -> None:
        self.rounders = list(rounders)
        self.changes = [torch.zeros((), requires_grad=True) for _ in self.rounders]

    def __enter__(self) -> list[torch.Tensor]:
        for rounder, change in zip(self.rounders, self.changes, strict=True):
            rounder.change = change
        return self.changes

    def __exit__(self, *error: object) -> None:
        for rounder in self.rounders:
            rounder.settle()


BLOCK_SIDES = Step(
    "block-sides", "repair", "Li et al. 2021, arXiv:2102.05426", apply=block_sides, needs=FLOATS, scope="unit",
    refuse=refuse_plain, choose=of_units, cost=50_000.0,
)  # fmt: skip
BLOCK_FISHER = Step(
    "block-fisher", "repair", "Wu et al. 2025, arXiv:2506.11543", apply=block_fisher, needs=FLOATS, scope="unit",
    refuse=refuse_plain, choose=of_units, cost=100_000.0,
)  # fmt: skip
BLOCK_DROP = Step(
    "block-drop", "repair", "Wei et al. 2022, arXiv:2203.05740", apply=block_drop, needs=FLOATS, scope="unit",
    refuse=refuse_plain, choose=of_units, cost=50_000.0,
)  # fmt: skip
