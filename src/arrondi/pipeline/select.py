"""Which sites a recipe's rewrites and repairs apply to, and what they declare.

Owns: `Selected` and `select`. Sites that belong together by a step's scope are taken together or not at all; what a step refuses is
said with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme
from arrondi.model import InMemory, Names, OnDisk, Site, Source, build_model
from arrondi.model.folds import find_folds
from arrondi.pipeline.folding import Joint, joints_of
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.step import Declared, Step
from arrondi.pipeline.steps import get_step


@dataclass(frozen=True)
class Selected:
    """One rewrite or repair of the recipe with its sites.

    Attributes:
        step, options: what is done.
        groups: sites that are done together.
        refusals: why not → sites where it is not done.
        joints: of a step of the scope "fold", what it scales.
    """

    step: Step
    options: Mapping[str, Any]
    groups: tuple[tuple[Site, ...], ...]
    refusals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joints: tuple[Joint, ...] = ()

    @property
    def sites(self) -> list[Site]:
        return [s for group in self.groups for s in group]

    def targets(self, group: Sequence[Site]) -> Sequence[Site] | list[Joint]:
        """What the step is given for a group: its sites, or the joints among them."""
        own = {s.name for s in group}
        joints = [j for j in self.joints if own.issuperset(s.name for s in j.sites)]
        return joints if self.step.scope == "fold" else group

    def within(self, names: Iterable[str]) -> Selected:
        """The same for these sites alone; groups of the whole model are cut to them."""
        own = set(names)
        cut = [tuple(s for s in group if s.name in own) for group in self.groups]
        # What a step that chooses changes may be norms alone.
        return replace(self, groups=tuple(group for group in cut if group or self.step.choose))


def select(source: Source, recipe: Recipe, tensors: Sequence[PlannedTensor]) -> list[Selected]:
    """The rewrites and repairs of a recipe in its order, resolved on a model whose tensors are planned."""
    schemes = {s.name: t.scheme for t in tensors for s in t.sites}
    found, folds = [], None
    for number, rule in enumerate(recipe.rules):
        step = get_step(rule.method)
        if step.kind == "round":
            continue
        picked = [t for t in tensors if number in t.picked and (step.kind == "rewrite" or t.status == "quantized")]
        sites = [s for t in picked for s in t.sites]
        groups: list[tuple[Site, ...]] = []
        refusals: dict[str, list[str]] = {}
        joints: list[Joint] = []
        if step.scope == "fold":
            folds = (
                find_folds(source, source.example if isinstance(source, InMemory) else None) if folds is None else folds
            )
            joints, refusals = joints_of(source, folds, sites, schemes)
            sites = list({s.name: s for j in joints for s in j.sites}.values())
        found_groups = _groups(step, sites, source.sites)
        if step.choose:
            chosen = step.choose(source, sites, **rule.options)
            found_groups, refusals = chosen.groups, {why: list(names) for why, names in chosen.refusals.items()}
        for group in found_groups:
            reason = next((why for s in group if (why := _refusal(step, s, schemes))), None)
            if reason is None:
                groups.append(group)
            else:
                refusals.setdefault(reason, []).extend(s.name for s in group)
        found.append(
            Selected(step, rule.options, tuple(groups), {k: tuple(v) for k, v in refusals.items()}, tuple(joints))
        )
    return found


def _groups(step: Step, sites: Sequence[Site], every: Sequence[Site]) -> tuple[tuple[Site, ...], ...]:
    """Sites that are done together; those that read the same are all of them, whether they were picked or not."""
    if step.scope == "reads":
        known = dict.fromkeys(s.reads for s in sites if s.reads is not None)
        together = [tuple(s for s in every if s.reads == reads) for reads in known]
        return (*together, *((s,) for s in sites if s.reads is None))
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = {"site": site.name, "unit": site.block, "fold": site.block, "model": None, "whole": None}[step.scope]
        groups.setdefault(key, []).append(site)
    return tuple(tuple(group) for group in groups.values())


def _refusal(step: Step, site: Site, schemes: Mapping[str, LayerScheme | None]) -> str | None:
    if step.scope == "reads" and site.reads is None:
        return "what else reads its input is not known"
    if site.name not in schemes:
        return f"{site.name} is a part of a stored tensor that stays as it is"
    return step.refuse(site, schemes[site.name])


def declared_by(source: Source, selected: Iterable[Selected], tensors: Sequence[PlannedTensor]) -> Declared:
    """What all steps change and add.

    Raises:
        SchemeError: a step changes a tensor that the model does not have or that is quantized, or adds one that is there.
    """
    status = {t.name: t.status for t in tensors}
    whole = Declared()
    for one in selected:
        if not one.groups:
            continue
        own = one.step.declare(source, one.targets(one.sites), **one.options)
        for name in own.changed:
            if status.get(name, "quantized") == "quantized":
                what = "is quantized" if name in status else "is not in the model"
                raise SchemeError(f"{one.step.name} would change {name}, which {what}. Leave the step out.")
        for name in [a.name for a in own.added]:
            if name in status or name in {a.name for a in whole.added}:
                raise SchemeError(f"{one.step.name} would add {name}, which is there already. Leave the step out.")
        kept = [s.tensor for s in one.sites if one.step.kind == "rewrite" and status[s.tensor] != "quantized"]
        changed = tuple(dict.fromkeys((*whole.changed, *own.changed, *kept)))
        notes = (*whole.notes, *own.notes)
        whole = Declared(changed, (*whole.added, *own.added), merged(whole.config, own.config), notes)
    return whole


def unreadable(source: Source, declared: Declared) -> list[str]:
    """Sentences that say why the model could not be loaded again with what the steps add."""
    if not isinstance(source, OnDisk) or not (declared.added or declared.config):
        return []
    config = merged(source.checkpoint.folder.model_config, declared.config)
    shapes = {**source.checkpoint.names, **{a.name: a.shape for a in declared.added}}
    names = Names(build_model(config, source.where), shapes, source.where)
    missing, unread = names.missing(), [a.name for a in declared.added if a.name in names.unused]
    edits = ", ".join(declared.config)
    return [
        *(f"With {edits} in config.json the model also has {name}, which no step adds. Select all layers of that kind." for name in missing[:1]),
        *(f"A step adds {name}, which the model does not read. Leave it out there." for name in unread[:1]),
    ]  # fmt: skip


def merged(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A config with edits: dictionaries are merged, everything else is replaced."""
    return {
        **config,
        **{
            k: merged(config[k], v) if isinstance(v, Mapping) and isinstance(config.get(k), Mapping) else v
            for k, v in edits.items()
        },
    }
