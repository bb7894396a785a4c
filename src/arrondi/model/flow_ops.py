"""Which calls of torch are products, and what they sum over.

Owns: `PRODUCTS`, the table of functions that multiply two tensors, each with the letters of its axes as in an einsum; and
`INSIDE`, the functions that are made of such products and hide them.

Reference for every entry: the einsum that the letters spell.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Axes = tuple[Hashable, ...]
Args = Sequence[Any]
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Convolution:
    """The geometry of a convolution, one number for each spatial axis (`padding` on the left and on the right)."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool


@dataclass(frozen=True)
class Call:
    """A product of two tensors.

    Attributes:
        kind: "linear", "einsum", "convolution", "embedding" or "recurrent".
        left: an operand; for convolutions and embeddings the input.
        right: the other; for convolutions and embeddings the weight.
        left_axes: a letter for every axis of `left`. Letters that both have and the result has not are summed over.
        right_axes: the same for `right`.
        result: letters of the result.
        weight: "right" where the function says which operand is the weight, "either" where it does not.
        convolution: its geometry.
    """

    kind: str
    left: torch.Tensor
    right: torch.Tensor
    left_axes: Axes = ()
    right_axes: Axes = ()
    result: frozenset[Hashable] = frozenset()
    weight: str = "either"
    convolution: Convolution | None = None


def pick(args: Args, kwargs: Kwargs, *names: str | tuple[str, ...]) -> list[Any]:
    """Arguments by place or by name; a tuple of names are spellings of one."""
    found = []
    for place, spellings in enumerate(names):
        spellings = (spellings,) if isinstance(spellings, str) else spellings
        value = args[place] if place < len(args) else next((kwargs[s] for s in spellings if s in kwargs), None)
        found.append(value)
    return found


def _matmul_axes(left: torch.Tensor, right: torch.Tensor) -> tuple[Axes, Axes, frozenset[Hashable]]:
    """Letters of `left @ right` with the rules of broadcasting: batch axes are counted from the end."""
    batch = max(left.ndim, right.ndim, 2) - 2
    names = tuple(range(-batch - 2, -2))
    row, column = ("row",) if left.ndim > 1 else (), ("column",) if right.ndim > 1 else ()
    left_batch = names[batch - max(left.ndim - 2, 0) :]
    right_batch = names[batch - max(right.ndim - 2, 0) :]
    return (*left_batch, *row, "sum"), (*right_batch, "sum", *column), frozenset((*names, *row, *column))


def _matmul(args: Args, kwargs: Kwargs) -> list[Call]:
    left, right = pick(args, kwargs, ("input", "self"), ("other", "mat2", "vec", "tensor"))
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return []
    return [Call("linear", left, right, *_matmul_axes(left, right))]


def _rmatmul(args: Args, kwargs: Kwargs) -> list[Call]:
    return _matmul((args[1], args[0]), {})


def _addmm(args: Args, kwargs: Kwargs) -> list[Call]:
    _, left, right = pick(args, kwargs, ("input", "self"), ("mat1", "batch1", "mat"), ("mat2", "batch2", "vec"))
    return _matmul((left, right), {})


def _addbmm(args: Args, kwargs: Kwargs) -> list[Call]:
    _, left, right = pick(args, kwargs, ("input", "self"), "batch1", "batch2")
    return [
        Call("linear", left, right, ("batch", "row", "sum"), ("batch", "sum", "column"), frozenset({"row", "column"}))
    ]


def _linear(args: Args, kwargs: Kwargs) -> list[Call]:
    x, weight = pick(args, kwargs, "input", "weight")
    rows = tuple(range(x.ndim - 1))
    column = ("column",) if weight.ndim > 1 else ()
    return [Call("linear", x, weight, (*rows, "sum"), (*column, "sum"), frozenset((*rows, *column)), "right")]


def _inner(args: Args, kwargs: Kwargs) -> list[Call]:
    left, right = pick(args, kwargs, ("input", "self"), "other")
    return [_contraction(left, right, [left.ndim - 1], [right.ndim - 1])]


def _contraction(left: torch.Tensor, right: torch.Tensor, left_sum: list[int], right_sum: list[int]) -> Call:
    left_axes: list[Hashable] = [("left", i) for i in range(left.ndim)]
    right_axes: list[Hashable] = [("right", i) for i in range(right.ndim)]
    for letter, (i, j) in enumerate(zip(left_sum, right_sum, strict=True)):
        left_axes[i] = right_axes[j] = letter
    result = frozenset(a for a in (*left_axes, *right_axes) if isinstance(a, tuple))
    return Call("einsum", left, right, tuple(left_axes), tuple(right_axes), result)


