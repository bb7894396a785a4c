"""Rules of operators that compute: sums and products number by number, means and lengths, norms, products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from arrondi.model.bases import Axis, Gain, Value
from arrondi.model.bases_follow import Follower
from arrondi.model.bases_views import lost

_SUM: Final = "a sum"

# ── sums and products number by number ──────────────────────────────────────────────────────────────────────────────────


def add(follow: Follower, name: str, result: torch.Tensor, x: Any, y: Any, *args: Any, **kwargs: Any) -> Value | None:
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


def multiply(
    follow: Follower, name: str, result: torch.Tensor, x: Any, y: Any, *args: Any, **kwargs: Any
) -> Value | None:
    """A number for all channels changes no basis; one for each is a gain, if it is a parameter."""
    if kwargs.get("rounding_mode") is not None:
        return None
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        if name.startswith("div") and not isinstance(x, torch.Tensor):
            return None
        return Value(follow.value(x if isinstance(x, torch.Tensor) else y).axes)
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    if name.startswith("mul") and x is y:
        return Value(tuple(a.plain() if not a.gain else lost(a, a.size, name) for a in one.axes), square=True)
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


def power(follow: Follower, name: str, result: Any, x: torch.Tensor, exponent: Any) -> Value | None:
    if not isinstance(x, torch.Tensor) or isinstance(exponent, torch.Tensor) or exponent != 2:
        return None
    value = follow.value(x)
    if value.square or any(a.gain for a in value.axes):
        return None
    return Value(value.axes, square=True)


# ── over a whole axis ───────────────────────────────────────────────────────────────────────────────────────────────────


def _dims(x: torch.Tensor, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _reduced(value: Value, dims: Sequence[int], result: torch.Tensor) -> Value:
    kept = [a for i, a in enumerate(value.axes) if i not in dims]
    if len(kept) < result.ndim:
        kept = [Axis() if i in dims else a for i, a in enumerate(value.axes)]
    return Value(tuple(kept))


def mean(
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


def length(
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


def layer_norm(
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


def rms_norm(
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


# ── products of matrices ────────────────────────────────────────────────────────────────────────────────────────────────


def _contract(follow: Follower, x: Axis, y: Axis, one: Value, two: Value, name: str, bias: str | None) -> None:
    """The axis that is summed over: both are written in the same basis, and a weight takes the gain over."""
    for axis, value, other, others in ((x, one, y, two), (y, two, x, one)):
        if value.param and not others.param:
            follow.contracted(value.param, axis, other.gain, bias)
            other = other.plain()
            x, y = (axis.plain(), other) if axis is x else (other, axis.plain())
            break
    x.be(y, name)


def mm(
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


def addmm(
    follow: Follower,
    name: str,
    result: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    **kwargs: Any,
) -> Value | None:
    product = mm(follow, name, result, x, y, bias=bias)
    if product is None:
        return None
    value = follow.value(bias)
    if value.param:
        follow.produced(value.param, value.axes[-1])
    last = product.axes[-1].be(value.axes[-1], name) if value.axes and value.axes[-1].bases else product.axes[-1]
    for axis in value.axes[:-1]:
        axis.fix(name)
    return Value((*product.axes[:-1], last))


def mv(follow: Follower, name: str, result: Any, x: torch.Tensor, y: torch.Tensor) -> Value | None:
    one, two = follow.value(x), follow.value(y)
    if one.square or two.square:
        return None
    _contract(follow, one.axes[-1], two.axes[-1], one, two, name, None)
    if one.param and len(one.axes) > 1:
        follow.produced(one.param, one.axes[0])
    return Value(one.axes[:-1])


def convolution(
    follow: Follower,
    name: str,
    result: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
) -> Value | None:
    """Channels are summed over and made, as by a matrix; places are not."""
    one, two = follow.value(x), follow.value(weight)
    if transposed or args[-1] != 1 or one.square or two.param is None:
        return None
    for value in (one, two):
        for axis in value.axes[2:]:
            axis.fix(name)
    _contract(follow, one.axes[1], two.axes[1], one, two, name, None)
    follow.produced(two.param, two.axes[0])
    made = two.axes[0]
    if bias is not None:
        added = follow.value(bias)
        if added.param:
            follow.produced(added.param, added.axes[0])
        made = made.be(added.axes[0], name)
    return Value((one.axes[0], Axis(made.bases), *(Axis.new(n, name) for n in result.shape[2:])))


def index_add(
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


def copy(follow: Follower, name: str, result: Any, x: torch.Tensor, y: Any, *args: Any) -> Value | None:
    return add(follow, name, result, x, y) if isinstance(y, torch.Tensor) and y.ndim == x.ndim else None
