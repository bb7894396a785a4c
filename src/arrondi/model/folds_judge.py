"""From what a run has shown to folds: `judge`.

A scale can be folded if everything that reads the activation is a site, every reading of these sites is of this activation in the same
order of channels, and nothing else reads the parameters that are changed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, cast

import torch

from arrondi.model.fold import Fold, Producer
from arrondi.model.folds_follow import Followed, Read
from arrondi.model.folds_shadow import FIRST, OTHER, ZERO, Origin
from arrondi.model.names import Names
from arrondi.model.site import Site

_NOTES: Final = {
    "": "it comes from outside of what was run",
    "add": "it is a sum, as residual streams are",
    "add_": "it is a sum, as residual streams are",
    "embedding": "it is looked up",
    "mul": "it is a product of activations",
    "mm": "its channels are mixed by a product of two activations",
    "bmm": "its channels are mixed by a product of two activations",
}


class Modelled(Protocol):
    """A source, as far as folds need it."""

    @property
    def model(self) -> Any: ...
    @property
    def names(self) -> Names: ...
    @property
    def sites(self) -> list[Site]: ...
    def block_of(self, param: str) -> int | None: ...


_NUMBER: Final = re.compile(r"\d+")


@dataclass(frozen=True)
class _Reading:
    """One reading of a site, its columns in the order of the site."""

    read: Read
    site: Site

    def columns(self, origin: Origin) -> torch.Tensor | None:
        seen = self.read.columns.get(origin)
        return None if seen is None else seen[self.site.rows if self.site.param_flipped else self.site.columns]


def judge(source: Modelled, followed: Followed) -> tuple[list[Fold], bool]:
    """Every activation that sites read, in the order of the sites; and whether some of several experts were not reached."""
    judge = _Judge(source, followed)
    return judge.folds(), judge.misses_experts()


class _Judge:
    def __init__(self, source: Modelled, followed: Followed) -> None:
        self.source, self.followed = source, followed
        self.first = {n: names[0] for names in source.names.aliases.values() for n in names}
        self.bare = {self.first.get(n, n): how for n, how in followed.bare.items()}
        self.lost = {self.first.get(n, n) for n in followed.lost}
        self.multiplied = {r.use.param for r in followed.reads}
        self.norms: dict[str, list[Origin]] = defaultdict(list)
        for origin in followed.origins.values():
            if origin.kind == "norm":
                self.norms[origin.param].append(origin)
        self.sites = list(source.sites)
        self.readings: dict[str, list[_Reading]] = {s.name: [] for s in self.sites}
        by_matrix: dict[tuple[str, int | None], list[Site]] = defaultdict(list)
        for site in self.sites:
            by_matrix[self.first[site.param], site.param_index].append(site)
        self.homeless: dict[Origin, str] = {}
        for read in self._all_reads(by_matrix):
            sites = [s for s in by_matrix.get((self.first[read.use.param], read.use.matrix), ()) if _overlap(s, read)]
            for site in sites:
                self.readings[site.name].append(_Reading(read, site))
            if not sites or not self._covered(read, sites):
                self.homeless |= dict.fromkeys(read.columns, read.use.param)
        self.unread = [
            s for s in self.sites
            if not self.readings[s.name] and not {self.first[s.param], s.param} & (self.bare.keys() | self.multiplied)
        ]  # fmt: skip

    def _covered(self, read: Read, sites: list[Site]) -> bool:
        """Whether all rows of a matrix belong to sites."""
        param = self.source.names.params[sites[0].param]
        outputs = [s.columns if s.param_flipped else s.rows for s in sites]
        whole = (
            param.shape[-1 if sites[0].param_flipped else -2] if param.ndim == 2 or read.use.matrix is not None else 0
        )
        part = _outputs_of(read)
        wanted = whole if part is None else part.stop - part.start
        return sum(s.stop - s.start for s in outputs) >= wanted

    def folds(self) -> list[Fold]:
        """The folds that can be made, those with fewer consumers first where a site could be in several; then the rest."""
        readers: dict[Origin, list[Site]] = defaultdict(list)
        for site in self.sites:
            for origin in dict.fromkeys(o for r in self.readings[site.name] for o in r.read.columns):
                readers[origin].append(site)
        found = [self._fold(o, group) for o, sites in readers.items() for group in self._groups(o, sites)]
        found.sort(
            key=lambda fold: (fold.reason is not None, len(fold.sites) if fold.reason is None else -len(fold.sites))
        )
        taken: dict[str, Fold] = {}
        for fold in found:
            left = tuple(s for s in fold.sites if s.name not in taken)
            if left and (fold.reason is not None or left == fold.sites):
                kept = replace(fold, sites=left, consumers=tuple(s.name for s in left))
                taken |= {s.name: kept for s in left}
        for fold in self._made_by_nothing([s for s in self.sites if s.name not in taken and self.readings[s.name]]):
            taken |= dict.fromkeys(fold.consumers, fold)
        ordered = (taken[s.name] for s in self.sites if s.name in taken)
        return list({id(fold): fold for fold in ordered}.values())

    def misses_experts(self) -> bool:
        """Whether a site was not reached though one like it, with another number in its name, was."""
        read = {_NUMBER.sub("#", s.param) for s in self.sites if self.readings[s.name]}
        return any(_NUMBER.sub("#", s.param) in read for s in self.unread)

    # ── experts that no token has reached ─────────────────────────────────────────────────────────────────────────────

    def _all_reads(self, by_matrix: dict[tuple[str, int | None], list[Site]]) -> Iterator[Read]:
        """What was read; matrices of a stack that no token has reached read as the others do."""
        reads = self.followed.reads
        yield from reads
        stacks: dict[str, dict[int, list[Read]]] = defaultdict(lambda: defaultdict(list))
        for read in reads:
            if read.use.matrix is not None:
                stacks[self.first[read.use.param]][read.use.matrix].append(read)
        made: dict[tuple[int, int], Origin] = {}
        for param, other in by_matrix:
            if other is not None and param in stacks and other not in stacks[param]:
                index, first = next(iter(stacks[param].items()))
                yield from (self._as(r, index, other, made) for r in first)

    def _as(self, read: Read, index: int, other: int, made: dict[tuple[int, int], Origin]) -> Read:
        columns = {}
        for origin, seen in read.columns.items():
            if origin.index == index:
                known = self.followed.origins.get((origin.kind, origin.param, other, origin.offset, origin.axis))
                origin = known or made.setdefault((id(origin), other), replace(origin, index=other))
            columns[origin] = seen
        return Read(replace(read.use, matrix=other, reads=-1 - other), columns, read.note)

    # ── one activation ────────────────────────────────────────────────────────────────────────────────────────────────

    def _fold(self, origin: Origin, sites: list[Site]) -> Fold:
        names = tuple(s.name for s in sites)
        columns, reason = self._columns(origin, sites)
        if reason is None:
            reason = origin.why(columns) or self._elsewhere(origin) or self._apart(origin, sites)
        if reason is None:
            reason = self._unseen(origin, sites)
        producer, channels = _producer(origin, columns)
        return Fold(names, producer, channels if reason is None else (), reason, tuple(sites))

    def _groups(self, origin: Origin, sites: list[Site]) -> list[list[Site]]:
        """Sites that read some of the same channels, apart from those that read others of the same origin."""
        groups: list[tuple[set[int], list[Site]]] = []
        for site in sites:
            seen = [c for r in self.readings[site.name] if (c := r.columns(origin)) is not None]
            channels, members = set(torch.cat(seen).tolist()) - {OTHER, ZERO}, [site]
            for known in [g for g in groups if g[0] & channels]:
                groups.remove(known)
                channels, members = known[0] | channels, [*known[1], *members]
            groups.append((channels, members))
        return [members for _, members in groups]

    def _columns(self, origin: Origin, sites: list[Site]) -> tuple[torch.Tensor, str | None]:
        """The channel of every column, the same for all sites; or why there is none."""
        common = torch.zeros(0, dtype=torch.int32)
        for site in sites:
            for reading in self.readings[site.name]:
                seen = reading.columns(origin)
                if seen is None:
                    return common, f"{site.name} reads something else as well"
                if (how := self.bare.get(self.first[site.param])) is not None:
                    return common, f"{site.name} is read otherwise than in products: {how}"
                if reading.read.use.reduces_last is site.param_flipped or len(seen) != site.shape[-1]:
                    return common, f"how {site.name} lies in its parameter is not known"
                if _inputs(reading) is not None:
                    return common, f"a part of {site.name} reads it"
                if bool((seen < FIRST).any()):
                    return common, f"it is only a part of what {site.name} reads"
                if len(common) and not torch.equal(common, seen):
                    return common, f"{sites[0].name} and {site.name} read its channels in different orders"
                common = seen
        return common - FIRST, None

    def _elsewhere(self, origin: Origin) -> str | None:
        """Whether the parameters that would be changed are read for another purpose."""
        if origin.kind == "linear" and (how := self.bare.get(self.first[origin.param])) is not None:
            return f"{origin.param} is read otherwise than in products: {how}"
        if self.first[origin.param] in self.lost:
            return f"not all that {origin.param} gives is followed"
        if origin.kind == "norm" and origin.param in self.multiplied:
            return f"{origin.param} is also multiplied as a matrix"
        if origin.kind == "norm" and any(o.offset or o.reads for o in self.norms[origin.param] if o is not origin):
            return f"{origin.param} is read in two ways"
        if origin in self.homeless:
            return f"{self.homeless[origin]} reads it, which is no layer with one weight"
        if len(origin.biases) > 1:
            return "several biases are added to it"
        for bias, count in origin.biases.items():
            if bias.reads != count:
                return f"{bias.param}, which is added to it, is read elsewhere too"
        return None

    def _apart(self, origin: Origin, sites: list[Site]) -> str | None:
        """Whether changing it would change several units."""
        params = [origin.param, *(b.param for b in origin.biases), *(s.param for s in sites)]
        units: dict[int | None, str] = {}
        for param in params:
            for name in self.source.names.names_of(param):
                units.setdefault(self.source.block_of(name), name)
        if len(units) > 1:
            one, two = list(units.values())[:2]
            return f"{one} and {two} lie in different units"
        return None

    def _unseen(self, origin: Origin, sites: list[Site]) -> str | None:
        """A site of the same block that was not reached may read it too."""
        for site in self.unread:
            near = _block(site) is not None and _block(site) == _block(sites[0])
            if near and site.shape[-1] == sites[0].shape[-1]:
                return f"{site.name} was not reached, and may read it too"
        return None

    def _made_by_nothing(self, sites: list[Site]) -> Iterator[Fold]:
        groups: dict[tuple[int, ...], list[Site]] = defaultdict(list)
        for site in sites:
            groups[tuple(r.read.use.reads for r in self.readings[site.name])].append(site)
        for group in groups.values():
            reading = self.readings[group[0].name][0]
            note = reading.read.note
            reason = _NOTES.get(note, f"it is what {note.strip('_')} gives, which is not scaled along")
            if reading.read.use.kind == "convolution":
                reason = "a convolution reads it"
            yield Fold(tuple(s.name for s in group), None, (), reason, tuple(group))


def _block(site: Site) -> str | None:
    """The path up to the first number, which tells one block of several from another."""
    found = re.match(r"(.*?\.)?\d+\.", site.param)
    return None if found is None else found.group()


def _outputs_of(reading: Read) -> slice | None:
    return reading.use.rows if reading.use.reduces_last else reading.use.columns


def _inputs(reading: _Reading) -> slice | None:
    use = reading.read.use
    return use.columns if use.reduces_last else use.rows


def _overlap(site: Site, read: Read) -> bool:
    """Whether a product with a part of a parameter is one with a part of a site."""
    part, own = _outputs_of(read), site.columns if site.param_flipped else site.rows
    return part is None or read.use.kind == "convolution" or (part.start < own.stop and own.start < part.stop)


def _producer(origin: Origin, columns: torch.Tensor) -> tuple[Producer, tuple[int, ...]]:
    kind = cast(Literal["norm", "linear"], origin.kind)
    bias = next((b.param for b in origin.biases), None)
    used = torch.unique(columns)
    rows, count = None, origin.count
    if kind == "linear" and 0 < len(used) < count and int(used[-1] - used[0]) + 1 == len(used):
        rows, count = slice(int(used[0]), int(used[-1]) + 1), len(used)
        columns = columns - used[0]
    producer = Producer(kind, origin.param, count, origin.offset, bias, rows, origin.index, origin.axis)
    return producer, tuple(columns.tolist())
