"""What steps work on in one unit: `Work`, and `Original`, the same unit as it is without rounding.

The unit is filled with the quantized model's weights. A step reads and changes weights through it, asks what calibration says of
inputs, and adds tensors; what becomes of the unit is then read off it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme
from arrondi.model import Instance, Passage, Site, TreeStore
from arrondi.model.flow import trace
from arrondi.pipeline.importance import Known
from arrondi.pipeline.statistics import FEW, Forward, Key, Need, Seen, Side, collect
from arrondi.pipeline.step import Step
from arrondi.rounding.error import output_loss, weight_loss
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid

if TYPE_CHECKING:  # steps import this file, and these look steps up
    from arrondi.pipeline.fisher import LossKnown
    from arrondi.pipeline.plan import Plan
    from arrondi.pipeline.resolve import PlannedTensor
    from arrondi.pipeline.rounded import Rounded
    from arrondi.pipeline.select import Selected


@dataclass
class Stage:
    """Parameters that can be rounded together: none depends on another's output.

    Attributes:
        leaders: parameter → the first parameter that reads the same input.
        uses: how often a matrix parameter is used in one pass; stacks are not counted, nor what one batch did not reach.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """The unit of the original, rewritten as the quantized model is, but not rounded.

    Attributes:
        instance: with the unit filled; `rewrite` copies to it what rewrites do to the quantized model.
        forwards: one for each calibration batch, on what the original has there.
        own: whether nobody else needs the original as it was, so that it may be rewritten.
    """

    instance: Instance
    forwards: Sequence[Forward]
    own: bool = True

    @property
    def side(self) -> Side:
        return Side(self.instance.parameter, self.forwards, self.instance.owner)


