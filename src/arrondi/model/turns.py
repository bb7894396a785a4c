"""What of a model can be turned: `find_turns`, by following every tensor of one pass.

Owns: `Turn` and its parts. A skeleton of the model is run, and every tensor followed by the rules of `bases_ops`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from arrondi.errors import SchemeError
from arrondi.model.bases import Axis, Basis, Gain, Value, unify
from arrondi.model.bases_follow import otherwise
from arrondi.model.bases_ops import RULES
from arrondi.model.chain import Inputs, said
from arrondi.model.flow_routers import tensors_of
from arrondi.model.in_memory import InMemory
from arrondi.model.skeleton import Skeleton, compute
from arrondi.model.source import OnDisk


@dataclass(frozen=True)
class Part:
    """An axis of a parameter, or a part of it, that is written in a turn's basis.

    Attributes:
        param: the parameter.
        axis: which axis of it.
        channels: (times, size) indices on that axis: every row of them is turned by itself.
    """

    param: str
    axis: int
    channels: torch.Tensor


@dataclass(frozen=True)
class Taken:
    """A gain that the weights which read it take over.

    Attributes:
        gain: the parameters; `weight` becomes 1 - offset, and `bias` zero, where `biases` says so, or what it was in the new basis.
        readers: (parameter, its axis) of every weight that reads what was multiplied by it.
        biases: reader → the parameter that is added to its product; None for readers without one.
    """

    gain: Gain
    readers: tuple[tuple[str, int], ...]
    biases: tuple[str | None, ...]


@dataclass(frozen=True)
class Turn:
    """Channels that can be turned together.

    Attributes:
        name: the first parameter that is written in their basis.
        size: how many channels.
        ones: the vector of ones must stay as it is.
        parts: everything that is written in their basis.
        taken: what has to be taken over before.
    """

    name: str
    size: int
    ones: bool
    parts: tuple[Part, ...]
    taken: tuple[Taken, ...]


@dataclass(frozen=True)
class Turns:
    """What a model allows.

    Attributes:
        stream: hidden states that go from block to block; none if they cannot be turned, several if only factors of them can.
        why: why not.
        others: everything else that weights read and that can be turned, such as the values of attention, head by head.
        whole: (parameter, axis) all of whose channels are in a basis that can be turned.
        untied: parameters that share their numbers with another one, which is stored, and must not any more.
    """

    stream: tuple[Turn, ...]
    why: str
    others: tuple[Turn, ...]
    whole: frozenset[tuple[str, int]]
    untied: tuple[str, ...]


@dataclass(frozen=True)
class _Use:
    """A weight whose axis `of` was summed over with an input of that gain."""

    param: str
    axis: Axis
    gain: Gain | None
    bias: str | None


class _Follower(TorchDispatchMode):
    """Knows the value of every tensor."""

    def __init__(self, params: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._values: Any = WeakTensorKeyDictionary()
        self.params: dict[str, Value] = {}
        self.uses: list[_Use] = []
        self.used: set[str] = set()
        for name, param in params.items():
            axes = tuple(Axis((Basis(n),) if n > 1 else (), of=i) for i, n in enumerate(param.shape))
            self.params[name] = self._values[param] = Value(axes, name)
        for name, buffer in buffers.items():
            self._values[buffer] = Value.fixed(buffer.shape, f"the buffer {name} is a part of it")
        self.touched: set[str] = set()

    def value(self, tensor: torch.Tensor) -> Value:
        if tensor not in self._values:
            self._values[tensor] = Value.fixed(tensor.shape, "numbers that the model computes itself are a part of it")
        found: Value = self._values[tensor]
        if found.param:
            self.touched.add(found.param)
        return found

    def contracted(self, param: str, axis: Axis, gain: Gain | None, bias: str | None) -> None:
        if gain and axis.of is None:
            axis.fix(f"what it reads is multiplied by {gain.weight}")
        self.uses.append(_Use(param, axis, gain, bias))

    def produced(self, param: str, axis: Axis) -> None:
        self.used.add(param)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = compute(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if not results:
            return result
        for tensor, value in zip(results, self._ruled(name, result, args, kwargs, tensors, results), strict=True):
            self._values[tensor] = value
        return result

    def _ruled(self, name: str, result: Any, args: Any, kwargs: Any, tensors: Any, results: Any) -> Sequence[Value]:
        """What the operator's rule says; the least that can be said where it is called in a way that its rule does not know."""
        given: Any = None
        if name in RULES:
            with contextlib.suppress(AttributeError, TypeError, LookupError):
                given = RULES[name](self, name, result, *args, **kwargs)
        values = [given] if isinstance(given, Value) else list(given or ())
        if [v.shape for v in values] != [list(t.shape) for t in results]:
            return otherwise(self, name, tensors, results)
        return values


