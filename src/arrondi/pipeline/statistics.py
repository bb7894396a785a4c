"""What calibration says of the inputs of sites: `Need`, `Seen` and `collect`.

Inputs that several sites read are counted once. Nothing raw is kept beyond one batch but a sample of bounded size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from arrondi.calibration import Energy, Reservoir, SecondMoment, half_of, span_of
from arrondi.model.experts import every_token
from arrondi.model.flow import Use, watch

Need = Literal[
    "moment",
    "energy",
    "importance",
    "mean",
    "range",
    "absmax",
    "absmean",
    "sample",
    "float moment",
    "cross moment",
    "float mean",
    "float outputs",
    "output moments",
    "batches",
]
"""What calibration collects of the input of a site. x are inputs as the quantized model has them, f those of the original, which is
rewritten as the quantized model is, but not rounded.

    moment        Σ x xᵀ
    energy        Σ x² and max |x| of every column, in each half of the text
    importance    mean x² of every column; what an importance matrix says goes before what is seen
    mean          Σ x
    range         the least and the largest number
    absmax        max |x| of every column
    absmean       Σ |x| of every column
    sample        rows, each as likely as every other
    float moment  Σ f fᵀ
    cross moment  Σ x fᵀ, of the same tokens
    float mean    Σ f
    float outputs what the unit gives in the original: nothing of one input, see `Work.targets`
    output moments Σ g gᵀ of the gradients g of the original's loss with respect to what a site gives; see `arrondi.pipeline.fisher`
    batches       the batches themselves: the unit is run on them
