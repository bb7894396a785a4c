"""Which parameters choose experts.

Owns: `Experts`, the places in a model where one of several matrices is chosen; and `Routers`, which follows the output of
every linear through element-wise functions to a top-k, and what the top-k chose to the experts.

A linear is a router if what is chosen among its outputs decides which rows meet which matrix of experts. Where the run
stops early (shapes alone have no experts that are hit), a top-k over as many outputs as there are experts is enough.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from arrondi.model.flow_ops import pick
from arrondi.model.flow_regions import storage_key
from arrondi.model.flow_uses import Use

_T = torch.Tensor
_NEEDS_DIM = {torch.argmax, _T.argmax, torch.max, _T.max}
_DRAW = {torch.multinomial, _T.multinomial}
_TOPK = {torch.topk, _T.topk}
_NUMBER = re.compile(r"(.*_)?\d+")
_GATHER = {torch.gather, _T.gather}
_SELECT = _NEEDS_DIM | _DRAW | _TOPK | _GATHER | {torch.sort, _T.sort, torch.argsort, _T.argsort}
_TO_PYTHON = {_T.item, _T.tolist, _T.numpy, _T.__int__, _T.__index__, _T.__array__}
_STOP = {functional.scaled_dot_product_attention, torch.cdist}


class Experts:
    """Stacks of matrices and numbered modules among parameters.

    Attributes:
        counts: path of a module that holds experts → how many.
    """

    def __init__(self, params: Mapping[str, torch.Tensor]) -> None:
        numbered: dict[str, set[str]] = defaultdict(set)
        self.counts: dict[str, int] = {}
        for name, param in params.items():
            for path, number in _numbered(name):
                numbered[path].add(number)
            if param.ndim == 3 and param.shape[1] > 1:  # not the filters of a depthwise convolution
                self.counts[_parent(name)] = param.shape[0]
        self._lists = {path: len(numbers) for path, numbers in numbered.items() if len(numbers) > 1}
        self.counts.update(self._lists)

    def homes(self, use: Use) -> list[str]:
        """The places of experts that the matrix of a use belongs to, if it is one of several."""
        if use.matrix is not None:
            return [_parent(use.param)]
        return [path for path, _ in _numbered(use.param) if path in self._lists]

    def serve(self, home: str, router: str, outputs: int) -> bool:
        """Whether a linear with so many outputs can choose among the experts at `home`.

        It may have more outputs than there are matrices (experts that do nothing), and is no part of another layer.
        """
        ours, theirs = router.split("."), home.split(".")
        n = _common(ours, theirs)
        if n < min(len(ours), len(theirs)) and _NUMBER.fullmatch(ours[n]) and _NUMBER.fullmatch(theirs[n]):
            return False
        if home in self._lists:
            around = home == "" or router.startswith(home + ".")
            return not around and self.counts[home] == outputs
        return self.counts[home] <= outputs

    def beside(self, router: str, outputs: int) -> set[str]:
        """The nearest places with as many experts as the router has outputs; in its own module, also with fewer."""
        near: dict[str, int] = {}
        for home, count in self.counts.items():
            within = _parent(home) != "" and router.startswith(_parent(home) + ".")
            if (count == outputs or within) and self.serve(home, router, outputs):
                near[home] = _common(home.split("."), router.split("."))
        return {home for home, n in near.items() if n == max(near.values())}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _numbered(name: str) -> list[tuple[str, str]]:
    """("mlp.experts", "3") for "mlp.experts.3.up.weight": the modules on the way whose names end in a number."""
    parts = name.split(".")
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts[:-1]) if _NUMBER.fullmatch(part)]


def _common(a: list[str], b: list[str]) -> int:
    """Number of leading path parts that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class _Marks:
    """What is known of the values in a storage: of which parameters they are outputs, and which chose them."""

    outputs: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()
    many: frozenset[str] = frozenset()  # those of `chosen` that chose several at once, as experts are and words are not

    def __or__(self, other: _Marks) -> _Marks:
        return _Marks(self.outputs | other.outputs, self.chosen | other.chosen, self.many | other.many)