_KNOWN: WeakKeyDictionary[Any, Turns] = WeakKeyDictionary()


def find_turns(source: OnDisk | InMemory, inputs: Inputs | None = None) -> Turns:
    """What of a model can be turned.

    Args:
        source: a model; none of its weights is read.
        inputs: what to call it with. Default: token ids, images or sound of the sizes that its config gives.

    Raises:
        SchemeError: the model does not run.
    """
    if inputs is not None:
        return _find(source, inputs)
    if source not in _KNOWN:
        _KNOWN[source] = _find(source, source.example if isinstance(source, InMemory) else None)
    return _KNOWN[source]


@torch.no_grad()
def _find(source: OnDisk | InMemory, given: Inputs | None = None) -> Turns:
    skeleton = Skeleton(source.model)
    model, params = skeleton.model, _apart(skeleton)
    follower = _Follower(params, dict(model.named_buffers()))
    entered: list[Value] = []
    blocks: Any = model.get_submodule(source.units) if source.units else None
    if blocks is not None:
        blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(follower.value(_hidden(args, kwargs))), with_kwargs=True
        )
    first: Exception | None = None
    ran = False
    for inputs in skeleton.inputs() if given is None else [given]:
        if ran and all(follower.touched & set(source.names.names_of(n)) for n in params):
            break
        try:
            with _seeded(), sdpa_kernel(SDPBackend.MATH), follower:
                output = model(*inputs.args, **inputs.kwargs)
        except Exception as error:  # it wants other inputs, and says so in its own way
            first = first or error
            continue
        ran = True
        for tensor in tensors_of([output, getattr(output, "__dict__", {})]):
            follower.value(tensor).fix("it is what the model gives")
    if not ran:
        raise SchemeError(
            f"The model does not run on inputs made up from its config ({said(first) if first else 'it has none'}), so what can be rotated is not known. Leave rotate out."
        )
    _see_siblings(source, follower)
    stream = entered[0].axes[-1] if entered else _embedded(model, follower)
    unseen = next((n for n in params if not follower.touched & set(source.names.names_of(n))), None)
    if unseen is not None:
        stream.fix(f"no input that was tried reaches {unseen}, which may write to it")
    return _solved(source, follower, stream)