def _tensordot(args: Args, kwargs: Kwargs) -> list[Call]:
    left, right, dims = pick(args, kwargs, "a", "b", "dims")
    if dims is None or isinstance(dims, int):
        n = 2 if dims is None else dims
        return [_contraction(left, right, list(range(left.ndim - n, left.ndim)), list(range(n)))]
    pairs = [[d] if isinstance(d, int) else [int(i) for i in d] for d in dims]
    return [_contraction(left, right, [i % left.ndim for i in pairs[0]], [i % right.ndim for i in pairs[1]])]


def _einsum(args: Args, kwargs: Kwargs) -> list[Call]:
    equation, operands = pick(args, kwargs, "equation", "operands")
    if isinstance(equation, str):
        tensors = list(args[1:]) or [operands]
        if len(tensors) == 1 and isinstance(tensors[0], list | tuple):
            tensors = list(tensors[0])
        inputs, arrow, output = equation.replace(" ", "").partition("->")
        terms: list[list[Hashable]] = [_letters(term) for term in inputs.split(",")]
        result = _letters(output) if arrow else None
    else:  # einsum(tensor, [0, 1], tensor, [1, 2], [0, 2])
        tensors = list(args[0 : len(args) - len(args) % 2 : 2])
        terms = [list(term) for term in args[1 : len(tensors) * 2 : 2]]
        result = list(args[-1]) if len(args) % 2 else None
    axes = [_spread(term, tensor.ndim) for term, tensor in zip(terms, tensors, strict=True)]
    every = [a for term in axes for a in term]
    if result is None:
        out = frozenset(a for a in every if every.count(a) == 1 or (isinstance(a, int) and a < 0))
    else:
        out = frozenset(result) - {Ellipsis} | {a for a in every if isinstance(a, int) and a < 0 and Ellipsis in result}
    calls = []
    for i, tensor in enumerate(tensors[1:], 1) if len(tensors) == 2 else enumerate(tensors):
        if len(tensors) == 1:
            break
        other, other_axes = tensors[0], axes[0]
        if len(tensors) > 2:
            other, other_axes = _joined(tensors, axes, i, out)
        calls.append(
            Call("einsum", other, tensor, other_axes, axes[i], out, "either" if len(tensors) == 2 else "right")
        )
    return calls


def _letters(term: str) -> list[Hashable]:
    return [Ellipsis if c == "." else c for c in term.replace("...", ".")]


def _spread(term: list[Hashable], ndim: int) -> Axes:
    """The letters of a term, an ellipsis as negative numbers counted from its end."""
    if Ellipsis not in term:
        return tuple(term)
    at, n = term.index(Ellipsis), ndim - len(term) + 1
    return (*term[:at], *range(-n, 0), *term[at + 1 :])


def _joined(
    tensors: list[torch.Tensor], axes: list[Axes], but: int, out: frozenset[Hashable]
) -> tuple[torch.Tensor, Axes]:
    """The product of all operands but one, over the letters that the one or the result still has: its x."""
    numbers: dict[Hashable, int] = {}
    operands: list[Any] = []
    for i, (tensor, term) in enumerate(zip(tensors, axes, strict=True)):
        if i != but:
            operands += [tensor, [numbers.setdefault(a, len(numbers)) for a in term]]
    left = tuple(a for a in numbers if a in out or a in axes[but])
    return torch.einsum(*operands, [numbers[a] for a in left]), left


