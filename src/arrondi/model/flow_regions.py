"""Which numbers a tensor holds: names of parts of parameters, and identities of activations.

Owns: `Regions`, which names the part of a parameter that an operand is, by storage, offset, shape and strides; and `Reads`,
which gives equal numbers to activations with the same values. Storages are told by their objects, not by addresses: that
works on the meta device, and a freed address that is used again is another storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def storage_key(tensor: torch.Tensor) -> int | None:
    """A number for the storage, good while something refers to it; None for tensors without one (sparse ones)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Region:
    """A part of a parameter, seen as a view whose axes are those of an operand.

    Attributes:
        param: name of the parameter.
        shape: of the parameter.
        starts: first index on every axis of the parameter.
        counts: number of indices on every axis.
        steps: distance between indices on every axis.
        axes: for every axis of the view, the axis of the parameter along which it runs; None if its size is 1 or its
            stride 0.
    """

    param: str
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    steps: tuple[int, ...]
    axes: tuple[int | None, ...]

    def part(self, axis: int) -> slice | None:
        """The indices on one axis, None for all of them."""
        start, count, step = self.starts[axis], self.counts[axis], self.steps[axis]
        if count == self.shape[axis]:
            return None
        return slice(start, start + count) if step == 1 else slice(start, start + (count - 1) * step + 1, step)


@dataclass(frozen=True)
class _Held:
    """Where the numbers of a parameter lie: `axes` are those of the parameter that `sizes` and `strides` tell of.

    A copy of one matrix of a stack has two axes of three; `fixed` is the index on the others.
    """

    param: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    fixed: tuple[int, ...]

    def locate(self, view: torch.Tensor) -> Region | None:
        """The view as a part of this parameter, None if it is not inside it or runs across its axes."""
        rest = int(view.storage_offset()) - self.offset
        if rest < 0 or view.dtype != self.dtype:
            return None
        starts, counts, steps = list(self.fixed), [1] * len(self.shape), [1] * len(self.shape)
        order = sorted(
            (s for s in zip(self.strides, self.axes, self.sizes, strict=True) if s[2] > 1 and s[0]), reverse=True
        )
        for stride, axis, _ in order:
            starts[axis], rest = divmod(rest, stride)
        if rest:
            return None
        axes: list[int | None] = [None] * view.ndim
        moving = [(stride, size, i) for i, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True))]
        for stride, size, i in sorted(moving):
            if size == 1 or stride == 0:
                continue
            fits = [(s, a) for s, a, _ in order if s <= stride and stride % s == 0]
            if not fits:
                return None
            unit, axis = fits[0]
            step = stride // unit
            if counts[axis] == 1:
                steps[axis] = step
            elif step != counts[axis] * steps[axis]:
                return None  # two axes of the view that leave holes in one axis of the parameter
            counts[axis] *= size
            axes[i] = axis
        inside = all(starts[a] + (counts[a] - 1) * steps[a] < self.shape[a] for a in range(len(self.shape)))
        if not inside:
            return None
        return Region(self.param, self.shape, tuple(starts), tuple(counts), tuple(steps), tuple(axes))


class Regions:
    """Names of the parts of `params`; parameters that share storage are told apart by where they lie in it."""

    def __init__(self, params: Mapping[str, torch.Tensor]) -> None:
        self._held: dict[int, list[_Held]] = {}
        self._copies: list[StorageWeakRef] = []
        for name, param in params.items():
            key = storage_key(param)
            if key is None:
                continue
            axes = tuple(range(param.ndim))
            shape, strides = tuple(param.shape), tuple(param.stride())
            held = _Held(name, shape, param.dtype, int(param.storage_offset()), axes, shape, strides, (0,) * param.ndim)
            self._held.setdefault(key, []).append(held)
        for among in self._held.values():
            among.sort(key=lambda held: math.prod(held.shape))  # the smallest that contains an operand is meant

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor) in self._held

    def find(self, tensor: torch.Tensor) -> Region | None:
        """The part that `tensor` is, None if it lies in no parameter."""
        for held in self._held.get(storage_key(tensor) or 0, ()):
            if (region := held.locate(tensor)) is not None:
                return region
        return None

    def names(self, tensor: torch.Tensor) -> list[str]:
        """The parameters whose numbers `tensor` holds, also those that it holds a part of or more than."""
        if (region := self.find(tensor)) is not None:
            return [region.param]
        first, last = _span(int(tensor.storage_offset()), tensor.shape, tensor.stride())
        spans = ((h.param, *_span(h.offset, h.sizes, h.strides)) for h in self._held.get(storage_key(tensor) or 0, ()))
        return [param for param, low, high in spans if low <= last and first <= high]

    def copied(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        """`copy` holds the numbers of `source`, cast or moved: products with it are products with the parameter."""
        region, key = self.find(source), storage_key(copy)
        if region is None or key is None or source.shape != copy.shape:
            return
        axes = tuple(a for a in region.axes if a is not None)
        whole = all(region.counts[a] == region.shape[a] for a in axes)
        if not whole or len(set(axes)) < len(axes):
            return
        sizes = tuple(n for n, a in zip(copy.shape, region.axes, strict=True) if a is not None)
        strides = tuple(s for s, a in zip(copy.stride(), region.axes, strict=True) if a is not None)
        held = _Held(
            region.param, region.shape, copy.dtype, int(copy.storage_offset()), axes, sizes, strides, region.starts
        )
        self._copies.append(StorageWeakRef(copy.untyped_storage()))  # keeps the key from being given to another
        self._held[key] = [held]


def _span(offset: int, sizes: Iterable[int], strides: Iterable[int]) -> tuple[int, int]:
    return offset, offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


class Reads:
    """Numbers of activations: equal for the same storage, version and region, summed over the same axes."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        self._changes: dict[int, int] = {}
        self._next = 0

    def number(self, x: torch.Tensor, summed: tuple[int, ...], more: object = None) -> int:
        """The number of `x`, of which the axes `summed` are summed over; `more` is what else must be equal."""
        key = storage_key(x)
        if key is None:
            self._next += 1
            return self._next
        if key not in self._alive:
            self._forget()
            self._alive[key] = StorageWeakRef(x.untyped_storage())
        version = 0 if x.is_inference() else x._version
        rows = _merged([(x.stride(i), x.shape[i]) for i in range(x.ndim) if i not in summed])
        inner = tuple((x.stride(i), x.shape[i]) for i in summed)
        where = (key, x.storage_offset(), x.dtype, rows, inner, more, version, self._changes.get(key, 0))
        if where not in self._numbers:
            self._next += 1
            self._numbers[where] = self._next
        return self._numbers[where]

    def changed(self, x: torch.Tensor) -> None:
        """`x` is changed in place. (Versions miss what is done under inference mode or through `.data`.)"""
        key = storage_key(x)
        if key in self._alive:
            self._changes[key] = self._changes.get(key, 0) + 1

    def _forget(self) -> None:
        """Drop what is known of storages that are gone, now and then: nothing can read them again."""
        if len(self._alive) < 1024 or len(self._alive) & (len(self._alive) - 1):
            return
        gone = {key for key, ref in self._alive.items() if ref.expired()}
        for key in gone:
            del self._alive[key]
            self._changes.pop(key, None)
        self._numbers = {where: n for where, n in self._numbers.items() if where[0] not in gone}


def _merged(axes: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Axes (stride, size) from the outermost in, joined where one runs on into the next: the same for all views."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted((a for a in axes if a[1] != 1), reverse=True):
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return tuple(merged)
