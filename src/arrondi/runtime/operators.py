"""The operators that a transformer block is made of, on symbols: `OPERATORS`.

Each takes what torch's operator of that name takes and gives the symbol of its result. Steps that change no number leave no
node: casts between float32 and the type of the model (which rounds a model's own numbers anyway), copies, views of the same
shape, a product with one. Different ways of writing a square, a root or an RMS norm give the same nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeGuard

import torch

from arrondi.runtime.symbols import Dim, Graph, Length, Met, Shape, Symbol

_END: Final = (None, 2**63 - 1)


def _is_symbol(value: Any) -> TypeGuard[Symbol]:
    return type(value) is Symbol


def _operand(graph: Graph, value: Any) -> tuple[Any, Shape, torch.dtype | None]:
    """Node or number, shape and type."""
    if _is_symbol(value):
        return value.node, value.shape, value.dtype
    if type(value) in (int, float):
        return float(value), (), None
    if isinstance(value, torch.Tensor):
        raise Met("a tensor that is neither an argument nor a parameter of the block")
    if isinstance(value, Length):
        value.decide()
    raise Met(f"arithmetic with a {type(value).__name__}")


def _same(a: Dim, b: Dim) -> bool:
    if isinstance(a, Length) or isinstance(b, Length):
        return isinstance(a, Length) and isinstance(b, Length) and a.name == b.name
    return a == b


def _broadcast(a: Shape, b: Shape) -> Shape:
    """As torch does, where that is the same for all lengths."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    shape = list(longer)
    for i in range(1, len(shorter) + 1):
        one, two = longer[-i], shorter[-i]
        if _same(one, two):
            shape[-i] = two if isinstance(one, Length) and one.or_one else one
        elif one.fits if isinstance(one, Length) else one == 1:
            shape[-i] = two
        elif isinstance(two, Length) and two.fits:
            shape[-i] = one
        elif not (isinstance(two, int) and two == 1):
            raise Met(f"a sum or product of {list(a)} with {list(b)}")
    return tuple(shape)


def _binary(name: str, one: Any, two: Any) -> Symbol:
    graph = (one if _is_symbol(one) else two).graph
    (a, shape_a, type_a), (b, shape_b, type_b) = _operand(graph, one), _operand(graph, two)
    types = [t for t in (type_a, type_b) if t is not None]
    dtype = types[0] if len(types) == 1 else torch.promote_types(*types)
    if not dtype.is_floating_point:
        raise Met("arithmetic with integers")
    return Symbol(graph, graph.node(name, a, b), _broadcast(shape_a, shape_b), dtype)


def _add(one: Any, two: Any, *, alpha: float = 1) -> Symbol:
    if alpha != 1:
        raise Met("a sum with a factor")
    return _binary("add", one, two)


def _mul(one: Any, two: Any) -> Symbol:
    for value, other in ((one, two), (two, one)):
        if type(value) in (int, float) and value == 1:
            return other
    if _is_symbol(one) and _is_symbol(two) and one.node is two.node:
        return _unary("square", one)
    return _binary("mul", one, two)


def _div(one: Any, two: Any) -> Symbol:
    if type(two) in (int, float) and two == 1:
        return one
    if _is_symbol(two) and two.node.name == "sqrt":
        (inner,) = two.node.args
        return _mul(one, Symbol(two.graph, two.graph.node("rsqrt", inner), two.shape, two.dtype))
    return _binary("div", one, two)


def _unary(name: str, x: Symbol) -> Symbol:
    if not x.dtype.is_floating_point:
        raise Met("arithmetic with integers")
    return Symbol(x.graph, x.graph.node(name, x.node), x.shape, x.dtype)


def _pow(x: Any, exponent: Any) -> Symbol:
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(exponent) if type(exponent) in (int, float) else None
    if name is None or not _is_symbol(x):
        raise Met("another power than a square or a root")
    return _unary(name, x)


