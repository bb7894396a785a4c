"""What steps work on in one unit: `Work`.

The unit is filled with the quantized model's weights. Rewrites come first; then weights are rounded stage by stage, so that what
is rounded later is calibrated on what earlier weights give ("true sequential" order); repairs follow the weights that they
belong to. Weights that read the same input form a stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.errors import DataError
from arrondi.formats import LayerScheme, PerBlock, Scheme
from arrondi.model import Instance, Site
from arrondi.model.flow import trace
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.rounded import Rounded, round_alone, round_together, rowwise
from arrondi.pipeline.statistics import Forward, Key, Seen, collect
from arrondi.pipeline.step import Need, Step, get_step
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.observed import static_grid


@dataclass
class _Stage:
    """Parameters that can be rounded together: none depends on another's output.

    Attributes:
        leaders: parameter → the first parameter that reads the same input.
        uses: how often a matrix parameter is used in one pass; stacks are not counted.
    """

    leaders: dict[str, str]
    uses: dict[str, int]


class Work:
    """One unit under the steps of a plan.

    Attributes:
        instance: the model, with the unit's weights filled.
        tensors: what is planned for the unit's tensors.
        forwards: one for each calibration batch; empty without calibration.
        results: site → what rounding gave.
        changed: tensors of the file whose value a step changed.
        added: new tensors.
        before: site → its weight before it was rounded, for repairs; only during its stage.
    """

    def __init__(self, instance: Instance, tensors: Sequence[PlannedTensor], forwards: Sequence[Forward]) -> None:
        self.instance, self.tensors, self.forwards = instance, tensors, forwards
        self.planned = {s.name: t for t in tensors for s in t.sites}
        self.sites = [s for t in tensors if t.status == "quantized" for s in t.sites]
        self.results: dict[str, Rounded] = {}
        self.grids: dict[str, Grid] = {}
        self.changed: dict[str, torch.Tensor] = {}
        self.added: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.seen: dict[str, Seen] = {}

    # ── for steps ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def weight(self, site: Site) -> torch.Tensor:
        """A site's weight (out, in) as a view; what is written to it is what the model computes with."""
        return site.region(self.instance.parameter(site.param))

    def tensor(self, name: str) -> torch.Tensor:
        """Any other tensor of the file, as the parameter that it fills."""
        return self.instance.parameter(self.instance.names.targets_of[name][0])

    def change(self, name: str, value: torch.Tensor) -> None:
        """Give a tensor of the file another value, which the step declared. It counts in its stored type."""
        kept = value.to(self.instance.source.stored_dtype(name))
        self.tensor(name).copy_(kept)
        self.changed[name] = kept

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor that the step declared."""
        self.added[name] = value
        self.instance.overlay.added[name] = value.float
        self.instance.put_added(name)

    def statistics(self, sites: Sequence[Site], needs: Collection[Need]) -> dict[str, Seen]:
        """Site → what calibration says of its input now; sites that no token reaches are not in it."""
        stage = self._whole_stage()
        leaders = {stage.leaders[s.param] for s in sites if s.param in stage.leaders}
        seen = collect(leaders, self._params(leaders), stage.uses, self.forwards, needs)
        return {s.name: found for s in sites if (found := self._seen_by(s, stage, seen)) is not None}

    # ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Rewrites, then stage by stage roundings and repairs.

        Raises:
            DataError: a weight is not finite.
        """
        for site in self.sites:
            if not bool(torch.isfinite(self.weight(site)).all()):
                raise DataError(
                    f"{site.name}: the weights hold NaN or infinity. Repair the checkpoint, or leave the tensor out with --ignore."
                )
        for step, options, sites in self._steps("rewrite"):
            assert step.apply is not None
            step.apply(self, sites, options)
        stages = self._stages() if self.forwards else []
        reached = {p for stage in stages for p in stage.leaders}
        for stage in stages:
            self._stage(stage)
        for site in self.sites:
            if site.param not in reached:
                self._round_blindly(site, "no calibration data reaches it" if self.forwards else "")

    def _steps(self, kind: str) -> list[tuple[Step, dict[str, Any], list[Site]]]:
        """The unit's rewrites or repairs in the recipe's order, each with its sites."""
        found: dict[str, tuple[Step, dict[str, Any], list[Site]]] = {}
        for t in self.tensors:
            for step, options in t.steps:
                if step.kind == kind:
                    found.setdefault(step.name, (step, options, []))[2].extend(t.sites)
        return list(found.values())

    def _stage(self, stage: _Stage) -> None:
        sites = [s for s in self.sites if s.param in stage.leaders]
        leaders = set(stage.leaders.values())
        params = self._params(leaders)
        self._fix_ranges(sites, stage, params)
        repairs = [(step, options, [s for s in own if s in sites]) for step, options, own in self._steps("repair")]
        needs: set[Need] = {n for s in sites for n in self._step(s).needs}
        needs |= {n for step, _, own in repairs if own for n in step.needs}
        # Without a need of its own a method still learns how far the layer's output moves.
        seen = collect(leaders, params, stage.uses, self.forwards, needs | {"moment"})
        self.seen = {s.name: found for s in sites if (found := self._seen_by(s, stage, seen)) is not None}
        if any(own for _, _, own in repairs):
            self.before = {s.name: self.weight(s).clone() for s in sites}
        for group in self._together(sites, stage):
            self._round(group)
        for step, options, own in repairs:
            if own:
                assert step.apply is not None
                step.apply(self, own, options)
        self.before, self.seen = {}, {}

    def _fix_ranges(self, sites: Sequence[Site], stage: _Stage, params: Mapping[str, torch.Tensor]) -> None:
        """Static scales of inputs come from the range that calibration sees, before anything is rounded."""
        static = [s for s in sites if _static(self._scheme(s))]
        if not static:
            return
        leaders = {stage.leaders[s.param] for s in static}
        seen = collect(leaders, {p: params[p] for p in leaders}, stage.uses, self.forwards, {"range"})
        for site in static:
            found, inputs = self._seen_by(site, stage, seen), self._scheme(site).inputs
            assert inputs is not None
            low, high = (found.low, found.high) if found is not None else (0.0, 0.0)
            self.grids[site.tensor] = static_grid(torch.tensor([[low]]), torch.tensor([[high]]), inputs)
            self.instance.round_inputs(dict.fromkeys(site.rounds_inputs, (inputs, self.grids[site.tensor])))

    def _together(self, sites: Sequence[Site], stage: _Stage) -> list[list[Site]]:
        """Sites with the same input, rule and scheme, where rows are rounded by themselves."""
        groups: dict[Any, list[Site]] = {}
        for s in sites:
            planned = self.planned[s.name]
            scheme = self._scheme(s).weights
            alone = None if rowwise(scheme) else s.name
            key = (stage.leaders[s.param], s.param_index, scheme, id(planned.rule), alone)
            groups.setdefault(key, []).append(s)
        return list(groups.values())

    def _round(self, sites: list[Site]) -> None:
        planned, seen = self.planned[sites[0].name], self.seen.get(sites[0].name)
        assert planned.rule is not None
        step = self._step(sites[0])
        if seen is None or (seen.moment is None and "moment" in step.needs):
            for site in sites:
                self._round_blindly(site, "no token reached it")
            return
        if not stackable(self._scheme(sites[0]).weights, len(planned.sites)):
            for site in sites:
                self._round_blindly(site, "one scale covers all experts")
            return
        weights = [self.weight(s) for s in sites]
        scheme = self._scheme(sites[0]).weights
        done = round_together(sites, weights, scheme, step.name, planned.rule.options, seen)
        for site, weight, rounded in zip(sites, weights, done, strict=True):
            self.results[site.name] = rounded
            weight.copy_(rounded.q.dequantize())

    def _round_blindly(self, site: Site, why: str) -> None:
        """Without knowing the inputs; a tensor whose scales cover several sites at once."""
        planned = self.planned[site.name]
        assert planned.rule is not None
        step = self._step(site)
        method, options = (step.fallback, {}) if step.fallback else (step.name, planned.rule.options)
        scheme = self._scheme(site).weights
        if stackable(scheme, len(planned.sites)):
            rounded = round_alone(self.weight(site), scheme, method, options, site.name, why if step.fallback else "")
            rounded.tokens = 0 if self.forwards else None
            self.results[site.name] = rounded
            self.weight(site).copy_(rounded.q.dequantize())
        elif site == planned.sites[-1]:
            stack = torch.cat([self.weight(s) for s in planned.sites])
            rounded = round_alone(stack, scheme, method, options, planned.name, why if step.fallback else "")
            rounded.tokens = 0 if self.forwards else None
            self.results[planned.sites[0].name] = rounded
            parts = rounded.q.dequantize().split(site.shape[0])
            for s, part in zip(planned.sites, parts, strict=True):
                self.weight(s).copy_(part)

    def _stages(self) -> list[_Stage]:
        """The stages of the unit in the order of use; one stage, where no method looks at what others did."""
        stages = self._traced()
        if any(self._step(s).needs for s in self.sites) or not stages:
            return stages
        return [_Stage({p: l for s in stages for p, l in s.leaders.items()}, stages[0].uses)]

    def _traced(self) -> list[_Stage]:
        params = self._params({s.param for s in self.sites})
        flow = trace(None, params, self.forwards[0])
        counts: dict[str, int] = {}
        for use in flow.uses:
            if use.matrix is None:
                counts[use.param] = counts.get(use.param, 0) + 1
        uses = {p: n for p, n in counts.items() if not any(u.param == p and u.matrix is not None for u in flow.uses)}
        return [_Stage(dict(stage.leaders), uses) for stage in flow.stages]

    def _whole_stage(self) -> _Stage:
        stages = self._traced()
        return _Stage({p: l for s in stages for p, l in s.leaders.items()}, stages[0].uses if stages else {})

    def _params(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return {p: self.instance.parameter(p) for p in names}

    def _seen_by(self, site: Site, stage: _Stage, seen: Mapping[Key, Seen]) -> Seen | None:
        found = seen.get((stage.leaders[site.param], site.param_index))
        return found if found is not None and found.tokens else None

    def _step(self, site: Site) -> Step:
        rule = self.planned[site.name].rule
        assert rule is not None
        return get_step(rule.method)

    def _scheme(self, site: Site) -> LayerScheme:
        scheme = self.planned[site.name].scheme
        assert scheme is not None
        return scheme


def stackable(scheme: Scheme, count: int) -> bool:
    """Whether the matrices of a tensor can be rounded one by one: no scale covers two of them."""
    blocks = isinstance(scheme.granularity, PerBlock) and not isinstance(scheme.scale, Scheme)
    return count == 1 or rowwise(scheme) or blocks


def _static(scheme: LayerScheme) -> bool:
    return scheme.inputs is not None and scheme.inputs.dynamic is not True


__all__ = ["Work", "stackable"]