def _convolution(spatial: int, transposed: bool) -> Callable[[Args, Kwargs], list[Call]]:
    def parse(args: Args, kwargs: Kwargs) -> list[Call]:
        order = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        names = ("input", "weight", "bias", "stride", "padding", *order)
        given = dict(zip(names, pick(args, kwargs, *names), strict=True))
        x, weight, stride, padding = (given[n] for n in ("input", "weight", "stride", "padding"))
        dilation, groups = given["dilation"], given["groups"]
        strides, dilations = _each(stride, spatial, 1), _each(dilation, spatial, 1)
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            padded = tuple((n // 2, n - n // 2) for n in whole)
        else:
            padded = tuple((p, p) for p in _each(0 if padding == "valid" else padding, spatial, 0))
        geometry = Convolution(strides, padded, dilations, 1 if groups is None else groups, transposed)
        x = x if x.ndim == spatial + 2 else x[None]
        return [Call("convolution", x, weight, weight="right", convolution=geometry)]

    return parse


def _each(value: Any, n: int, default: int) -> tuple[int, ...]:
    if value is None:
        return (default,) * n
    numbers = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return numbers * n if len(numbers) == 1 else numbers


def _aten_convolution(args: Args, kwargs: Kwargs) -> list[Call]:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
    n = weight.ndim - 2
    padded = tuple((p, p) for p in _each(padding, n, 0))
    geometry = Convolution(_each(stride, n, 1), padded, _each(dilation, n, 1), groups, transposed)
    return [Call("convolution", x, weight, weight="right", convolution=geometry)]


def _embedding(args: Args, kwargs: Kwargs) -> list[Call]:
    indices, weight = pick(args, kwargs, "input", "weight")
    return [Call("embedding", indices, weight, weight="right")]


def _aten_embedding(args: Args, kwargs: Kwargs) -> list[Call]:
    return _embedding((args[1], args[0]), {})


def _grouped(args: Args, kwargs: Kwargs) -> list[Call]:
    """Rows of x sorted by expert: `offs` says where each expert's rows end."""
    x, stack, offs = pick(args, kwargs, ("input", "self", "mat_a"), ("weight", "mat2", "mat_b"), "offs")
    if offs is None or x.ndim != 2 or stack.ndim != 3:
        return _matmul((x, stack), {})
    ends = [0, *offs.tolist()]
    return [c for e in range(len(stack)) for c in _matmul((x[ends[e] : ends[e + 1]], stack[e]), {})]


_T = torch.Tensor
_MATMUL = [torch.matmul, torch.linalg.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.vdot]
_MATMUL += [_T.matmul, _T.__matmul__, _T.mm, _T.bmm, _T.mv, _T.dot, _T.vdot]
_ADDMM = [torch.addmm, torch.baddbmm, torch.addmv, _T.addmm, _T.baddbmm, _T.addmv, _T.addmm_, _T.baddbmm_, _T.addmv_]
_CONVOLUTIONS: dict[Any, Callable[[Args, Kwargs], list[Call]]] = {
    **{f: _convolution(n, False) for n, f in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1)},
    **{f: _convolution(n, False) for n, f in enumerate((functional.conv1d, functional.conv2d, functional.conv3d), 1)},
    torch.conv_transpose1d: _convolution(1, True),
    torch.conv_transpose2d: _convolution(2, True),
    torch.conv_transpose3d: _convolution(3, True),
    functional.conv_transpose1d: _convolution(1, True),
    functional.conv_transpose2d: _convolution(2, True),
    functional.conv_transpose3d: _convolution(3, True),
}
_GROUPED = [
    getattr(home, name) for home, name in ((torch, "_grouped_mm"), (functional, "grouped_mm")) if hasattr(home, name)
]

PRODUCTS: dict[Any, Callable[[Args, Kwargs], list[Call]]] = {
    functional.linear: _linear,
    **dict.fromkeys(_MATMUL, _matmul),
    _T.__rmatmul__: _rmatmul,
    **dict.fromkeys(_ADDMM, _addmm),
    **dict.fromkeys([torch.addbmm, _T.addbmm], _addbmm),
    **dict.fromkeys([torch.inner, _T.inner], _inner),
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
    **_CONVOLUTIONS,
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding,
    torch.embedding: _aten_embedding,
    **dict.fromkeys(_GROUPED, _grouped),
}

# Below the level of Python a few functions are left of them. (Where a function of torch is seen, they are not looked at.)
ATEN: dict[Any, Callable[[Args, Kwargs], list[Call]]] = {
    torch.ops.aten.linear: _linear,
    **dict.fromkeys([torch.ops.aten.matmul, torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv], _matmul),
    torch.ops.aten.dot: _matmul,
    **dict.fromkeys([torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.addmv], _addmm),
    torch.ops.aten.convolution: _aten_convolution,
    torch.ops.aten.embedding: _aten_embedding,
}

RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
RECURRENT |= {torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell}

# Functions that take weights and multiply by them out of sight.
INSIDE = {functional.multi_head_attention_forward, torch.chain_matmul, torch.linalg.multi_dot, functional.bilinear}
INSIDE |= RECURRENT
