"""What a plan says: the sentences about what cannot work, with what to do, and about what the user should know.

Every function takes what the plan has resolved and gives sentences; none decides anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from arrondi.checkpoint import Layout
from arrondi.model import Source
from arrondi.pipeline.listing import NAMED, listed
from arrondi.pipeline.plan_facts import is_joined
from arrondi.pipeline.recipe import Recipe, matches
from arrondi.pipeline.resolve import LOOKED_UP, UNREACHED, PlannedTensor
from arrondi.pipeline.steps import get_step


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


def nothing(
    source: Source, tensors: list[PlannedTensor], refused: list[PlannedTensor], layout: str | None, keep_misfits: bool
) -> str:
    """Why nothing is quantized, and what to do."""
    if refused:
        other = " Use --to arrondi, which holds every scheme." if layout not in (None, "arrondi") else ""
        if keep_misfits and layout is None:
            other = " Leave out --keep-misfits to quantize such weights all the same."
        elif keep_misfits:  # as networks are planned, whose files hold no other groups
            other = " Use groups that divide it, or one scale a channel (w=int8/channel)."
        return f"{refused[0].name}: {refused[0].reason}.{other}"
    if not any(s.kind == "linear" for s in source.sites):
        return "The model has no linear layer; name what else to quantize with --targets."
    unfit = next((t for t in tensors if t.status == "kept because impossible"), None)
    if unfit is not None:
        return f"{unfit.name}: {unfit.reason}."
    small = next((t for t in tensors if t.picked), None)
    return f"{f'{small.name} is kept: {small.reason}. ' if small else ''}Check --targets and --ignore."


def joined_unlike(source: Source, tensors: Sequence[PlannedTensor]) -> list[str]:
    """A sentence for every matrix of the model whose stored parts would be quantized by more than one scheme: a config names it once."""
    parts: dict[str, list[PlannedTensor]] = {}
    for t in tensors:
        for site in t.sites:
            if is_joined(source, t, site):
                parts.setdefault(site.modules[0], []).append(t)
    return [
        f"{listed([t.name for t in some])} are one weight of the model ({module}) and would not be quantized alike. Select them by one rule."
        for module, some in parts.items()
        if len({t.scheme for t in some}) > 1
    ]


def kept(refused: Sequence[PlannedTensor]) -> list[str]:
    """What is said of tensors that a rule picked and that stay as they are."""
    return [f"{t.name} is kept: {t.reason}." for t in refused[:NAMED]]


def why_not(layout: Layout, tensors: list[PlannedTensor]) -> str:
    """Why the most widely read layout was not taken."""
    lost: dict[str, list[str]] = {}
    for t in tensors:
        if t.status == "kept because impossible" and t.rule:
            lost.setdefault(t.reason, []).append(t.name)
    why = "; ".join(f"{reason} ({listed(names)})" for reason, names in list(lost.items())[:NAMED])
    return f"Not stored as {layout.name}, which more programs read: {why}."


def unreached(tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is said of parts that text does not reach."""
    kept = [t for t in tensors if t.status != "quantized" and t.reason.startswith(UNREACHED)]
    if not kept:
        return []
    share = sum(t.weights for t in kept) / max(sum(t.weights for t in tensors), 1)
    return [
        f"{len(kept)} weights that text does not reach ({100 * share:.0f} % of all) are kept as they are: {listed([t.name for t in kept])}."
    ]


def by_images(tensors: Sequence[PlannedTensor]) -> list[str]:
    """What is said of parts that images reach and text does not."""
    taken = [t for t in tensors if t.status == "quantized" and not all(s.reached for s in t.sites)]
    if not taken:
        return []
    share = sum(t.weights for t in taken) / max(sum(t.weights for t in tensors), 1)
    return [
        f"{len(taken)} weights that text does not reach ({100 * share:.0f} % of all) are quantized, too, because the images reach them: {listed([t.name for t in taken])}."
    ]


def tied_heads(source: Source, tensors: Sequence[PlannedTensor], apart: Collection[str]) -> list[str]:
    """What is said of heads that have the codes of an embedding; those that a step stores apart have not."""
    tables = [s for t in tensors if t.status == "quantized" for s in t.sites if s.kind == "embedding"]
    heads = {s.name: [a for a in source.names.names_of(s.param) if a != s.param and a not in apart] for s in tables}
    return [
        f"{name} is quantized once and serves {listed(others)} too, which is tied to it."
        for name, others in heads.items()
        if others
    ]


def of_tables(quantized: Sequence[PlannedTensor], told: Collection[str]) -> list[str]:
    """How tables are rounded by methods that look at inputs; `told` are those that a tied head tells."""
    found: dict[str, list[str]] = {}
    for t in quantized:
        if t.rule is None or t.sites[0].kind != "embedding" or not get_step(t.rule.method).needs:
            continue
        blind = t.rule.fallback or get_step(t.rule.method).fallback
        how = f"Rounded by {blind} instead of {t.rule.method}, for {LOOKED_UP}"
        if t.sites[0].name in told:
            how = f"Rounded by {t.rule.method} on what the tied head is given in the original, damped so that rows count as much that are looked up"
        found.setdefault(how, []).append(t.name)
    return [f"{how}: {listed(names)}." for how, names in found.items()]
