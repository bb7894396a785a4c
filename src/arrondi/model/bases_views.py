"""Rules of operators that show the same numbers in another shape, or some of them, and of tensors that are made anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from arrondi.model.bases import Axis, Basis, Value, cut, regroup
from arrondi.model.bases_follow import Follower


def same(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value | None:
    """Also in another type, but not cut to whole numbers."""
    return follow.value(x) if result.is_floating_point() is x.is_floating_point() else None


def negative(follow: Follower, name: str, result: Any, x: torch.Tensor) -> Value:
    return Value(follow.value(x).axes)


def view(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value | None:
    value = follow.value(x)
    if value.square or result.numel() != x.numel() or result.dtype is not x.dtype:
        return None
    return Value(tuple(regroup(value.axes, result.shape, name)), value.param, value.offset)


def _permuted(value: Value, order: Sequence[int]) -> Value:
    return Value(tuple(value.axes[i] for i in order), value.param, value.offset, value.square)


def permute(follow: Follower, name: str, result: Any, x: torch.Tensor, dims: Sequence[int]) -> Value:
    return _permuted(follow.value(x), [d % x.ndim for d in dims])


def transpose(follow: Follower, name: str, result: Any, x: torch.Tensor, one: int = 0, two: int = 1) -> Value:
    order = list(range(x.ndim))
    if order:
        order[one], order[two] = order[two], order[one]
    return _permuted(follow.value(x), order)


def flip_axes(follow: Follower, name: str, result: Any, x: torch.Tensor) -> Value:
    return _permuted(follow.value(x), list(range(x.ndim))[::-1])


def expand(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value:
    value = follow.value(x)
    axes = [Axis.new(n, name) for n in result.shape]
    for i in range(1, x.ndim + 1):
        if x.shape[-i] == result.shape[-i]:
            axes[-i] = value.axes[-i]
    return Value(tuple(axes), value.param if x.shape == result.shape else None)


def repeat(follow: Follower, name: str, result: Any, x: torch.Tensor, times: Sequence[int]) -> Value:
    value, lead = follow.value(x), len(times) - x.ndim
    axes = [Axis.new(n, name) for n in times[:lead]]
    for axis, n in zip(value.axes, times[lead:], strict=True):
        if n > 1 and axis.gain:
            axis.fix(name)
        axes.append(Axis((Basis(n, name), *axis.bases)) if n > 1 else axis)
    return Value(tuple(axes))


def _part(axis: Axis, start: int, stop: int, name: str) -> Axis:
    """Some neighbouring channels of an axis."""
    if (start, stop) == (0, axis.size):
        return axis
    if axis.gain or stop - start == 1:
        axis.fix(name)
    if stop - start == 1:
        return Axis()
    factors = [f.root for f in axis.factors]
    inner = math.prod(f.size for f in factors[1:])
    if start % inner or stop % inner:
        axis.fix(name)
        return Axis.new(stop - start, name)
    first, (a, b) = factors[0], (start // inner, stop // inner)
    cut(first, a)
    cut(first.root, b)
    total, mine = 0, []
    for part in first.root.parts:
        if a <= total and total + part.size <= b:
            mine.append(part)
        total += part.size
    if len(mine) == 1:
        return Axis((mine[0], *factors[1:]))
    whole = Basis(b - a)
    whole.parts, whole.pieces = tuple(mine), True
    return Axis((whole, *factors[1:]))


def _with_axis(value: Value, dim: int, axis: Axis) -> Value:
    axes = list(value.axes)
    axes[dim] = axis
    return Value(tuple(axes), value.param, value.offset, value.square)


def cut_out(
    follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Value | None:  # fmt: skip
    value = follow.value(x)
    if result.shape[dim] == x.shape[dim]:
        return value
    if step != 1:
        return _with_axis(value, dim, lost(value.axes[dim], result.shape[dim], name))
    first = min(max((start or 0) % x.shape[dim] if (start or 0) < 0 else (start or 0), 0), x.shape[dim])
    return _with_axis(value, dim, _part(value.axes[dim], first, first + result.shape[dim], name))


def lost(axis: Axis, size: int, name: str) -> Axis:
    axis.fix(name)
    return Axis.new(size, name)


def split(
    follow: Follower, name: str, results: Sequence[torch.Tensor], x: torch.Tensor, sizes: Any, dim: int = 0
) -> tuple[Value, ...]:
    value, start, found = follow.value(x), 0, []
    for result in results:
        n = result.shape[dim]
        found.append(_with_axis(value, dim, _part(value.axes[dim], start, start + n, name)))
        start += n
    return tuple(found)


def _without(value: Value, dim: int, name: str) -> Value:
    """One index of an axis."""
    dim %= len(value.axes)
    value.axes[dim].fix(name)
    axes = (*value.axes[:dim], *value.axes[dim + 1 :])
    return Value(axes, value.param, value.offset, value.square)


def select(follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int, index: int) -> Value:
    return _without(follow.value(x), dim, name)


def unbind(
    follow: Follower, name: str, results: Sequence[torch.Tensor], x: torch.Tensor, dim: int = 0
) -> tuple[Value, ...]:
    return tuple(_without(follow.value(x), dim, name) for _ in results)


def cat(follow: Follower, name: str, result: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> Value | None:
    values = [follow.value(t) for t in tensors if t.numel()]
    if any(v.square or len(v.axes) != result.ndim for v in values):
        return None
    axes = list(values[0].axes)
    for other in values[1:]:
        axes = [
            a if i == dim % len(axes) else a.be(b, name) for i, (a, b) in enumerate(zip(axes, other.axes, strict=True))
        ]
    pieces: list[Basis] = []
    for axis in (v.axes[dim] for v in values):
        if axis.gain or len(axis.factors) != 1:
            axis.fix(name)
        pieces += [axis.factors[0]] if len(axis.factors) == 1 else [Basis(axis.size, name)]
    joined = Basis(result.shape[dim])
    if len(pieces) > 1 and sum(p.size for p in pieces) == joined.size:
        joined.parts, joined.pieces = tuple(pieces), True
        axes[dim] = Axis((joined,))
    elif len(pieces) > 1:
        axes[dim] = lost(Axis(tuple(pieces)), result.shape[dim], name)
    return Value(tuple(axes))


def index(
    follow: Follower, name: str, result: Any, x: torch.Tensor, indices: Sequence[torch.Tensor | None]
) -> Value | None:
    """Rows that are picked by their numbers; what they are made of keeps its basis."""
    value = follow.value(x)
    places = [i for i, index in enumerate(indices) if index is not None]
    if value.square or places != list(range(places[0], places[0] + len(places))):
        return None
    new = (
        result.ndim - (x.ndim - len(places))
        if not any(i.dtype == torch.bool for i in indices if i is not None)
        else None
    )
    if new is None:
        return None
    for i in places:
        value.axes[i].fix(name)
    rows = [Axis.new(n, name) for n in result.shape[places[0] : places[0] + new]]
    return Value(
        (*value.axes[: places[0]], *rows, *value.axes[places[-1] + 1 :]),
        value.param if value.param and len(value.axes) > 1 else None,
    )


def index_select(follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int, index: torch.Tensor) -> Value:
    value = follow.value(x)
    return _with_axis(value, dim, lost(value.axes[dim], result.shape[dim], name))


def embedding(
    follow: Follower, name: str, result: Any, weight: torch.Tensor, ids: torch.Tensor, *args: Any, **kwargs: Any
) -> Value:
    value = follow.value(weight)
    value.axes[0].fix(name)
    if value.param:
        follow.produced(value.param, value.axes[1])
    return Value((*(Axis.new(n, name) for n in ids.shape), value.axes[1]))


def zeros(follow: Follower, name: str, result: torch.Tensor, *args: Any, **kwargs: Any) -> Value:
    """Zeros are zeros in every basis; what is not filled has none yet."""
    return Value(tuple(Axis.new(n) for n in result.shape))