class Work:
    """One unit under the steps of a plan.

    Attributes:
        instance: the model, with the unit's weights filled.
        tensors: what is planned for the unit's tensors.
        selected: the unit's rewrites and repairs.
        forwards: one for each calibration batch; empty without calibration.
        original: the same unit of the original on the same batches, if a step needs it.
        importance: what an importance matrix says.
        heads: site of a table → what the head that is tied to it is given in the original.
        loss: what the original's loss says of outputs.
        results: site → what rounding gave.
        grids: tensor → the static grid of its inputs.
        changed: tensors of the file whose value a step changed, as they are written.
        added: new tensors, as they are written.
        done: site → rewrites and repairs that were done to it.
        before: site → its weight before it was rounded; for repairs, during their stage.
        seen: site → what is known of its input; for repairs, during their stage.
        facts: tensor → what steps say of it, for the report.
    """

    def __init__(
        self,
        plan: Plan,
        instance: Instance,
        tensors: Sequence[PlannedTensor],
        forwards: Sequence[Forward],
        original: Original | None = None,
        importance: Known | None = None,
        heads: Mapping[str, Seen] | None = None,
        loss: LossKnown | None = None,
    ) -> None:
        self.heads, self.loss = heads or {}, loss
        self.importance = importance or Known()
        self.plan, self.instance, self.tensors, self.forwards = plan, instance, tensors, forwards
        self.original = original
        self.planned = {s.name: t for t in tensors for s in t.sites}
        self.sites = [s for t in tensors if t.status == "quantized" for s in t.sites]
        self.selected = [one.within(self.planned) for one in plan.selected]
        self.results: dict[str, Rounded] = {}
        self.grids: dict[str, Grid] = {}
        self.changed: dict[str, torch.Tensor] = {}
        self.added: dict[str, torch.Tensor] = {}
        self.done: dict[str, list[str]] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.seen: dict[str, Seen] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    # ── for steps ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def weight(self, site: Site) -> torch.Tensor:
        """A site's weight (out, in) as a view; what is written to it is what the model computes with."""
        return site.region(self.instance.parameter(site.param))

    def tensor(self, name: str) -> torch.Tensor:
        """Any other tensor of the file, as the parameter that it fills."""
        return self.instance.parameter(self.instance.names.targets_of[name][0])

    def change(self, name: str, value: torch.Tensor) -> None:
        """Give a tensor of the file another value, which the step declared. It counts in its stored type."""
        kept = value.to(self.plan.source.stored_dtype(name))
        self.tensor(name).copy_(kept)
        self.changed[name] = kept.cpu()

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor that the step declared. It counts in the type that was declared."""
        own = next(a for a in self.plan.declared.added if a.name == name)
        kept = value.to(own.dtype).cpu()
        self.added[name] = kept
        self.instance.put(own.param, kept.float())

    def targets(self) -> TreeStore:
        """What the original's unit gives for every batch, on what the original has there; to be closed after use."""
        assert self.original is not None, "a step that needs float outputs says so"
        return self.outputs(self.original.forwards)

    def outputs(self, forwards: Sequence[Forward]) -> TreeStore:
        """What a unit gives now for every batch, to be closed after use.

        Raises:
            SchemeError: it is not one of a chain's.
        """
        passages = [forward for forward in forwards if isinstance(forward, Passage)]
        if not passages:
            raise SchemeError("What lies outside the blocks has no outputs to be held to. Leave it out of the step.")
        stream = passages[0].stream
        return TreeStore(stream.budget, stream.folder, (passage().cpu() for passage in passages))

    def replace(self, site: Site, q: QTensor, **facts: Any) -> None:
        """Give a site that was rounded other codes or scales; for repairs.

        Args:
            q: of the same shape and scheme.
            facts: for the report.
        """
        found, weight = self.results[site.name], self.weight(site)
        restored = q.dequantize()
        found.weight_error = weight_loss(self.before[site.name], q)
        seen = self.seen.get(site.name)
        if seen is not None and seen.moment is not None:
            found.output_error = output_loss(self.before[site.name], restored, seen.moment.matrix())
        elif found.output_error is not None:
            found.output_error = None
        found.q, found.facts = q, {**found.facts, **facts}
        weight.copy_(restored)

    def statistics(self, sites: Sequence[Site], needs: Collection[Need]) -> dict[str, Seen]:
        """Site → what calibration says of its input now; sites that no token reaches are not in it."""
        stage = self.whole_stage
        leaders = {stage.leaders[s.param] for s in sites if s.param in stage.leaders}
        return self.by_site(sites, stage, self.collected(leaders, stage, needs))

    @property
    def added_params(self) -> dict[str, str]:
        """Tensor that steps add → the parameter that it is."""
        return {a.name: a.param for a in self.plan.declared.added}

    # ── how inputs are shared ─────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def stages(self) -> list[Stage]:
        """All matrices of the unit, in the order of use. What the first batch does not reach is looked for in the others."""
        wanted = {s.param for t in self.tensors for s in t.sites if s.kind != "embedding"}
        found: list[Stage] = []
        wanted = {p for p in wanted if not self.instance.is_empty(p)}
        for j, forward in enumerate(self.forwards):
            if not wanted:
                break
            flow = trace(None, {p: self.instance.parameter(p) for p in wanted}, forward)
            stacks = {u.param for u in flow.uses if u.matrix is not None}
            counts: dict[str, int] = {}
            for use in flow.uses if j == 0 else ():
                if use.param not in stacks:
                    counts[use.param] = counts.get(use.param, 0) + 1
            found += [Stage(dict(stage.leaders), counts) for stage in flow.stages]
            wanted -= {p for stage in flow.stages for p in stage.leaders}
        return found

    @cached_property
    def whole_stage(self) -> Stage:
        """All stages as one."""
        leaders = {p: leader for stage in self.stages for p, leader in stage.leaders.items()}
        return Stage(leaders, self.stages[0].uses if self.stages else {})

    def collected(self, leaders: Collection[str], stage: Stage, needs: Collection[Need]) -> dict[Key, Seen]:
        """What is seen of inputs while all batches pass."""
        side = Side(self.instance.parameter, self.forwards, self.instance.owner)
        original = self.original.side if self.original else None
        found = collect(leaders, stage.uses, side, needs, original)
        few = self._few(leaders, found) if self.plan.all_experts else {}
        if few:
            more = collect(few, {}, side, needs, original, few)
            for key, one in more.items():
                routed = found[key].tokens if key in found else 0
                found[key] = replace(one, routed=routed)
        return found

    def _few(self, leaders: Collection[str], found: Mapping[Key, Seen]) -> dict[str, list[int]]:
        """Stack → its matrices that fewer than `FEW` tokens for every input reached."""
        few: dict[str, list[int]] = {}
        for site in (s for t in self.tensors for s in t.sites if s.param in leaders):
            if site.param_index is None:
                continue
            seen = found.get((site.param, site.param_index))
            if seen is None or seen.tokens < FEW * site.matrix_shape[1]:
                few.setdefault(site.param, []).append(site.param_index)
        return {param: sorted(set(which)) for param, which in few.items()}

    def by_site(self, sites: Sequence[Site], stage: Stage, seen: Mapping[Key, Seen]) -> dict[str, Seen]:
        """What was seen, for every site that a token reached."""
        keys = {s.name: (stage.leaders[s.param], s.param_index) for s in sites if s.param in stage.leaders}
        found = {name: seen[key] for name, key in keys.items() if key in seen and seen[key].tokens}
        given = self.importance.columns
        return {name: replace(one, given=given[name]) if name in given else one for name, one in found.items()}

    def foretold(self, site: Site) -> Seen | None:
        """What the importance matrix says of a site, where that is all that its step needs."""
        known = self.importance
        if site.name not in known.columns or self.step(site).needs != {"importance"}:
            return None
        return Seen(tokens=known.tokens[site.name], given=known.columns[site.name])

    # ── what is planned ───────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, site: Site) -> Step:
        """The step that rounds a site."""
        from arrondi.pipeline.steps import get_step

        rule = self.planned[site.name].rule
        assert rule is not None
        return get_step(rule.method)

    def scheme(self, site: Site) -> LayerScheme:
        scheme = self.planned[site.name].scheme
        assert scheme is not None
        return scheme

    def of_kind(self, kind: str) -> list[Selected]:
        """The unit's rewrites or repairs, in the recipe's order."""
        return [one for one in self.selected if one.step.kind == kind and one.groups]
