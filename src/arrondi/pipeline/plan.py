"""The plan: a recipe resolved on a model, before anything is computed.

Owns: `Plan` and `make_plan`. The files of the output follow from the plan: every tensor's type and shape are known before any
weight is read. What cannot work as asked (a selector that matches nothing, nothing to quantize) is a `problem` with its fix;
`quantize` refuses to start while there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from arrondi.checkpoint import CHOSEN, LAYOUTS, Layout, ModelFacts, ShardPlan, TensorSpec, Verdict, readers_of
from arrondi.errors import SchemeError, unknown
from arrondi.model import Source, StoredTensor
from arrondi.model.states import rounded_layers
from arrondi.pipeline.plan_facts import facts_of
from arrondi.pipeline.plan_says import (
    by_images,
    joined_unlike,
    kept,
    listed,
    nothing,
    of_tables,
    tied_heads,
    unmatched,
    unreached,
    why_not,
)
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.resolve import PlannedTensor, Resolver
from arrondi.pipeline.select import Selected, declared_by, select, unreadable
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Declared, Step
from arrondi.pipeline.steps import get_step

_NEARLY_ALL = 0.9
"""Share of the weights that one layout must hold of what another holds to be taken for its readers."""


@dataclass(frozen=True)
class Plan:
    """A resolved recipe.

    Attributes:
        source: the model.
        tensors: every tensor of the output, in the order of the files.
        layout: how quantized tensors will be stored.
        selected: rewrites and repairs with their sites, in the recipe's order.
        declared: what they change and add.
        problems: sentences that say what cannot work and what to do; empty when the plan can run.
        notes: things to know that stop nothing.
        readers: who reads the result, and who does not or computes something else.
        facts: what layouts and readers must know of the model.
        all_experts: experts that few tokens reach are calibrated on all tokens of their block.
        kv: what keys and values become while the model runs.
    """

    source: Source
    tensors: list[PlannedTensor]
    layout: Layout
    selected: list[Selected]
    declared: Declared
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    readers: list[Verdict] = field(default_factory=list)
    facts: ModelFacts = ModelFacts()
    all_experts: bool = False
    kv: str | None = None

    @property
    def quantized(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.status == "quantized"]

    @property
    def kept_modules(self) -> list[str]:
        """Paths of modules with a matrix that stays as it is, also of those that the model does not build."""
        quantized = {m for t in self.quantized for s in t.sites for m in s.modules}
        kept = [m for t in self.tensors if t.status != "quantized" for m in _paths(t)]
        return sorted(set(kept) - quantized - {""})  # a matrix of the model itself belongs to no module inside

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of the output."""
        return self.layout.config([t.placed for t in self.quantized], self.kept_modules, self.facts)

    def specs(self, tensor: PlannedTensor) -> list[TensorSpec]:
        """The tensors that are written for one tensor."""
        if tensor.status == "quantized":
            return self.layout.specs(tensor.placed)
        return [(tensor.name, tensor.dtype, tensor.shape)]

    def nbytes(self, tensor: PlannedTensor) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.specs(tensor))

    def shards(self, shard_bytes: int) -> ShardPlan:
        specs = [spec for t in self.tensors for spec in self.specs(t)]
        specs += [a.spec for a in self.declared.added]
        made = [t.placed for t in self.quantized]
        parts = {name for p in made for name, _, _ in self.layout.specs(p)}
        plain = [name for name, _, _ in specs if name not in parts]
        return ShardPlan.split(specs, shard_bytes, self.layout.metadata(made, plain, self.facts))

    @property
    def output_bytes(self) -> int:
        added = sum(math.prod(a.shape) * a.dtype.itemsize for a in self.declared.added)
        return sum(self.nbytes(t) for t in self.tensors) + added

    def steps(self) -> set[Step]:
        """Every step that will run."""
        rounds = {get_step(t.rule.method) for t in self.quantized if t.rule}
        return rounds | {one.step for one in self.selected if one.groups}

    @property
    def touched(self) -> set[str]:
        """Tensors that a rewrite or a repair changes, or might."""
        return {s.tensor for one in self.selected for s in one.sites} | set(self.declared.changed)

    @property
    def spreads(self) -> bool:
        """Whether inputs go through transforms for which weights are made."""
        return any(
            t.scheme is not None and t.scheme.inputs is not None and t.scheme.inputs.spread for t in self.quantized
        )

    def front(self, early: Collection[str]) -> list[PlannedTensor]:
        """Tensors that work before the first unit and that a step changes: embeddings that are rotated, projections of narrow ones.

        Args:
            early: parameters that are used there.
        """
        names, touched = self.source.names, self.touched
        return [
            t
            for t in self.tensors
            if t.block is None
            and (t.status == "quantized" or t.name in touched)
            and any(n in early for p in t.tensor.params if p in names.params for n in names.names_of(p))
        ]

    @property
    def told_by_heads(self) -> dict[str, str]:
        """Site of a table → its parameter, where a head that is tied to it says what its codes are multiplied by.

        Methods that want a second moment alone are told that of the head's input in the original. What was rewritten, or is stored apart
        from its head, has none, and neither has a model that is run as a whole.
        """
        apart = {a.param for a in self.declared.added}
        names = self.source.names
        return {
            s.name: s.param
            for t in self.quantized
            for s in t.sites
            if s.kind == "embedding"
            and t.rule is not None
            and get_step(t.rule.method).needs == {"moment"}
            and t.name not in self.touched
            and not self.source.whole
            and any(alias != s.param and alias not in apart for alias in names.names_of(s.param))
        }

    @property
    def calibrated(self) -> bool:
        """Whether something cannot be done without calibration data."""
        return self.needs_text()

    def needs_text(self, given: Collection[Need] = ()) -> bool:
        """Whether something cannot be done without calibration data, even if this is known already."""
        return any(s.needs - set(given) for s in self.steps()) or any(_static(t) for t in self.quantized)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        total = sum(t.weights for t in self.tensors)
        quantized = sum(t.weights for t in self.quantized)
        bits = 8 * sum(self.nbytes(t) for t in self.quantized)
        return {
            "layout": self.layout.name,
            "readers": [asdict(v) for v in self.readers],
            "parameters": total,
            "output_bytes": self.output_bytes,
            "bits_per_weight": round(bits / quantized, 4) if quantized else None,
            "model_bits_per_weight": round(8 * self.output_bytes / max(total, 1), 4),
            "counts": {
                s: sum(t.status == s for t in self.tensors)
                for s in ("quantized", "kept by rule", "kept because impossible")
            },
            "kv": self.kv,
            "problems": self.problems,
            "notes": self.notes,
            "steps": [
                {"step": one.step.name, "kind": one.step.kind, "sites": [s.name for s in one.sites]}
                for one in self.selected
            ],
            "changed": list(self.declared.changed),
            "added": [{"name": a.name, "shape": list(a.shape)} for a in self.declared.added],
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.shape),
                    "status": t.status,
                    "reason": t.reason,
                    "scheme": str(t.scheme) if t.scheme else None,
                    "method": t.rule.method if t.rule else None,
                    "bytes": self.nbytes(t),
                    "bits_per_weight": round(8 * self.nbytes(t) / max(t.weights, 1), 4),
                }
                for t in self.tensors
            ],
        }


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    layout: str | None = None,
    keep_misfits: bool = False,
    images: bool = False,
    largest: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Resolve a recipe on a model.

    Args:
        source: the model.
        recipe: the user's rules.
        layout: a name of `LAYOUTS`; None takes the most widely read one of `CHOSEN` that holds nearly all of what any holds.
        keep_misfits: weights whose shape does not fit the scheme are kept; otherwise they take the nearest groups that fit.
        images: the model will be run on images, so that what text alone does not reach is a target like any other.
        largest: how large inputs become, where a step has to know; see `largest_inputs`.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    names = [layout] if layout else list(CHOSEN)
    tried = _resolved(source, names, lambda held: Resolver(source, recipe, held, keep_misfits, images, largest))
    _, resolver, tensors = _most_held(tried)
    refused = [t for t in tensors if t.status == "kept because impossible" and t.rule]
    tensors = _as_stored(source, tensors)
    problems = unmatched(source, recipe, resolver.used)
    if not any(t.status == "quantized" for t in tensors) and not problems:
        problems.append(f"Nothing would be quantized. {nothing(source, tensors, refused, layout, keep_misfits)}")
    selected = select(source, recipe, tensors)
    declared = declared_by(source, selected, tensors)
    problems += unreadable(source, declared) + joined_unlike(source, tensors)
    facts = facts_of(source, tensors, resolver.layout)
    notes = [f"{n}: {listed(names)}." for n, names in resolver.notes.items()]
    if resolver is not tried[0][1]:
        notes.insert(0, why_not(tried[0][1].layout, tried[0][2]))
    notes += kept(refused)
    notes += by_images(tensors) if images else unreached(tensors)
    notes += [
        f"{one.step.name} is not done, {why}: {listed(names)}."
        for one in selected
        for why, names in one.refusals.items()
    ]
    notes += declared.notes
    notes += tied_heads(source, tensors, {a.param for a in declared.added})
    if recipe.kv is not None:
        notes.append(_of_states(source, recipe.kv))
    placed = [t.placed for t in tensors if t.status == "quantized"]
    problems += filter(None, [resolver.layout.together(placed)])
    readers = readers_of(placed, resolver.layout, facts)
    plan = Plan(
        source,
        tensors,
        resolver.layout,
        selected,
        declared,
        problems,
        notes,
        readers,
        facts,
        recipe.all_experts,
        recipe.kv,
    )
    notes += of_tables(plan.quantized, plan.told_by_heads)
    return plan