def _hidden(args: Any, kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _embedded(model: Any, follower: _Follower) -> Axis:
    """Without blocks: what token ids are turned into."""
    weight = model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else None
    return Axis() if weight is None else follower.value(weight).axes[-1]


def _apart(skeleton: Skeleton) -> dict[str, torch.Tensor]:
    """The parameters by all their names; those that are tied are made several."""
    params: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            path, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(parameter.clone(), requires_grad=False)
            skeleton.model.get_submodule(path)._parameters[leaf] = parameter
        seen.add(id(parameter))
        params[name] = parameter
    return params


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _see_siblings(source: OnDisk | InMemory, follower: _Follower) -> None:
    """Members of a list inside a block that were not reached (experts) are what those are that were."""
    for name in [n for n in follower.params if n not in follower.touched]:
        start = f"{source.units}."
        inside = name.removeprefix(start).partition(".")[2] if source.units and name.startswith(start) else name
        path = [
            i for i, word in enumerate(name.split(".")) if word.isdigit() and i >= name.count(".") - inside.count(".")
        ]
        for place in path[::-1]:
            other = next((o for o in sorted(follower.touched) if _differ_at(name, o, place)), None)
            if other is None or follower.params[other].shape != follower.params[name].shape:
                continue
            for mine, theirs in zip(follower.params[name].axes, follower.params[other].axes, strict=True):
                unify(mine.bases, theirs.bases, "experts that are not alike")
            number = name.split(".")[place]
            for use in [u for u in follower.uses if u.param == other]:
                bias = use.bias and ".".join(number if i == place else w for i, w in enumerate(use.bias.split(".")))
                own = next((a for a in follower.params[name].axes if a.of == use.axis.of), use.axis)
                follower.uses.append(_Use(name, own, use.gain, bias))
            follower.touched.add(name)
            break


def _differ_at(one: str, two: str, place: int) -> bool:
    """Whether two names are the same but for one number."""
    a, b = one.split("."), two.split(".")
    return len(a) == len(b) and b[place].isdigit() and a[:place] == b[:place] and a[place + 1 :] == b[place + 1 :]


# ── what came out ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _solved(source: OnDisk | InMemory, follower: _Follower, stream: Axis) -> Turns:
    taken = _taken(follower)
    read = {id(f.root) for use in follower.uses for b in _leaves(use.axis.bases) for f in [b]}
    parts: dict[int, list[Part]] = {}
    bases: dict[int, Basis] = {}
    for name, value in follower.params.items():
        for i, axis in enumerate(value.axes):
            for basis, channels in _channels(axis.bases):
                bases[id(basis)] = basis
                parts.setdefault(id(basis), []).append(Part(name, i, channels))
    own = {id(b) for b in _leaves(stream.bases)}
    turns: list[tuple[bool, Turn]] = []
    turned = {key: basis for key, basis in bases.items() if not basis.fixed and key in read and basis.size > 1}
    for key, basis in turned.items():
        gains = tuple(t for t, roots in taken if key in roots())
        turns.append((key in own, Turn(parts[key][0].param, basis.size, basis.ones, tuple(parts[key]), gains)))
    why = next((b.fixed for b in _leaves(stream.bases) if b.fixed), "")
    if not own & read:
        why = why or "no weight reads it"
    places = [
        (name, i, axis) for name, value in follower.params.items() for i, axis in enumerate(value.axes) if axis.bases
    ]
    whole = frozenset((n, i) for n, i, axis in places if {id(b) for b in _leaves(axis.bases)} <= turned.keys())
    mine, others = (tuple(t for own, t in turns if own is one) for one in (True, False))
    return Turns(mine, why, others, whole, _untied(source, [*mine, *others]))


def _taken(follower: _Follower) -> list[tuple[Taken, Any]]:
    """Gains with their readers, and the bases that they stand on; bases are fixed where a gain cannot be taken over."""
    gains: dict[Gain, list[_Use]] = {}
    places: dict[tuple[str, int | None], set[Gain | None]] = {}
    for use in follower.uses:
        places.setdefault((use.param, use.axis.of), set()).add(use.gain)
        if use.gain:
            gains.setdefault(use.gain, []).append(use)
    for use in follower.uses:
        own = places[use.param, use.axis.of]
        gain = next((g for g in own if g), None)
        if gain and (len(own) > 1 or {gain.weight, gain.bias} & follower.used):
            use.axis.fix(f"{use.param} reads more than what {gain.weight} multiplies")
    for one in gains:  # a weight of norms that are not the same
        if any(o != one and {o.weight, o.bias} & {one.weight, one.bias or ""} for o in gains):
            for use in gains[one]:
                use.axis.fix(f"{one.weight} is used in several ways")
    found = []
    for gain, uses in gains.items():
        readers = {(u.param, int(u.axis.of or 0)): u.bias for u in uses}
        taken = Taken(gain, tuple(readers), tuple(readers.values()))
        found.append((taken, lambda uses=uses: {id(b) for u in uses for b in _leaves(u.axis.bases)}))
    return found


def _leaves(bases: Any) -> Iterator[Basis]:
    for basis in bases:
        root = basis.root
        yield from _leaves(root.parts) if root.parts else (root,)


def _channels(bases: Any) -> list[tuple[Basis, torch.Tensor]]:
    """Every basis in a product of bases, and the indices (times, size) that are written in it."""
    sizes = [b.size for b in bases]
    found = []
    for i, basis in enumerate(bases):
        before = torch.arange(math.prod(sizes[:i])) * math.prod(sizes[i:])
        inner = math.prod(sizes[i + 1 :])
        for leaf, own in _inside(basis.root):
            places = before[:, None, None, None] + own[None, None] * inner + torch.arange(inner)[None, :, None, None]
            found.append((leaf, places.reshape(-1, leaf.size)))
    return found


def _inside(root: Basis) -> list[tuple[Basis, torch.Tensor]]:
    if not root.parts:
        return [(root, torch.arange(root.size)[None])]
    if not root.pieces:
        return _channels(root.parts)
    found, start = [], 0
    for part in root.parts:
        found += [(leaf, own + start) for leaf, own in _inside(part.root)]
        start += part.size
    return found


def _untied(source: OnDisk | InMemory, turns: list[Turn]) -> tuple[str, ...]:
    """Names of tied parameters of which one is changed in another way than the stored one."""
    done: dict[str, list[Any]] = {}
    for number, turn in enumerate(turns):
        for part in turn.parts:
            done.setdefault(part.param, []).append((number, part.axis))
        for taken in turn.taken:
            for param, axis in taken.readers:
                done.setdefault(param, []).append((taken.gain, axis))
    found = []
    for aliases in source.names.aliases.values():
        stored = next((n for n in aliases if n in source.names.group_of), aliases[0])
        found += [n for n in aliases if n != stored and done.get(n) != done.get(stored)]
    return tuple(found)
