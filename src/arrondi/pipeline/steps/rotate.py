"""Rotations: hidden states and values of attention are written in a basis in which no channel stands out (QuaRot, arXiv:2404.00456).

Everything is folded into weights, so that the model keeps its architecture. What can be rotated is found by following the model
(`arrondi.model.turns`); the matrices are those of `arrondi.rewrite.rotation`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.errors import DataError
from arrondi.model import Site, Source
from arrondi.model.turns import Taken, Turn, find_turns
from arrondi.pipeline.step import Added, Choice, Declared, Step
from arrondi.pipeline.work import Work
from arrondi.rewrite.rotation import Rotation, factors_of, turn
from arrondi.rewrite.spread import best_block

_SMALLEST_GAIN = 1e-6
"""Of the largest of a norm: below it, a bias is not divided by it."""


@dataclass(frozen=True)
class _Able:
    """The turns of a model that its files can hold."""

    turns: tuple[Turn, ...]
    refusals: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, str]
    untied: Mapping[str, str]


def _able(source: Source, names: tuple[str, ...] = ()) -> _Able:
    found = find_turns(source)
    matrices = {s.param for s in source.sites}
    vectors = {t.params[0]: t.name for t in source.tensors if len(t.params) == 1 and not t.sites and not t.converted}
    turns, refusals = [], {}
    if found.why:
        refusals[f"the hidden states between blocks stay as they are ({found.why})"] = names
    known = {a for p in (*matrices, *vectors) if p in source.names.params for a in source.names.names_of(p)}
    for one in (*found.stream, *found.others):
        strange = [p for p in _params(one) if p not in known]
        if strange:
            refusals[f"{strange[0]} is stored in a way in which it cannot be rotated"] = names
        else:
            turns.append(one)
    stored = {n: source.names.names_of(n) for n in found.untied}
    untied = {n: next(a for a in aliases if a in source.names.group_of) for n, aliases in stored.items()}
    return _Able(tuple(turns), refusals, vectors, untied)


def _params(one: Turn) -> list[str]:
    """Every parameter that is another one after a turn."""
    found = [p.param for p in one.parts]
    for taken in one.taken:
        found += [taken.gain.weight, *filter(None, [taken.gain.bias]), *(p for p, _ in taken.readers)]
        found += filter(None, taken.biases if taken.gain.bias else ())
    return list(dict.fromkeys(found))


def choose(source: Source, sites: Sequence[Site], **options: Any) -> Choice:
    """Every weight that has to be turned, if one of the sites reads what can be."""
    able = _able(source, tuple(s.name for s in sites))
    picked = {a for s in sites for a in source.names.names_of(s.param)}
    changed = {
        a for one in able.turns if picked & set(_params(one)) for p in _params(one) for a in source.names.names_of(p)
    }
    group = tuple(s for s in source.sites if s.param in changed)
    return Choice((group,) if group else (), able.refusals)


def declare(source: Source, sites: Sequence[Site], **options: Any) -> Declared:
    """Norms and biases change; heads that are tied to the embedding are stored apart."""
    able = _able(source)
    changed = dict.fromkeys(able.vectors[p] for one in able.turns for p in _params(one) if p in able.vectors)
    by_param = {s.param: s for s in source.sites}
    added = []
    for name, stored in able.untied.items():
        site = next(by_param[a] for a in source.names.names_of(stored) if a in by_param)
        tensor = next(t for t in source.tensors if t.name == site.tensor)
        added.append(Added(name, name, source.dtype_of(tensor), tuple(source.names.params[stored].shape), tensor.name))
    sizes = {one.size: factors_of(one.size)[-1] for one in able.turns}
    notes = tuple(
        f"There is no Hadamard matrix of order {n}: a random orthogonal matrix takes its factor {rest}."
        for n, rest in sizes.items()
        if rest > 1
    )
    if options.get("online") and any(s.param_index is not None for s in source.sites):
        notes += ("Inputs of fused experts are rounded nowhere, so they are not spread.",)
    return Declared(tuple(changed), tuple(added), _apart(source.config) if added else {}, notes)


def _apart(config: Mapping[str, Any]) -> dict[str, Any]:
    """The edits by which no part of a config ties the head to the embedding."""
    own = {"tie_word_embeddings": False}
    parts = {k: _apart(v) for k, v in config.items() if isinstance(v, Mapping) and "tie_word_embeddings" in v}
    return {**own, **parts}


def spreads(source: Source, site: Site, *, seed: int = 0, online: bool = False) -> int:
    """The blocks of inputs that are not in a turned basis as a whole: those of down projections, and of attention across heads."""
    if not online or site.kind != "linear" or not site.rounds_inputs:
        return 0
    axis = 0 if site.param_flipped else 1
    aliases = source.names.names_of(site.param)
    whole = any((name, axis) in find_turns(source).whole for name in aliases)
    return 0 if whole else best_block(site.shape[1])


def apply(work: Work, sites: Sequence[Site], *, seed: int = 0, online: bool = False) -> None:
    """Fold norms into the weights that read them and turn every weight, norm and bias of the unit.

    Args:
        seed: of the random signs.
        online: spread the inputs that weights cannot be turned for while the model runs (`spreads` has put it into the schemes).
            Only arrondi runs such a model.
    """
    _Rotating(work, seed).run()


class _Rotating:
    """One unit under all turns."""

    def __init__(self, work: Work, seed: int) -> None:
        self.work, self.seed, self.source = work, seed, work.plan.source
        self.able = _able(self.source)
        names = self.source.names
        own = [p for t in work.tensors for p in t.tensor.params if p in names.params]
        self.added = {n: s for n, s in self.able.untied.items() if s in {a for p in own for a in names.names_of(p)}}
        self.divided: set[Taken] = set()
        apart = set(self.able.untied)
        self.own = {a for p in own for a in names.names_of(p)} - apart
        self.values: dict[str, torch.Tensor] = {n: self._parameter(s).clone() for n, s in self.added.items()}

    def run(self) -> None:
        gains = list(dict.fromkeys(t for one in self.able.turns for t in one.taken))
        for taken in gains:
            self._take_over(taken)
        for one in self.able.turns:
            rotation = Rotation(one.size, zlib.crc32(f"{self.seed} {one.name}".encode()), one.ones)
            for part in one.parts:
                if (weight := self._value(part.param)) is not None:
                    turn(weight, part.axis, part.channels, rotation)
            for taken in one.taken:
                self._turn_bias(taken, one, rotation)
        for taken in gains:
            self._settle(taken)
        for param, value in self.values.items():
            if param in self.added:
                self.work.add(param, value)
            else:
                self.work.change(self.able.vectors[param], value)

    def _take_over(self, taken: Taken) -> None:
        gain = None
        for (param, axis), bias in zip(taken.readers, taken.biases, strict=True):
            weight = self._value(param)
            if weight is None:
                continue
            gain = self._gain(taken) if gain is None else gain
            if taken.gain.bias and _into_biases(taken):
                moved = torch.tensordot(weight.double(), self._original(taken.gain.bias).double(), ([axis], [0]))
                value = self._value(str(bias))
                assert value is not None
                value.add_(moved)
            shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
            weight.mul_(gain.to(weight).reshape(shape))

    def _gain(self, taken: Taken) -> torch.Tensor:
        return self._original(taken.gain.weight).double() + taken.gain.offset

    def _turn_bias(self, taken: Taken, one: Turn, rotation: Rotation) -> None:
        """What a norm adds is written in the basis of what reads it."""
        beta = self._value(taken.gain.bias) if taken.gain.bias and not _into_biases(taken) else None
        if beta is None:
            return
        if taken not in self.divided:
            gain = self._gain(taken)
            if float(gain.abs().min()) < _SMALLEST_GAIN * float(gain.abs().max()):
                raise DataError(
                    f"{taken.gain.weight} has a zero, so {taken.gain.bias} cannot be rotated. Leave the step rotate out."
                )
            beta.div_(gain)
            self.divided.add(taken)
        for part in one.parts:
            if (part.param, part.axis) == taken.readers[0]:
                turn(beta, 0, part.channels, rotation)

    def _settle(self, taken: Taken) -> None:
        """The norm multiplies by nothing any more."""
        if (weight := self._value(taken.gain.weight)) is not None:
            weight.fill_(1 - taken.gain.offset)
        if taken.gain.bias and _into_biases(taken) and (bias := self._value(taken.gain.bias)) is not None:
            bias.zero_()

    def _value(self, param: str) -> torch.Tensor | None:
        """A parameter of this unit, to be changed in place; None if it is of another one."""
        if param in self.values:
            return self.values[param]
        if param not in self.own:
            return None
        if param in self.able.vectors:
            self.values[param] = self._parameter(param).double().clone()
            return self.values[param]
        return self._parameter(param)

    def _original(self, param: str) -> torch.Tensor:
        """A norm's numbers as they are before the step."""
        if param in self.own:
            return self._parameter(param)
        instance = self.source.instance()
        instance.fill([param])
        return instance.parameter(param)

    def _parameter(self, param: str) -> torch.Tensor:
        return self.work.instance.parameter(param)


def _into_biases(taken: Taken) -> bool:
    """Whether every weight that reads a norm has a bias that can take over that of the norm."""
    return all(taken.biases)


ROTATE = Step(
    "rotate",
    "rewrite",
    "Ashkboos et al. 2024, arXiv:2404.00456",
    apply=apply,
    scope="model",
    declare=declare,
    choose=choose,
    spreads=spreads,
    cost=20.0,
)
