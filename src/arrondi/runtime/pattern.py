"""The one shape of a block that has a fused form: `Pattern` and `match`.

Read from the result backwards: what comes in + attention + gated MLP,

    x = x + out(attention(rotary(norm(query(n))), rotary(norm(key(n))), value(n)))      n = RMS norm of x
    x = x + down(gate(n) · activation · up(n))                                           n = RMS norm of x

where the norms of heads are optional, and keys and values go through the cache if there is one. A graph matches if each of
its steps is one of these; `Differs` names the first that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from arrondi.runtime.symbols import Length, Node

ACTIVATIONS: Final = ("silu", "gelu_tanh")
"""Of the gate, as `arrondi.kernels.product.GATES` has them."""


class Differs(Exception):
    """Why a block has no fused form: one sentence."""


@dataclass(frozen=True)
class Norm:
    """x / √(mean(x²) + eps) · weight, or · (1 + weight)."""

    weight: str
    plus_one: bool
    eps: float


@dataclass(frozen=True)
class Pattern:
    """What the parts of a block are. Parts are named as seen from the block."""

    before: Norm
    query: str
    key: str
    value: str
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int
    key_heads: int
    width: int
    attention: str
    options: tuple[tuple[str, object], ...]
    passed: tuple[str, ...]
    out: str
    between: Norm
    gate: str
    activation: str
    up: str
    down: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value, self.out, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return tuple(n for n in (self.before, self.query_norm, self.key_norm, self.between) if n is not None)


def match(result: Node, updates: list[Node], calls: list[Node]) -> tuple[Pattern, int | None]:
    """The pattern of one call's graph, and the number of the layer under which its keys and values are cached.

    Args:
        result: what the block gives.
        updates, calls: all steps that changed a cache, and all calls of an attention function.

    Raises:
        Differs: a step is another one.
    """
    down, middle = _residual(result, "its MLP")
    gate, activation, up, inner = _gated(_linear_input(down))
    between, seen = _norm(inner, "the MLP reads")
    if seen is not middle:
        raise Differs("The norm before its MLP reads something else than what the MLP is added to.")
    out, entry = _residual(middle, "attention")
    if entry.name != "input":
        raise Differs(f"What attention is added to is {_what(entry)}, not what came in.")
    attention = _linear_input(out)
    if attention.name == "view":
        attention = attention.args[0]
    if attention.name != "attention" or calls != [attention]:
        raise Differs(f"Its output product reads {_what(attention)}, not the one call of attention.")
    path, query, key, value, options, passed = attention.args
    layer = None
    if updates:
        if (
            len(updates) > 1
            or (key.name, value.name) != ("cached keys", "cached values")
            or {key.args[0], value.args[0]} != {updates[0]}
        ):
            raise Differs("Keys and values go through the cache in another way than once, before attention.")
        key, value, layer = updates[0].args
    (q, q_norm, q_shape), (k, k_norm, k_shape) = _heads(_rotated(query)), _heads(_rotated(key))
    v, v_norm, v_shape = _heads(value)
    if v_norm is not None or (q_norm is None) != (k_norm is None) or k_shape != v_shape or q_shape[1] != k_shape[1]:
        raise Differs("Queries, keys and values are normed or shaped in another way than the fused form has.")
    if q_norm is not None and k_norm is not None and q_norm.eps != k_norm.eps:
        raise Differs("The norms of queries and keys have different eps.")
    read = [linear.args[1] for linear in (q, k, v)]
    if any(node is not read[0] for node in read):
        raise Differs("Queries, keys and values are made of different numbers.")
    before, came_in = _norm(read[0], "attention reads")
    if came_in is not entry:
        raise Differs("The norm before attention reads something else than what came in.")
    names = [linear.args[0] for linear in (q, k, v, out, gate, up, down)]
    if len(set(names)) < len(names):
        raise Differs("One of its linear layers is used twice.")
    q, k, v, out, gate, up, down = names
    return Pattern(
        before, q, k, v, q_norm, k_norm, q_shape[0], k_shape[0], q_shape[1], path, options, passed, out, between, gate, activation, up, down
    ), layer  # fmt: skip


def _what(node: Any) -> str:
    """A node as the object of a sentence."""
    if not isinstance(node, Node):
        return f"the number {node}"
    known = {
        "input": "what came in", "parameter": "the parameter {0}", "linear": "the result of {0}", "add": "a sum",
        "mul": "a product", "attention": "the result of attention", "buffer": "the buffer {0}",
    }  # fmt: skip
    return known.get(node.name, f"the result of {node.name}").format(*node.args)


def _residual(node: Node, which: str) -> tuple[Node, Node]:
    """The linear layer's result in a sum, and the other part."""
    if node.name != "add":
        raise Differs(f"Where the sum after {which} should be is {_what(node)}.")
    for one, two in (node.args, node.args[::-1]):
        if isinstance(one, Node) and isinstance(two, Node) and one.name == "linear" and two.name != "linear":
            return one, two
    one, two = node.args
    raise Differs(
        f"The sum after {which} is of {_what(one)} and {_what(two)}, not of a linear layer's result and what came in."
    )