_Tried = tuple[int, Resolver, list[PlannedTensor]]
"""Weights that a layout would hold quantized, and how the tensors were resolved for it."""


def _resolved(source: Source, names: Sequence[str], resolver_of: Callable[[Layout], Resolver]) -> list[_Tried]:
    """The tensors as each layout would hold them, up to the first that holds all that is asked for."""
    tried: list[_Tried] = []
    for name in names:
        resolver = resolver_of(LAYOUTS[name])
        tensors = [resolver.resolve(t) for t in source.tensors]
        tried.append((sum(t.weights for t in tensors if t.status == "quantized"), resolver, tensors))
        if not any(t.status == "kept because impossible" and t.rule for t in tensors):
            break
    return tried


def _most_held(tried: Sequence[_Tried]) -> _Tried:
    """The first layout that holds nearly all of what any holds.

    A table of embeddings was asked for by name: a layout that cannot hold it loses against one that can.
    """
    most = max(weights for weights, _, _ in tried)
    enough = [t for t in tried if t[0] >= _NEARLY_ALL * most] if most else tried[-1:]
    return next((t for t in enough if not _lost_tables(t[2])), enough[0])


def _lost_tables(tensors: Sequence[PlannedTensor]) -> bool:
    """Whether an embedding that could be held packed is kept."""
    lost = [t for t in tensors if t.status == "kept because impossible" and t.rule]
    return any(s.kind == "embedding" and not s.unfit for t in lost for s in t.sites)


