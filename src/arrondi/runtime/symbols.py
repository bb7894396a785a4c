"""Tensors without numbers, which write down what is computed with them: `Symbol`, `Length`, `Opaque`, `Node` and `Graph`.

A module's own forward is called with symbols instead of tensors. Each operator that is known (`arrondi.runtime.operators`) gives
a new symbol, and the symbols together are the operator graph. Everything else raises `Met`: other operators, changes in place,
numbers asked of a tensor, and every decision that depends on a length or on an argument. So a graph that comes out is what the
forward computes for all numbers, lengths and positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeAlias

import torch
from torch.nn import functional


class Met(BaseException):
    """What a forward does that cannot be followed, as the object of a sentence.

    No `Exception`: a forward that catches those must not go on with something else.
    """


class Length:
    """How many sequences, tokens or cached tokens there are: any number from one.

    Args:
        name: equal names are equal lengths.
        or_one: it may be one instead, as the sequences of positions that all sequences share.
        fits: it is what it meets in a sum or product. Who calls the block has to see to that.
    """

    def __init__(self, name: str, *, or_one: bool = False, fits: bool = False) -> None:
        self.name, self.or_one, self.fits = name, or_one, fits

    def decide(self, *_: object) -> NoReturn:
        raise Met(f"a decision or a number that depends on the {self.name}")

    def __mul__(self, other: object) -> Length:
        return Length(f"{self.name} times {other!r}")

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return self.name


class Opaque:
    """An argument that a forward may hand on and nothing else."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.decide()  # isinstance asks for it

    def __getattr__(self, name: str) -> NoReturn:
        self.decide()

    def decide(self, *_: object) -> NoReturn:
        raise Met(f"a decision or a number that depends on {self.name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Met(f"{getattr(func, '__name__', func)} of an argument that usual blocks only hand on")


Dim: TypeAlias = "int | Length"
Shape: TypeAlias = "tuple[Dim, ...]"


@dataclass(frozen=True, eq=False)
class Node:
    """One step of the graph. Equal steps of one graph are the same object."""

    name: str
    args: tuple[Any, ...]
    number: int

    def __repr__(self) -> str:
        return f"#{self.number}"


@dataclass
class Graph:
    """The steps of one call.

    Attributes:
        dtype: in which the model computes.
        operators: what may be done with symbols, by the names under which torch has it.
    """

    dtype: torch.dtype
    operators: Mapping[str, Callable[..., Any]]
    nodes: dict[str, Node] = field(default_factory=dict)

    def node(self, name: str, *args: Any) -> Node:
        key = f"{name}{args!r}"
        return self.nodes.setdefault(key, Node(name, args, len(self.nodes)))

    def symbol(self, name: str, shape: Shape, *args: Any, dtype: torch.dtype | None = None) -> Symbol:
        return Symbol(self, self.node(name, *args), shape, self.dtype if dtype is None else dtype)


class Symbol(torch.Tensor):
    """A tensor of a graph: without numbers, with a shape that may have lengths in it."""

    graph: Graph
    node: Node
    sizes: Shape
    kind: torch.dtype

    def __new__(cls, graph: Graph, node: Node, shape: Shape, dtype: torch.dtype) -> Symbol:
        found = torch.Tensor._make_subclass(cls, _NOTHING)
        vars(found).update(graph=graph, node=node, sizes=shape, kind=dtype)
        return found

    def __init__(self, *_: Any) -> None:
        pass

    shape = property(lambda self: self.sizes)
    dtype = property(lambda self: self.kind)
    device = property(lambda self: torch.device("cpu"))
    ndim = property(lambda self: len(self.sizes))
    requires_grad = property(lambda self: False)

    def dim(self) -> int:
        return len(self.sizes)

    def size(self, dim: int | None = None) -> Any:
        return self.sizes if dim is None else self.sizes[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            raise Met(f"Tensor.{func.__self__.__name__}")
        if not any(getattr(home, name, None) == func for home in (torch, torch.Tensor, functional, torch._C._nn)):
            raise Met(f"the operator {name}, which is not one of torch's own")
        return _operate(name, *args, **(kwargs or {}))


_NOTHING: Final = torch.empty(0, 0, device="meta")


def _operate(name: str, *args: Any, **kwargs: Any) -> Any:
    """An operator of the graph of its first symbol."""
    inside = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,)) if type(a) is Symbol]
    if not inside or name not in inside[0].graph.operators:
        raise Met(f"the operator {name}")
    return inside[0].graph.operators[name](*args, **kwargs)


# Of these, C refuses lengths before it asks the symbol.
for _name in ("view", "reshape", "expand", "repeat", "__mul__", "__rmul__", "__getitem__"):
    setattr(Symbol, _name, functools.partialmethod(lambda self, name, *args: _operate(name, self, *args), _name))

_SPECIAL: Final = (
    "bool", "float", "int", "index", "len", "iter", "contains", "hash", "eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub",
    "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "neg",
    "abs", "round", "invert", "and", "or", "getitem", "setitem", "iadd", "isub", "imul", "itruediv", "ipow",
)  # fmt: skip
"""What Python looks up on the class: __bool__, …"""

for _name in [f"__{name}__" for name in _SPECIAL]:
    if _name not in vars(Length):
        setattr(Length, _name, Length.decide)
    setattr(Opaque, _name, Opaque.decide)
