"""The plan: a recipe resolved on a model, before anything is computed.

Owns: `Plan` and `make_plan`. The files of the output follow from the plan: every tensor's type and shape are known before any
weight is read. What cannot work as asked (a selector that matches nothing, nothing to quantize) is a `problem` with its fix;
`quantize` refuses to start while there is one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from arrondi.checkpoint import LAYOUTS, Layout, ModelFacts, ShardPlan, TensorSpec, Verdict, readers_of
from arrondi.errors import SchemeError, unknown
from arrondi.model import Site, Source, StoredTensor
from arrondi.model.states import rounded_layers
from arrondi.pipeline.recipe import Recipe, matches
from arrondi.pipeline.resolve import LOOKED_UP, UNREACHED, PlannedTensor, Resolver
from arrondi.pipeline.select import Selected, declared_by, select, unreadable
from arrondi.pipeline.statistics import Need
from arrondi.pipeline.step import Declared, Step
from arrondi.pipeline.steps import get_step

_NEARLY_ALL = 0.9
"""Share of the weights that one layout must hold of what another holds to be taken for its readers."""
_NAMED = 3
"""Layers that a note names."""


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
        return ShardPlan.split([*specs, *(a.spec for a in self.declared.added)], shard_bytes)

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
        layout: a name of `LAYOUTS`; None takes the most widely read one that holds nearly all of what any holds.
        keep_misfits: weights whose shape does not fit the scheme are kept; otherwise they take the nearest groups that fit.
        images: the model will be run on images, so that what text alone does not reach is a target like any other.
        largest: how large inputs become, where a step has to know; see `largest_inputs`.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    tried: list[tuple[int, Resolver, list[PlannedTensor]]] = []
    for name in [layout] if layout else LAYOUTS:
        resolver = Resolver(source, recipe, LAYOUTS[name], keep_misfits, images, largest)
        tensors = [resolver.resolve(t) for t in source.tensors]
        tried.append((sum(t.weights for t in tensors if t.status == "quantized"), resolver, tensors))
        if not any(t.status == "kept because impossible" and t.rule for t in tensors):
            break
    most = max(weights for weights, _, _ in tried)
    # A table of embeddings was asked for by name: a layout that cannot hold it loses against one that can.
    enough = [t for t in tried if t[0] >= _NEARLY_ALL * most] if most else tried[-1:]
    _, resolver, tensors = next((t for t in enough if not _lost_tables(t[2])), enough[0])
    refused = [t for t in tensors if t.status == "kept because impossible" and t.rule]
    tensors = _as_stored(source, tensors)
    problems = unmatched(source, recipe, resolver.used)
    if not any(t.status == "quantized" for t in tensors) and not problems:
        problems.append(f"Nothing would be quantized. {_nothing(source, tensors, refused, layout, keep_misfits)}")
    selected = select(source, recipe, tensors)
    declared = declared_by(source, selected, tensors)
    problems += unreadable(source, declared) + _joined_unlike(source, tensors)
    bare = [t for t in tensors if t.status == "quantized" and not _keeps_its_name(resolver.layout, t)]
    modules = [m for t in bare for s in t.sites for m in s.modules]
    names = {t.name for t in tensors if t.status == "quantized"}
    packed = [m for t in tensors if t.status == "quantized" for s in t.sites for m in s.modules]
    joined = [len(names & {*g.sources}) / len(g.sources) for g in source.names.groups if g.joins_weights]
    facts = ModelFacts(
        dtype=_dtype(source.config),
        fused_experts=any(s.param_index is not None for s in source.sites),
        whole=not source.starts_without(modules),
        splits=bool(source.names.split),
        split_plain=any(not any(re.search(f"{p}$", f"{m}.weight") for m in packed) for p in source.names.split),
        plain=0.0 in joined,
        parted=any(0 < share < 1 for share in joined),
        joined=frozenset(
            m
            for t in tensors
            if t.status == "quantized"
            for s in t.sites
            if _is_joined(source, t, s)
            for m in s.modules
        ),
        reshaped=frozenset(m for s in source.sites if s.param in source.facts.reshaped for m in s.modules),
    )
    notes = [f"{n}: {_list(names)}." for n, names in resolver.notes.items()]
    if resolver is not tried[0][1]:
        notes.insert(0, _why_not(tried[0][1].layout, tried[0][2]))
    notes += [f"{t.name} is kept: {t.reason}." for t in refused[:_NAMED]]
    notes += _by_images(tensors) if images else _unreached(tensors)
    notes += [
        f"{one.step.name} is not done, {why}: {_list(names)}."
        for one in selected
        for why, names in one.refusals.items()
    ]
    notes += declared.notes
    notes += _tied_heads(source, tensors, {a.param for a in declared.added})
    if recipe.kv is not None:
        if not hasattr(source.model, "can_generate") or not source.model.can_generate():
            raise SchemeError(
                f"A {type(source.model).__name__} does not continue texts, so it keeps no keys and values. Leave kv out."
            )
        rounded_layers(source.model.config, recipe.kv)  # or the sentence that says why not
        notes.append(
            f"Keys and values become {recipe.kv} where arrondi runs the model; other programs read the weights and keep full ones. The measurement of this run is of the weights; `arrondi eval` reads through the cache."
        )
    placed = [t.placed for t in tensors if t.status == "quantized"]
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
    notes += _of_tables(plan)
    return plan


def _tied_heads(source: Source, tensors: Sequence[PlannedTensor], apart: Collection[str]) -> list[str]:
    """What is said of heads that have the codes of an embedding; those that a step stores apart have not."""
    tables = [s for t in tensors if t.status == "quantized" for s in t.sites if s.kind == "embedding"]
    heads = {s.name: [a for a in source.names.names_of(s.param) if a != s.param and a not in apart] for s in tables}
    return [
        f"{name} is quantized once and serves {_list(others)} too, which is tied to it."
        for name, others in heads.items()
        if others
    ]


def _of_tables(plan: Plan) -> list[str]:
    """How tables are rounded by methods that look at inputs."""
    told, found = plan.told_by_heads, dict[str, list[str]]()
    for t in plan.quantized:
        if t.rule is None or t.sites[0].kind != "embedding" or not get_step(t.rule.method).needs:
            continue
        blind = t.rule.fallback or get_step(t.rule.method).fallback
        how = f"Rounded by {blind} instead of {t.rule.method}, for {LOOKED_UP}"
        if t.sites[0].name in told:
            how = f"Rounded by {t.rule.method} on what the tied head is given in the original, damped so that rows count as much that are looked up"
        found.setdefault(how, []).append(t.name)
    return [f"{how}: {_list(names)}." for how, names in found.items()]


def _lost_tables(tensors: Sequence[PlannedTensor]) -> bool:
    """Whether an embedding that could be held packed is kept."""
    lost = [t for t in tensors if t.status == "kept because impossible" and t.rule]
    return any(s.kind == "embedding" and not s.unfit for t in lost for s in t.sites)


def _unreached(tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is said of parts that text does not reach."""
    kept = [t for t in tensors if t.status != "quantized" and t.reason.startswith(UNREACHED)]
    if not kept:
        return []
    share = sum(t.weights for t in kept) / max(sum(t.weights for t in tensors), 1)
    return [
        f"{len(kept)} weights that text does not reach ({100 * share:.0f} % of all) are kept as they are: {_list([t.name for t in kept])}."
    ]