@dataclass
class Routers:
    """The state of following outputs during one run."""

    experts: Experts
    _marks: dict[int, tuple[StorageWeakRef, _Marks]] = field(default_factory=dict)
    _widths: dict[str, int] = field(default_factory=dict)
    _met: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _ranked: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _few: set[str] = field(default_factory=set)
    _escaped: set[str] = field(default_factory=set)
    _filters: set[str] = field(default_factory=set)  # stacks that turned out to be filters of convolutions

    def found(self, complete: bool) -> frozenset[str]:
        """The routers: those whose choice met experts, and those that rank as many outputs as there are experts beside them.

        The second are asked only of experts that no other router was seen to choose, and, if the run was complete, only
        where the best few are taken (or those that a table names) or the choice went on as numbers of Python.
        """
        apart = self._filters.union(*self._met.values())
        ranked = self._ranked if not complete else self._ranked.keys() & (self._few | self._escaped)
        return frozenset(self._met) | {router for router in ranked if self._ranked[router] - apart}

    def used(self, use: Use, param: torch.Tensor) -> None:
        """A product is about to be computed: does it multiply rows that were chosen?"""
        if use.source is None:
            return
        marks = self._of(use.source)
        if use.kind == "convolution":
            self._filters.add(_parent(use.param))
        if use.kind == "embedding":  # experts may be rows of an embedding beside their router
            home = _parent(_parent(use.param))
            for router in marks.many:
                if home and router != use.param and _parent(_parent(router)) == home:
                    self._met[router].add(use.param)
            return
        for router in marks.chosen:
            homes = [h for h in self.experts.homes(use) if self.experts.serve(h, router, self._widths[router])]
            if homes:
                self._met[router].update(homes)
        if param.ndim == 2:
            self._widths[use.param] = param.shape[0 if use.reduces_last else 1]

    def called(
        self, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor], multiplied: set[str], product: bool
    ) -> None:
        """A function was called: mark its results. `multiplied` are the parameters of a product."""
        if product or func in _STOP:
            marks = _Marks(outputs=frozenset(p for p in multiplied if p in self._widths))
        else:
            marks = _Marks()
            for tensor in tensors_of((args, kwargs)):
                marks |= self._of(tensor)
            if func in _SELECT and marks.outputs:
                marks |= self._selected(func, args, kwargs, marks.outputs)
            if func in _TO_PYTHON:
                self._escaped |= marks.chosen
        if marks == _Marks():
            return
        for tensor in results:
            key = storage_key(tensor)
            if key is not None:
                known = self._of(tensor)
                self._marks[key] = (StorageWeakRef(tensor.untyped_storage()), known | marks)

    def _of(self, tensor: torch.Tensor) -> _Marks:
        key = storage_key(tensor)
        if key is None or key not in self._marks:
            return _Marks()
        return self._marks[key][1]

    def _selected(self, func: Any, args: Any, kwargs: Any, outputs: frozenset[str]) -> _Marks:
        several = func in _TOPK or func in _GATHER
        scores, *rest = pick(args, kwargs, ("input", "self"), *(("k", "dim") if func in _TOPK else (("dim", "axis"),)))
        dim = rest[-1]
        if func in _NEEDS_DIM and (dim is None or isinstance(dim, torch.Tensor)):
            return _Marks()  # of the whole tensor, or the larger of two
        size = scores.shape[dim if isinstance(dim, int) and func not in _DRAW else -1] if scores.ndim else 0
        for router in outputs:
            if self._widths[router] == size and (homes := self.experts.beside(router, size)):
                self._ranked[router].update(homes)
                if several:
                    self._few.add(router)
        # Some of the outputs may be ranked (groups, halves, without the shared experts), or the rows for every output.
        chosen = frozenset(p for p in outputs if 1 < size <= self._widths[p] or self._widths[p] in scores.shape)
        return _Marks(chosen=chosen, many=chosen if several else frozenset())


def tensors_of(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors among arguments, also those in lists and dictionaries."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)
        elif isinstance(value, dict):
            yield from tensors_of(value.values())