"""

OF_ORIGINAL: Final = frozenset({"float moment", "cross moment", "float mean", "float outputs"})
"""Needs for which the original is followed on the calibration data too."""

Key = tuple[str, int | None]
"""A parameter, and which matrix of it."""

Forward = Callable[[], object]
"""Sends one calibration batch through a unit."""

FEW: Final = 4
"""Tokens for every input of a weight below which its second moments are thin: at 3 bits GPTQ then loses a fifth to a third more."""

SAMPLE: Final = 512
"""Rows of a sample."""

PATCHES: Final = 2048
"""Positions of a convolution that are counted of one batch, or four for every input; more change second moments little and take most of the time."""


@dataclass
class Seen:
    """What was seen of one input x, and of the same input f in the original; a field is None unless it was asked for.

    Attributes:
        tokens: rows of it.
        moment: Σ x xᵀ.
        energy: Σ x² and max |x| of every column, in each half of the text.
        given: what an importance matrix says of its columns, float32 (n,).
        total: Σ x, float64 (n,).
        low, high: the least and the largest number, 0 included.
        absmax: max |x| of every column, float32 (n,).
        abstotal: Σ |x| of every column, float64 (n,).
        sample: at most `SAMPLE` rows.
        float_moment: Σ f fᵀ.
        cross_moment: Σ x fᵀ, float32 (n, n).
        float_total: Σ f, float64 (n,).
        output_moments: Σ g gᵀ of the outputs of the sites that are rounded together, in blocks of its diagonal.
        routed: tokens that the model itself sent here, where more were counted.
        paired: the original sent the same tokens here. Where it did not (it chose other experts), nothing is known of both.
        groups: of a convolution in groups, what was seen of the input of each group; the fields above but `tokens` and `paired` are then None.
        name: what the input is called in messages.
    """

    tokens: int = 0
    moment: SecondMoment | None = None
    energy: Energy | None = None
    given: torch.Tensor | None = None
    total: torch.Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    absmax: torch.Tensor | None = None
    abstotal: torch.Tensor | None = None
    sample: Reservoir | None = None
    float_moment: SecondMoment | None = None
    cross_moment: torch.Tensor | None = None
    float_total: torch.Tensor | None = None
    output_moments: tuple[torch.Tensor, ...] | None = None
    routed: int | None = None
    paired: bool = True
    groups: list[Seen] = field(default_factory=list)
    name: str = "input"

    @property
    def mean(self) -> torch.Tensor:
        """Mean of every column, float32 (n,)."""
        assert self.total is not None and self.tokens
        return (self.total / self.tokens).float()

    @property
    def float_mean(self) -> torch.Tensor | None:
        """Mean of every column in the original, float32 (n,); None where it sends other tokens."""
        return None if self.float_total is None else (self.float_total / self.tokens).float()

    @property
    def importance(self) -> torch.Tensor | None:
        """Mean x² of every column, float32 (n,): from the importance matrix, or as it was seen."""
        if self.given is not None:
            return self.given
        return None if self.energy is None else self.energy.importance

    @property
    def absmean(self) -> torch.Tensor:
        """Mean |x| of every column, float32 (n,)."""
        assert self.abstotal is not None and self.tokens
        return (self.abstotal / self.tokens).float()

    def has(self, needs: Collection[Need]) -> bool:
        """Whether all of this is known."""
        return self.tokens > 0 and (self.paired or not OF_ORIGINAL & set(needs))

    @property
    def parts(self) -> list[Seen]:
        """What was seen of every group of inputs: of this one, where there are no groups."""
        return self.groups or [self]

    def add_groups(self, x: torch.Tensor, f: torch.Tensor | None, needs: Collection[Need], pairs: bool, span: int = 0, half: int = 0) -> None:  # fmt: skip
        """Count the input (groups, rows, n) of a convolution in groups, and what the original has there if pairs are wanted."""
        self.groups = self.groups or [Seen(name=self.name) for _ in range(len(x))]
        for g, part in enumerate(self.groups):
            part.add(x[g], needs, span, half)
            if pairs:
                part.add_pair(x[g], None if f is None else f[g], needs)
        self.tokens, self.paired = self.groups[0].tokens, self.groups[0].paired

    def add(self, x: torch.Tensor, needs: Collection[Need], span: int = 0, half: int = 0) -> None:
        """Count one input (…, n), of a batch of this span and half (see `arrondi.calibration`)."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        self.tokens += len(rows)
        if "moment" in needs:
            if self.moment is None:
                self.moment = SecondMoment(rows.shape[-1], name=self.name, device=rows.device)
            self.moment.update(rows, span=span)
        if "energy" in needs or "importance" in needs:
            self.energy = self.energy or Energy(rows.shape[-1])
            self.energy.add(rows, half)
        if "mean" in needs:
            total = rows.double().sum(0).cpu()
            self.total = total if self.total is None else self.total + total
        if "range" in needs:
            low, high = (float(v) for v in torch.aminmax(rows))
            self.low, self.high = min(self.low, low), max(self.high, high)
        if "absmax" in needs:
            largest = rows.abs().amax(0).float().cpu()
            self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        if "absmean" in needs:
            size = rows.abs().double().sum(0).cpu()
            self.abstotal = size if self.abstotal is None else self.abstotal + size
        if "sample" in needs:
            self.sample = self.sample or Reservoir(SAMPLE, name=self.name)
            self.sample.observe(rows.float())

    def add_pair(self, x: torch.Tensor, f: torch.Tensor | None, needs: Collection[Need]) -> None:
        """Count what the original has in the place of an input; None or other rows if it has nothing there."""
        if f is None or f.shape != x.shape:
            self.paired = False
        if not self.paired or f is None:
            self.float_moment = self.cross_moment = self.float_total = None
            return
        rows, others = (t.reshape(-1, t.shape[-1]).float() for t in (x, f))
        if "float moment" in needs:
            if self.float_moment is None:
                self.float_moment = SecondMoment(others.shape[-1], name=self.name, device=others.device)
            self.float_moment.update(others)
        if "cross moment" in needs:
            cross = rows.T @ others
            self.cross_moment = cross if self.cross_moment is None else self.cross_moment.add_(cross)
        if "float mean" in needs:
            total = others.double().sum(0).cpu()
            self.float_total = total if self.float_total is None else self.float_total + total


@dataclass(frozen=True)
class Side:
    """A unit of one model on the calibration batches.

    Attributes:
        parameter: gives a parameter of the unit, filled.
        forwards: one for each batch.
        owner: gives the module that has a parameter.
    """

    parameter: Callable[[str], torch.Tensor]
    forwards: Sequence[Forward]
    owner: Callable[[str], torch.nn.Module]


class _Enough(Exception):
    """Every input that is wanted has been seen; the rest of the forward pass is not needed."""