def _by_images(tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is said of parts that images reach and text does not."""
    taken = [t for t in tensors if t.status == "quantized" and not all(s.reached for s in t.sites)]
    if not taken:
        return []
    share = sum(t.weights for t in taken) / max(sum(t.weights for t in tensors), 1)
    return [
        f"{len(taken)} weights that text does not reach ({100 * share:.0f} % of all) are quantized, too, because the images reach them: {_list([t.name for t in taken])}."
    ]


def _why_not(layout: Layout, tensors: list[PlannedTensor]) -> str:
    """Why the most widely read layout was not taken."""
    lost: dict[str, list[str]] = {}
    for t in tensors:
        if t.status == "kept because impossible" and t.rule:
            lost.setdefault(t.reason, []).append(t.name)
    why = "; ".join(f"{reason} ({_list(names)})" for reason, names in list(lost.items())[:_NAMED])
    return f"Not stored as {layout.name}, which more programs read: {why}."


def check(plan: Plan) -> None:
    """Refuse to start while the plan has a problem.

    Raises:
        SchemeError: the first problem, and how many more there are.
    """
    if plan.problems:
        more = f" ({len(plan.problems) - 1} more like it; `arrondi plan` lists all.)" if len(plan.problems) > 1 else ""
        raise SchemeError(plan.problems[0] + more)


def unmatched(source: Source, recipe: Recipe, used: set[str]) -> list[str]:
    """A sentence for every selector of the user that picked nothing."""
    asked = [("--targets", s) for r in recipe.rules for s in r.targets if s != "Linear"]
    asked += [("--ignore", s) for s in recipe.ignore or ()]
    modules = list(source.model.named_modules())
    names = {m for s in source.sites for m in s.modules} | {n for n, _ in modules}
    sentences = []
    for option, selector in asked:
        there = option == "--ignore" and any(matches(selector, [n], [type(m).__name__]) for n, m in modules)
        if selector in used or there:
            continue
        hint = _selector_hint(option, selector, names)
        sentences.append(f"{option} {selector!r} matches nothing in this model.{hint} `arrondi plan` lists the names.")
    return sentences


def _selector_hint(option: str, selector: str, names: set[str]) -> str:
    """What the user of another tool may mean: a part of a name, a list with commas, a name that is misspelt."""
    parts = [part.strip() for part in selector.split(",")]
    if len(parts) > 1 and not selector.startswith("re:"):
        return f" Give the option once for each: {' '.join(f'{option} {part}' for part in parts)}."
    ends = [n for n in names if n.endswith(f".{selector}") or f".{selector}." in n]
    if ends:
        return f" Names are whole: did you mean 're:.*{re.escape(selector)}'?"
    near = difflib.get_close_matches(selector.removeprefix("re:"), names - {""}, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def _nothing(
    source: Source, tensors: list[PlannedTensor], refused: list[PlannedTensor], layout: str | None, keep_misfits: bool
) -> str:
    """Why nothing is quantized, and what to do."""
    if refused:
        other = " Use --layout arrondi, which holds every scheme." if layout not in (None, "arrondi") else ""
        if keep_misfits and not other:
            other = " Leave out --keep-misfits to quantize such weights all the same."
        return f"{refused[0].name}: {refused[0].reason}.{other}"
    if not any(s.kind == "linear" for s in source.sites):
        return "The model has no linear layer; name what else to quantize with --targets."
    unfit = next((t for t in tensors if t.status == "kept because impossible"), None)
    return f"{unfit.name}: {unfit.reason}." if unfit else "Check --targets and --ignore."


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


def _joined_unlike(source: Source, tensors: Sequence[PlannedTensor]) -> list[str]:
    """A sentence for every matrix of the model whose stored parts would be quantized by more than one scheme: a config names it once."""
    parts: dict[str, list[PlannedTensor]] = {}
    for t in tensors:
        for site in t.sites:
            if _is_joined(source, t, site):
                parts.setdefault(site.modules[0], []).append(t)
    return [
        f"{_list([t.name for t in some])} are one weight of the model ({module}) and would not be quantized alike. Select them by one rule."
        for module, some in parts.items()
        if len({t.scheme for t in some}) > 1
    ]


def _is_joined(source: Source, tensor: PlannedTensor, site: Site) -> bool:
    """Whether a matrix becomes a part of a parameter that is one matrix."""
    group = source.names.group(site.param)
    return site.param_index is None and group is not None and len(group.sources) > 1 and not tensor.tensor.converted


def _keeps_its_name(layout: Layout, planned: PlannedTensor) -> bool:
    """Whether a reader that keeps weights packed finds codes under the weight's own name, so that its module has a `weight`."""
    return any(name == planned.name for name, _, _ in layout.specs(planned.placed))


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _dtype(config: dict[str, Any]) -> str:
    """The element type that config.json names."""
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else "float32"