def _of_states(source: Source, kv: str) -> str:
    """What is said of rounded keys and values, or the sentence that says why the model has none to round."""
    if not hasattr(source.model, "can_generate") or not source.model.can_generate():
        raise SchemeError(
            f"A {type(source.model).__name__} does not continue texts, so it keeps no keys and values. Leave kv out."
        )
    rounded_layers(source.model.config, kv)
    return (
        f"Keys and values become {kv} where arrondi runs the model; other programs read the weights and keep full ones. "
        "The measurement of this run is of the weights; `arrondi eval` reads through the cache."
    )


def check(plan: Plan) -> None:
    """Refuse to start while the plan has a problem.

    Raises:
        SchemeError: the first problem, and how many more there are.
    """
    if plan.problems:
        more = f" ({len(plan.problems) - 1} more like it; `arrondi plan` lists all.)" if len(plan.problems) > 1 else ""
        raise SchemeError(plan.problems[0] + more)


def _as_stored(source: Source, tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Parts of a stored tensor of which nothing is quantized are that tensor again."""
    split = {t.tensor.sources for t in tensors if t.tensor.converted and t.status == "quantized"}
    found: dict[str, PlannedTensor] = {}
    for t in tensors:
        if not t.tensor.converted or t.tensor.sources in split:
            found[t.name] = t
            continue
        for name in t.tensor.sources:
            before = found[name].tensor.params if name in found else ()
            whole = StoredTensor(
                name, tuple(source.names.shapes[name]), (name,), (), (*before, *t.tensor.params), t.block
            )
            found[name] = PlannedTensor(whole, source.dtype_of(whole), t.status, t.reason)
    return list(found.values())


def _static(tensor: PlannedTensor) -> bool:
    inputs = tensor.scheme.inputs if tensor.scheme else None
    return inputs is not None and inputs.dynamic is not True


def _paths(tensor: PlannedTensor) -> list[str]:
    if tensor.sites:
        return [m for s in tensor.sites for m in s.modules]
    if len(tensor.shape) < 2:
        return []
    owners = dict.fromkeys(p.rpartition(".")[0] for p in tensor.tensor.params)
    return list(owners) or [tensor.name.removesuffix(".weight")]