def collect(
    leaders: Collection[str],
    uses: Mapping[str, int],
    side: Side,
    needs: Collection[Need],
    original: Side | None = None,
    experts: Mapping[str, Sequence[int]] | None = None,
) -> dict[Key, Seen]:
    """Watch the inputs of some parameters while batches pass through a unit.

    Args:
        leaders: parameters to watch; one for each input that is wanted.
        uses: how often each matrix parameter is used in one pass; a pass ends early once all were seen that often.
        side: the unit.
        needs: what to collect.
        original: the same unit of the original; required for what is `OF_ORIGINAL`.
        experts: stack → those of its matrices that shall see every token; nothing else is then counted.
    """
    seen: dict[Key, Seen] = {}
    alike: dict[Key, Key] = {}
    # Which experts a batch reaches is not known beforehand, so stacks want the whole forward pass.
    count = sum(uses[p] for p in leaders) if all(p in uses for p in leaders) else 0
    both = bool(OF_ORIGINAL & set(needs))
    assert original is not None or not both
    whole = set(needs) <= {"range"}
    most = 0 if {"range", "absmax"} & set(needs) else PATCHES
    grouped: set[str] = set()
    for j in range(len(side.forwards)):
        others: dict[Key, list[torch.Tensor]] = {}
        if both and original is not None:
            _pass(leaders, count, original, j, lambda key, f: others.setdefault(key, []).append(f.clone()), most=most, experts=experts)  # noqa: B023  # fmt: skip

        span, half = span_of(j, len(side.forwards)), half_of(j)

        first: dict[str, tuple[Key, torch.Tensor]] = {}

        def note(key: Key, x: torch.Tensor, others: dict[Key, list[torch.Tensor]] = others, span: int = span, half: int = half, first: dict[str, tuple[Key, torch.Tensor]] = first, j: int = j) -> None:  # fmt: skip
            if experts and _alike(key, x, seen, alike, first, j):
                return
            found = seen.setdefault(key, Seen(name=f"the input of {key[0]}"))
            same = others.get(key)
            f = same.pop(0) if same else None
            if key[0] in grouped and not whole:
                found.add_groups(x, f, needs, both, span, half)
                return
            found.add(x, needs, span, half)
            if both:
                found.add_pair(x, f, needs)

        _pass(leaders, count, side, j, note, most=most, grouped=grouped, experts=experts)
    return {**seen, **{key: seen[same] for key, same in alike.items()}}


def _alike(
    key: Key,
    x: torch.Tensor,
    seen: Mapping[Key, Seen],
    alike: dict[Key, Key],
    first: dict[str, tuple[Key, torch.Tensor]],
    j: int,
) -> bool:
    """Whether a matrix of a stack is given what the first one is given, as all are where every token goes to each: it is counted once."""
    if j == 0 and key not in seen and key[0] in first and torch.equal(first[key[0]][1], x):
        alike[key] = first[key[0]][0]
    first.setdefault(key[0], (key, x))
    return key in alike


def _pass(
    leaders: Collection[str],
    count: int,
    side: Side,
    j: int,
    note: Callable[[Key, torch.Tensor], object],
    *,
    most: int = 0,
    grouped: set[str] | None = None,
    experts: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Send one batch through and note the inputs of some parameters, until `count` were seen (0: to the end).

    `experts`: stack → matrices that shall see every token; what the model sends there itself is not noted.
    `most`: positions of a convolution that are noted, 0: all. `grouped`: receives the parameters of convolutions in groups, whose inputs are noted
    as (groups, rows, n).
    """
    reports, extra = 0, False

    def switch() -> None:
        nonlocal extra
        extra = not extra

    def report(use: Use) -> None:
        nonlocal reports
        if bool(experts) is not extra:
            return
        if use.groups > 1 and grouped is not None:
            grouped.add(use.param)
        if use.kind != "embedding":
            note((use.param, use.matrix), use.some(most) if most else use.x)
        reports += 1
        if reports == count:
            raise _Enough

    modules = {id(m): (m, which) for p, which in (experts or {}).items() if (m := side.owner(p)) is not None}
    with (
        every_token(list(modules.values()), switch, switch),
        watch({p: side.parameter(p) for p in leaders}, report),
        contextlib.suppress(_Enough),
    ):
        side.forwards[j]()
