"""What torch's operators do to bases: `RULES`.

A rule gets the arguments of an operator and says in which bases its result is written. What has no rule fixes the bases of all that
it reads (`otherwise`). The rules are those of the operators below Python, of which there are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch

from arrondi.model.bases import Axis, Basis, Gain, Value, cut, regroup


class Follower(Protocol):
    """What rules write down besides bases."""

    def value(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor."""

    def contracted(self, param: str, axis: Axis, gain: Gain | None, bias: str | None) -> None:
        """An axis of a parameter was summed over with an input that has this gain; `bias` is added to the result."""

    def produced(self, param: str, axis: Axis) -> None:
        """An axis of a parameter went into a result."""


Rule = Callable[..., "Value | tuple[Value, ...] | None"]
"""(follower, name, result, *args, **kwargs) → the value of the result, or of every tensor of it; None leaves it to `otherwise`."""


def _name(value: Value, name: str) -> str:
    return f"{name} of {value.param}" if value.param else name


def otherwise(
    follow: Follower, name: str, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> list[Value]:
    """An operator of which nothing is known."""
    for tensor in tensors:
        value = follow.value(tensor)
        value.fix(_name(value, name))
    return [Value.fixed(r.shape, name) for r in results]


# ── the same numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


def _same(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value:
    return follow.value(x)


def _view(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value | None:
    value = follow.value(x)
    if value.square or result.numel() != x.numel():
        return None
    return Value(tuple(regroup(value.axes, result.shape, name)), value.param, value.offset)


def _permuted(value: Value, order: Sequence[int]) -> Value:
    return Value(tuple(value.axes[i] for i in order), value.param, value.offset, value.square)


def _permute(follow: Follower, name: str, result: Any, x: torch.Tensor, dims: Sequence[int]) -> Value:
    return _permuted(follow.value(x), [d % x.ndim for d in dims])


def _transpose(follow: Follower, name: str, result: Any, x: torch.Tensor, one: int = 0, two: int = 1) -> Value:
    order = list(range(x.ndim))
    if order:
        order[one], order[two] = order[two], order[one]
    return _permuted(follow.value(x), order)


def _t(follow: Follower, name: str, result: Any, x: torch.Tensor) -> Value:
    return _permuted(follow.value(x), list(range(x.ndim))[::-1])


def _expand(follow: Follower, name: str, result: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Value:
    value = follow.value(x)
    axes = [Axis.new(n, name) for n in result.shape]
    for i in range(1, x.ndim + 1):
        if x.shape[-i] == result.shape[-i]:
            axes[-i] = value.axes[-i]
    return Value(tuple(axes), value.param if x.shape == result.shape else None)


def _repeat(follow: Follower, name: str, result: Any, x: torch.Tensor, times: Sequence[int]) -> Value:
    value, lead = follow.value(x), len(times) - x.ndim
    axes = [Axis.new(n, name) for n in times[:lead]]
    for axis, n in zip(value.axes, times[lead:], strict=True):
        if n > 1 and axis.gain:
            axis.fix(name)
        axes.append(Axis((Basis(n, name), *axis.bases)) if n > 1 else axis)
    return Value(tuple(axes))


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def _slice(
    follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Value | None:  # fmt: skip
    value = follow.value(x)
    if result.shape[dim] == x.shape[dim]:
        return value
    if step != 1:
        return _with_axis(value, dim, _lost(value.axes[dim], result.shape[dim], name))
    first = min(max((start or 0) % x.shape[dim] if (start or 0) < 0 else (start or 0), 0), x.shape[dim])
    return _with_axis(value, dim, _part(value.axes[dim], first, first + result.shape[dim], name))


def _lost(axis: Axis, size: int, name: str) -> Axis:
    axis.fix(name)
    return Axis.new(size, name)


def _split(
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


def _select(follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int, index: int) -> Value:
    return _without(follow.value(x), dim, name)


def _unbind(
    follow: Follower, name: str, results: Sequence[torch.Tensor], x: torch.Tensor, dim: int = 0
) -> tuple[Value, ...]:
    return tuple(_without(follow.value(x), dim, name) for _ in results)


def _cat(follow: Follower, name: str, result: Any, tensors: Sequence[torch.Tensor], dim: int = 0) -> Value | None:
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
        axes[dim] = _lost(Axis(tuple(pieces)), result.shape[dim], name)
    return Value(tuple(axes))


def _index(
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


def _index_select(follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int, index: torch.Tensor) -> Value:
    value = follow.value(x)
    return _with_axis(value, dim, _lost(value.axes[dim], result.shape[dim], name))


def _embedding(
    follow: Follower, name: str, result: Any, weight: torch.Tensor, ids: torch.Tensor, *args: Any, **kwargs: Any
) -> Value:
    value = follow.value(weight)
    value.axes[0].fix(name)
    if value.param:
        follow.produced(value.param, value.axes[1])
    return Value((*(Axis.new(n, name) for n in ids.shape), value.axes[1]))


_SUM: Final = "a sum"


# ── sums and products number by number ────────────────────────────────────────────────────────────────────────────────


def _add(follow: Follower, name: str, result: torch.Tensor, x: Any, y: Any, *args: Any, **kwargs: Any) -> Value | None:
    """Both are written in the same basis; one number for all channels is kept by turns that keep the ones."""
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        tensor, number = (x, y) if isinstance(x, torch.Tensor) else (y, x)
        value = follow.value(tensor)
        if value.param and tensor.ndim <= 1 and kwargs.get("alpha", 1) == 1 and name.startswith("add"):
            return Value(value.axes, value.param, value.offset + float(number))
        for axis in value.axes:
            axis.keep_ones(_SUM)
        return Value(tuple(a.plain() for a in value.axes))
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    for value in (one, two):
        if value.param:
            for axis in value.axes:
                follow.produced(value.param, axis)
    axes = []
    for i in range(-result.ndim, 0):
        a, b = (v.axes[i] if len(v.axes) >= -i else Axis() for v in (one, two))
        if a.bases and b.bases:
            axes.append(a.be(b, _SUM))
        else:
            axis = a if a.bases else b
            axis.keep_ones(_SUM)
            axes.append(axis.plain())
    return Value(tuple(axes))


def _multiply(
    follow: Follower, name: str, result: torch.Tensor, x: Any, y: Any, *args: Any, **kwargs: Any
) -> Value | None:
    """A number for all channels changes no basis; one for each is a gain, if it is a parameter."""
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        return follow.value(x if isinstance(x, torch.Tensor) else y).__class__(
            follow.value(x if isinstance(x, torch.Tensor) else y).axes
        )
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    if name.startswith("mul") and x is y:
        return Value(tuple(a.plain() if not a.gain else _lost(a, a.size, name) for a in one.axes), square=True)
    divides = name.startswith("div")
    for gain, other in ((two, one), (one, two)):
        if _is_gain(gain, other) and not divides:
            axis = other.axes[-1]
            return Value((*other.axes[:-1], Axis(axis.bases, Gain(str(gain.param), gain.offset))))
    axes = []
    for i in range(-result.ndim, 0):
        a, b = (v.axes[i] if len(v.axes) >= -i else Axis() for v in (one, two))
        if b.bases and (a.bases or divides):
            why = (
                f"a product with {two.param or one.param}" if two.param or one.param else "a product channel by channel"
            )
            a.fix(why)
            b.fix(why)
        axes.append(a if a.bases else b)
    return Value(tuple(Axis(a.bases, a.gain) for a in axes))


def _is_gain(gain: Value, other: Value) -> bool:
    """Whether a vector of parameters multiplies the last axis of something that has no gain yet."""
    if gain.param is None or other.param is not None or not other.axes or other.axes[-1].gain:
        return False
    sizes = [axis.size for axis in gain.axes]
    return bool(sizes) and sizes[-1] > 1 and math.prod(sizes) == sizes[-1] == other.axes[-1].size


def _power(follow: Follower, name: str, result: Any, x: torch.Tensor, exponent: Any) -> Value | None:
    if not isinstance(x, torch.Tensor) or isinstance(exponent, torch.Tensor) or exponent != 2:
        return None
    value = follow.value(x)
    if value.square or any(a.gain for a in value.axes):
        return None
    return Value(value.axes, square=True)


# ── over a whole axis ─────────────────────────────────────────────────────────────────────────────────────────────────


def _dims(x: torch.Tensor, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _reduced(value: Value, dims: Sequence[int], result: torch.Tensor) -> Value:
    kept = [a for i, a in enumerate(value.axes) if i not in dims]
    if len(kept) < result.ndim:
        kept = [Axis() if i in dims else a for i, a in enumerate(value.axes)]
    return Value(tuple(kept))


def _mean(
    follow: Follower, name: str, result: torch.Tensor, x: torch.Tensor, dims: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """Of squares: the length, which no turn changes. Of the numbers themselves: a turn must keep the ones."""
    value, over = follow.value(x), _dims(x, dims)
    for i, axis in enumerate(value.axes):
        if i in over and not value.square:
            axis.keep_ones(name)
        elif i not in over and value.square:
            axis.fix("squares")
    return _reduced(value, over, result)


def _length(
    follow: Follower,
    name: str,
    result: torch.Tensor,
    x: torch.Tensor,
    order: Any = 2,
    dims: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Value | None:
    value, over = follow.value(x), _dims(x, dims)
    if order != 2 or value.square or any(value.axes[i].gain for i in over):
        return None
    for i, axis in enumerate(value.axes):
        if i not in over:
            axis.fix(name)
    return _reduced(value, over, result)


def _layer_norm(
    follow: Follower, name: str, results: Sequence[torch.Tensor], x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, *args: Any
) -> tuple[Value, ...] | None:  # fmt: skip
    if len(shape) != 1:
        return None
    value = follow.value(x)
    last = value.axes[-1]
    last.keep_ones(name)
    normed = _normed(follow, value, weight, bias, name)
    rest = Value((*value.axes[:-1], Axis()))
    return (normed, rest, rest)


def _rms_norm(
    follow: Follower,
    name: str,
    results: Any,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    *args: Any,
) -> Any:
    if len(shape) != 1:
        return None
    value = follow.value(x)
    normed = _normed(follow, value, weight, None, name)
    return normed if isinstance(results, torch.Tensor) else (normed, Value((*value.axes[:-1], Axis())))


def _normed(follow: Follower, value: Value, weight: torch.Tensor | None, bias: torch.Tensor | None, name: str) -> Value:
    *rest, last = value.axes
    for axis in rest:
        axis.fix(name)
    gamma, beta = (None if t is None else follow.value(t) for t in (weight, bias))
    if last.gain or (gamma and gamma.param is None) or (beta and beta.param is None) or (beta and gamma is None):
        last.fix(name)
        return Value((*rest, last.plain()))
    if gamma is None:
        return Value((*rest, last))
    return Value((*rest, Axis(last.bases, Gain(str(gamma.param), gamma.offset, beta.param if beta else None))))


# ── products of matrices ──────────────────────────────────────────────────────────────────────────────────────────────


def _contract(follow: Follower, x: Axis, y: Axis, one: Value, two: Value, name: str, bias: str | None) -> None:
    """The axis that is summed over: both are written in the same basis, and a weight takes the gain over."""
    for axis, value, other, others in ((x, one, y, two), (y, two, x, one)):
        if value.param and not others.param:
            follow.contracted(value.param, axis, other.gain, bias)
            other = other.plain()
            x, y = (axis.plain(), other) if axis is x else (other, axis.plain())
            break
    x.be(y, name)


def _mm(
    follow: Follower,
    name: str,
    result: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    *args: Any,
    bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> Value | None:
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    added = follow.value(bias).param if bias is not None else None
    _contract(follow, one.axes[-1], two.axes[-2], one, two, name, added)
    batch = [
        a.be(b, name) if a.bases and b.bases else (a if a.bases else b)
        for a, b in zip(one.axes[:-2], two.axes[:-2], strict=True)
    ]
    for value, axis in ((one, one.axes[-2]), (two, two.axes[-1])):
        if value.param:
            follow.produced(value.param, axis)
    return Value((*batch, one.axes[-2], two.axes[-1]))


def _addmm(
    follow: Follower,
    name: str,
    result: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    **kwargs: Any,
) -> Value | None:
    product = _mm(follow, name, result, x, y, bias=bias)
    if product is None:
        return None
    value = follow.value(bias)
    if value.param:
        follow.produced(value.param, value.axes[-1])
    last = product.axes[-1].be(value.axes[-1], name) if value.axes and value.axes[-1].bases else product.axes[-1]
    for axis in value.axes[:-1]:
        axis.fix(name)
    return Value((*product.axes[:-1], last))


def _mv(follow: Follower, name: str, result: Any, x: torch.Tensor, y: torch.Tensor) -> Value | None:
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    _contract(follow, one.axes[-1], two.axes[-1], one, two, name, None)
    if one.param and len(one.axes) > 1:
        follow.produced(one.param, one.axes[0])
    return Value(one.axes[:-1])


# ── tensors of their own ──────────────────────────────────────────────────────────────────────────────────────────────


def _zeros(follow: Follower, name: str, result: torch.Tensor, *args: Any, **kwargs: Any) -> Value:
    """Zeros are zeros in every basis; what is not filled has none yet."""
    return Value(tuple(Axis.new(n) for n in result.shape))


def _index_add(
    follow: Follower, name: str, result: Any, x: torch.Tensor, dim: int, index: Any, source: torch.Tensor, **kwargs: Any
) -> Value:
    one, two = follow.value(x), follow.value(source)
    for i, (a, b) in enumerate(zip(one.axes, two.axes, strict=True)):
        if i == dim % x.ndim:
            a.fix(name)
            b.fix(name)
        elif a.bases and b.bases:
            a.be(b, name)
        elif b.gain:
            b.fix(name)
    return Value(tuple(a.plain() for a in one.axes))


def _copy(follow: Follower, name: str, result: Any, x: torch.Tensor, y: Any, *args: Any) -> Value | None:
    return _add(follow, name, result, x, y) if isinstance(y, torch.Tensor) and y.ndim == x.ndim else None


RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(["clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "lift", "neg", "positive", "dropout", "native_dropout", "zero_", "_conj"], _same),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_alias"], _view),
    "permute": _permute, "transpose": _transpose, "t": _t, "numpy_T": _t, "expand": _expand, "repeat": _repeat,
    "slice": _slice, "select": _select, "unbind": _unbind, "cat": _cat, "embedding": _embedding,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"], _split),
    "index": _index, "index_select": _index_select,
    **dict.fromkeys(["add", "add_", "sub", "sub_"], _add), **dict.fromkeys(["mul", "mul_", "div", "div_"], _multiply),
    "pow": _power, "square": lambda follow, name, result, x: _power(follow, name, result, x, 2),
    **dict.fromkeys(["mean", "sum"], _mean), **dict.fromkeys(["linalg_vector_norm", "norm"], _length),
    "native_layer_norm": _layer_norm, **dict.fromkeys(["_fused_rms_norm", "rms_norm"], _rms_norm),
    **dict.fromkeys(["mm", "bmm"], _mm), **dict.fromkeys(["addmm", "baddbmm"], _addmm), **dict.fromkeys(["mv", "dot"], _mv),
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"], _zeros),
    **dict.fromkeys(["index_add", "index_add_"], _index_add), "copy_": _copy,
}  # fmt: skip
"""Name of an operator → its rule."""