def _linear_input(node: Node) -> Node:
    return node.args[1]


def _factors(node: Any) -> list[Any]:
    if isinstance(node, Node) and node.name == "mul":
        return [f for a in node.args for f in _factors(a)]
    return [node]


def _only(nodes: list[Any], wanted: Callable[[Any], bool]) -> list[Any]:
    return [n for n in nodes if wanted(n)]


def _named(*names: str) -> Callable[[Any], bool]:
    return lambda n: isinstance(n, Node) and n.name in names


def _gated(node: Node) -> tuple[Node, str, Node, Node]:
    """gate, its activation, up, and what both read."""
    factors = _factors(node)
    active, plain = _only(factors, _named(*ACTIVATIONS)), _only(factors, _named("linear"))
    if len(factors) != 2 or len(active) != 1 or len(plain) != 1:
        raise Differs(
            f"The last layer of its MLP reads {_what(node) if len(factors) != 2 else ' times '.join(map(_what, factors))}, "
            f"not a linear layer times {' or '.join(ACTIVATIONS)} of another."
        )
    (gate,), up = active[0].args, plain[0]
    if gate.name != "linear" or gate.args[1] is not up.args[1]:
        raise Differs("The gate of its MLP is not a linear layer that reads what the other one reads.")
    return gate, active[0].name, up, up.args[1]


def _norm(node: Node, where: str) -> tuple[Norm, Node]:
    """The RMS norm that makes a node, and what it reads."""
    factors = _factors(node)
    roots = _only(factors, _named("rsqrt"))
    weights = [(f, w) for f in factors if (w := _weight(f)) is not None]
    if len(factors) == 3 and len(roots) == 1 and len(weights) == 1:
        (x,) = [f for f in factors if f is not roots[0] and f is not weights[0][0]]
        eps = _eps(roots[0].args[0], x)
        if eps is not None:
            weight, plus_one = weights[0][1]
            return Norm(weight, plus_one, eps), x
    raise Differs(f"What {where} is {_what(node)}, not an RMS norm with a weight.")


def _weight(node: Any) -> tuple[str, bool] | None:
    if _named("parameter")(node):
        return node.args[0], False
    if _named("add")(node):
        for one, two in (node.args, node.args[::-1]):
            if _named("parameter")(one) and two == 1.0:
                return one.args[0], True
    return None


def _eps(node: Any, x: Node) -> float | None:
    """eps of mean(x²) + eps."""
    if not _named("add")(node):
        return None
    for mean, eps in (node.args, node.args[::-1]):
        if (
            isinstance(eps, float)
            and _named("mean")(mean)
            and _named("square")(mean.args[0])
            and mean.args[0].args[0] is x
        ):
            return eps
    return None


def _rotated(node: Node) -> Node:
    """What was turned by rotary positions in halves."""
    if node.name == "add":
        for straight, turned in (node.args, node.args[::-1]):
            found = _straight(straight), _turned(turned)
            if found[0] is not None and found[0] is found[1]:
                return found[0]
    raise Differs(
        f"A query or key is {_what(node)}, not a projection with rotary positions in halves and nothing else."
    )


def _times(node: Any, positions: str) -> Node | None:
    """The other factor of a product with the cosines or sines, one for all heads."""
    if _named("mul")(node):
        for one, two in (node.args, node.args[::-1]):
            if (
                _named("unsqueeze")(two)
                and two.args[0].name == positions
                and two.args[1] == 1
                and isinstance(one, Node)
            ):
                return one
    return None


def _straight(node: Any) -> Node | None:
    return _times(node, "cosines")


def _turned(node: Any) -> Node | None:
    """x of (-second half of x, first half of x) · sines."""
    halves = _times(node, "sines")
    if halves is None or halves.name != "cat" or len(halves.args) != 3 or halves.args[0] != 3:
        return None
    _, minus, first = halves.args
    if minus.name != "neg" or minus.args[0].name != "slice" or first.name != "slice":
        return None
    (x, axis, start, stop), (y, other, low, high) = minus.args[0].args, first.args
    if x is not y or axis != 3 or other != 3 or low != 0 or start != high or stop != 2 * high:
        return None
    return x


def _heads(node: Node) -> tuple[Node, Norm | None, tuple[int, int]]:
    """The linear layer whose results are cut into heads, the norm of each head, and how many heads of which width."""
    norm, turned, shape = None, False, None
    while node.name != "linear":
        if node.name == "permute" and node.args[1] == (0, 2, 1, 3) and not turned:
            turned, node = True, node.args[0]
        elif node.name == "view" and shape is None and len(node.args[1]) == 4:
            node, shape = node.args
        elif node.name == "mul" and norm is None and shape is None:
            norm, node = _norm(node, "a query or key is made of")
        else:
            break
    if node.name != "linear" or not turned or shape is None or any(isinstance(n, Length) for n in shape[2:]):
        raise Differs(f"Queries, keys or values are made of {_what(node)}, not of a linear layer cut into heads.")
    return node, norm, (shape[2], shape[3])