def _mean(x: Symbol, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Symbol:
    if dim not in (-1, [-1], (-1,), x.ndim - 1) or not keepdim:
        raise Met("a mean over something else than the last axis")
    x = x if dtype is None else _cast(x, dtype)
    return Symbol(x.graph, x.graph.node("mean", x.node), (*x.shape[:-1], 1), x.dtype)


def _cast(x: Symbol, dtype: torch.dtype) -> Symbol:
    known = {torch.float32, x.graph.dtype}
    if dtype is x.dtype:
        return x
    if x.dtype not in known or dtype not in known:
        raise Met(f"a cast from {x.dtype} to {dtype}".replace("torch.", ""))
    return Symbol(x.graph, x.node, x.shape, dtype)


def _to(x: Symbol, *args: Any, dtype: Any = None, device: Any = None, copy: bool = False, **others: Any) -> Symbol:
    for value in (*args, dtype, device):
        if _is_symbol(value):
            x = _cast(x, value.dtype)
        elif isinstance(value, torch.dtype):
            x = _cast(x, value)
        elif value is not None and torch.device(value).type != "cpu":
            raise Met(f"a move to {value}")
    return x


def _axis(x: Symbol, dim: int, extra: int = 0) -> int:
    return dim % (len(x.shape) + extra)


def _view(x: Symbol, *sizes: Any) -> Symbol:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    if any(not isinstance(s, (int, Length)) for s in sizes):
        raise Met("a view as another type")
    asked = [-1 if isinstance(s, int) and s == -1 else s for s in sizes]
    left, right = list(x.shape), [s for s in asked if not (isinstance(s, int) and s == -1)]
    for size in list(right):  # lengths of both sides cancel
        match = next((d for d in left if isinstance(d, Length) and isinstance(size, Length) and _same(d, size)), None)
        if match is not None:
            left = [d for d in left if d is not match]
            right = [d for d in right if d is not size]
    if any(isinstance(d, Length) for d in (*left, *right)):
        raise Met(f"a view of {list(x.shape)} as {list(sizes)}")
    rest, open_ = divmod(_product(left), max(_product(right), 1))
    if (
        open_
        or (len(right) and not _product(right))
        or (rest != 1 and -1 not in [s for s in asked if isinstance(s, int)])
    ):
        raise Met(f"a view of {list(x.shape)} as {list(sizes)}")
    shape: Shape = tuple(rest if isinstance(s, int) and s == -1 else s for s in asked)
    if len(shape) == len(x.shape) and all(_same(a, b) for a, b in zip(shape, x.shape, strict=True)):
        return x
    return Symbol(x.graph, x.graph.node("view", x.node, shape), shape, x.dtype)


def _product(sizes: list[Any]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _permute(x: Symbol, *dims: Any) -> Symbol:
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    order = tuple(_axis(x, d) for d in dims)
    node = x.graph.node("permute", x.node, order)
    return Symbol(x.graph, node, tuple(x.shape[d] for d in order), x.dtype)


def _transpose(x: Symbol, dim0: int, dim1: int) -> Symbol:
    order = list(range(x.ndim))
    a, b = _axis(x, dim0), _axis(x, dim1)
    order[a], order[b] = b, a
    return _permute(x, order)


def _unsqueeze(x: Symbol, dim: int) -> Symbol:
    axis = _axis(x, dim, 1)
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    return Symbol(x.graph, x.graph.node("unsqueeze", x.node, axis), shape, x.dtype)


def _slice(x: Symbol, axis: int, start: int, stop: int) -> Symbol:
    shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
    return Symbol(x.graph, x.graph.node("slice", x.node, axis, start, stop), shape, x.dtype)


def _getitem(x: Symbol, key: Any) -> Symbol:
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(not (k is None or k is Ellipsis or isinstance(k, slice)) for k in keys):
        raise Met("an index that picks entries")
    named = sum(isinstance(k, slice) for k in keys)
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    at = keys.index(Ellipsis)
    keys[at : at + 1] = [slice(None)] * (x.ndim - named)
    for axis, k in enumerate(keys):
        if k is None:
            x = _unsqueeze(x, axis)
            continue
        size = x.shape[axis]
        if k.start in (None, 0) and k.stop in _END and k.step in (None, 1):
            continue
        if (
            isinstance(size, Length)
            or k.step not in (None, 1)
            or isinstance(k.start, Length)
            or isinstance(k.stop, Length)
        ):
            raise Met("a part of the tokens or of the sequences")
        x = _slice(x, axis, *k.indices(size)[:2])
    return x


def _cat(tensors: Any, dim: int = 0) -> Symbol:
    first = next(t for t in tensors if _is_symbol(t))
    nodes = [_operand(first.graph, t)[0] for t in tensors]
    axis = _axis(first, dim)
    size = sum(t.shape[axis] for t in tensors)
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    dtype = first.dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return Symbol(first.graph, first.graph.node("cat", axis, *nodes), shape, dtype)


def _chunk(x: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    size = x.shape[_axis(x, dim)]
    if isinstance(size, Length):
        size.decide()
    return _split(x, -(-size // chunks), dim)


def _split(x: Symbol, split_size: Any, dim: int = 0) -> tuple[Symbol, ...]:
    axis = _axis(x, dim)
    size = x.shape[axis]
    if isinstance(size, Length):
        size.decide()
    sizes = split_size
    if isinstance(split_size, int):
        sizes = [min(split_size, size - at) for at in range(0, size, split_size)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_slice(x, axis, start, start + n) for start, n in zip(starts, sizes, strict=True))


def _silu(x: Symbol, inplace: bool = False) -> Symbol:
    if inplace:
        raise Met("a change in place")
    return _unary("silu", x)


def _gelu(x: Symbol, *, approximate: str = "none") -> Symbol:
    return _unary("gelu_tanh" if approximate == "tanh" else "gelu", x)


def _rms_norm(x: Symbol, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Symbol:
    if list(normalized_shape) != [x.shape[-1]] or eps is None:
        raise Met("an RMS norm over something else than the last axis, or without an eps")
    normed = _mul(x, _pow(_add(_mean(_pow(x, 2), -1, True), eps), -0.5))
    return normed if weight is None else _mul(normed, weight)


def _dropout(x: Symbol, p: float = 0.5, training: bool = True, inplace: bool = False) -> Symbol:
    if training and p > 0:
        raise Met("dropout")
    return x


def _itself(x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
    return x


OPERATORS: Final[dict[str, Callable[..., Any]]] = {
    "add": _add, "mul": _mul, "multiply": _mul, "div": _div, "pow": _pow, "mean": _mean,
    "square": lambda x: _pow(x, 2), "sqrt": lambda x: _pow(x, 0.5), "rsqrt": lambda x: _pow(x, -0.5),
    "neg": lambda x: _unary("neg", x), "silu": _silu, "gelu": _gelu, "rms_norm": _rms_norm, "dropout": _dropout,
    "to": _to, "type_as": lambda x, other: _cast(x, other.dtype), "float": lambda x: _cast(x, torch.float32),
    "view": _view, "reshape": _view, "permute": _permute, "transpose": _transpose, "unsqueeze": _unsqueeze,
    "cat": _cat, "chunk": _chunk, "split": _split, "contiguous": _itself, "clone": _itself, "detach": _itself,
    "__add__": _add, "__radd__": _add, "__mul__": _mul, "__rmul__": _mul, "__truediv__": _div, "__pow__": _pow,
    "__rtruediv__": lambda two, one: _div(one, two), "__neg__": lambda x: _unary("neg", x), "__getitem__": _getitem,
}  # fmt: skip
"""What may be done with symbols, by the names under which torch has it."""
