"""Whether a block has a fused form: `recognize`.

The block's own forward is run on symbols (`arrondi.runtime.symbols`), once for every way in which transformers calls it:
with and without a mask, a cache, positions, and by the names of both attention functions. All graphs must match the pattern, and be
the same. Numbers are never compared.

What a trial cannot see is a decision on the exact type of an argument (`type(x) is`) or on state outside the block; for the latter,
modules, hooks and settings that say something at call time, see `FusedBlock._takes`.

The trial runs on a shadow of the block: modules of the same classes with the same attributes, symbols in the place of parameters, and
linear layers that only write down that they were called.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arrondi.nn import QLinear
from arrondi.runtime.attention import IMPLEMENTATIONS
from arrondi.runtime.operators import OPERATORS
from arrondi.runtime.pattern import Differs, Pattern, match
from arrondi.runtime.symbols import Graph, Length, Met, Node, Opaque, Symbol

ARGUMENTS: Final = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings")
"""Besides the hidden states: what a fused block is called with."""
_WIDEST: Final = 256
"""Of a head, for which the rotary kernel has registers."""
_PASSED: Final = ("position_ids", "use_cache")
"""Arguments that a block may hand on to the attention function."""
_ONE_AT_A_TIME: Final = threading.Lock()
"""For trials, in which the table of attention functions is another one."""
_BATCH, _TOKENS, _CACHED = Length("number of sequences"), Length("number of tokens"), Length("number of cached tokens")
_SHARED = Length("number of sequences", or_one=True)
_ROTARY = Length("width of the rotary positions", fits=True)


def recognize(block: nn.Module) -> tuple[Pattern, int]:
    """The parts of a block, and the number of its layer in the cache.

    Raises:
        Differs: it computes something else than the pattern, or its layers cannot be called together.
    """
    _plain(block)
    dtype = _common_dtype(block)
    config = _one_config(block)
    found = []
    for implementation in IMPLEMENTATIONS:
        config = copy.deepcopy(config)
        config._attn_implementation = implementation
        for masked, cached, placed in itertools.product((True, False), repeat=3):
            found.append(_called(block, config, dtype, masked=masked, cached=cached, placed=placed))
    layers = {layer for _, layer in found if layer is not None}
    pattern = found[0][0]
    if any(other != pattern for other, _ in found) or len(layers) != 1:
        raise Differs("It computes something else with a mask, a cache or positions than without.")
    _consumed(block, pattern)
    if pattern.width % 2 or pattern.width > _WIDEST:
        raise Differs(f"Its heads are {pattern.width} wide; even widths up to {_WIDEST} are known.")
    (layer,) = layers
    return pattern, layer


def _plain(block: nn.Module) -> None:
    """No hooks, no replaced forwards."""
    for module in block.modules():
        if "forward" in vars(module):
            raise Differs(f"The forward of its {type(module).__name__} was replaced.")
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise Differs(f"Its {type(module).__name__} has hooks.")


def _common_dtype(block: nn.Module) -> torch.dtype:
    dtypes = {m.meta.dtype for m in block.modules() if isinstance(m, QLinear)}
    if len(dtypes) > 1:
        raise Differs("Its linear layers compute in different types.")
    if not dtypes <= {torch.float32, torch.bfloat16}:
        raise Differs("Its linear layers compute in float16; float32 and bfloat16 are known.")
    return dtypes.pop()


def _one_config(block: nn.Module) -> Any:
    configs = {id(c): c for m in block.modules() for c in vars(m).values() if isinstance(c, PreTrainedConfig)}
    if len(configs) != 1:
        raise Differs(f"Its parts hold {len(configs)} configs, of which one would name the attention function.")
    (config,) = configs.values()
    if config._attn_implementation not in IMPLEMENTATIONS:
        raise Differs(f"Its attention is {config._attn_implementation}; known are {' and '.join(IMPLEMENTATIONS)}.")
    return config


def _consumed(block: nn.Module, pattern: Pattern) -> None:
    """Every parameter and buffer is part of the pattern."""
    inside = [f"{name}." for name in pattern.linears]
    left = [
        name
        for name, _ in itertools.chain(block.named_parameters(), block.named_buffers())
        if not name.startswith(tuple(inside)) and name not in {norm.weight for norm in pattern.norms}
    ]
    if left:
        raise Differs(f"It holds {', '.join(sorted(left))}, which the usual block has not.")


def _called(block: nn.Module, config: Any, dtype: torch.dtype, **given: bool) -> tuple[Pattern, int | None]:
    """What one way of calling the block computes.

    Raises:
        Differs: whatever happens.
    """
    try:
        with _ONE_AT_A_TIME:
            return _trace(block, config, dtype, **given)
    except Met as met:
        raise Differs(f"Its forward meets {met}.") from None
    except Differs:
        raise
    except Exception as error:
        raise Differs(f"Its forward, called as that of a usual block, raises {type(error).__name__}.") from error


def _trace(
    block: nn.Module, config: Any, dtype: torch.dtype, *, masked: bool, cached: bool, placed: bool
) -> tuple[Pattern, int | None]:
    graph = Graph(dtype, OPERATORS)
    shadow, paths = _shadow(block, graph, config)
    cache = _Cache(graph) if cached else None
    arguments: dict[str, Any] = {
        "attention_mask": Opaque("the mask") if masked else None,
        "position_ids": Opaque("the positions") if placed else None,
        "past_key_values": cache,
        "use_cache": Opaque("use_cache"),
        "position_embeddings": tuple(graph.symbol(name, (_SHARED, _TOKENS, _ROTARY)) for name in ("cosines", "sines")),
    }
    size = next(m for m in block.modules() if isinstance(m, QLinear)).in_features
    before = _held(shadow)
    with torch.no_grad(), _recorded_attention(graph, paths, arguments, config._attn_implementation) as calls:
        result = shadow(graph.symbol("input", (_BATCH, _TOKENS, size)), **_accepted(block, arguments))
    if _held(shadow) != before:
        raise Differs("It keeps something from one call to the next.")
    if type(result) is not Symbol or result.dtype is not dtype:
        raise Differs("Its forward gives something else than hidden states.")
    return match(result.node, [] if cache is None else cache.updates, calls)


def _held(block: nn.Module) -> list[tuple[str, int]]:
    """What the modules hold, by identity, and how much is in their lists and tables."""
    entries = [entry for module in block.modules() for entry in vars(module).items()]
    sizes = [(name, len(value)) for name, value in entries if isinstance(value, (list, dict, set))]
    return [(name, id(value)) for name, value in entries] + sizes


def _accepted(block: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(type(block).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _shadow(block: nn.Module, graph: Graph, config: Any) -> tuple[nn.Module, dict[int, str]]:
    """The block with symbols for its parameters, and the names of its modules by their identity."""
    made: dict[nn.Module, nn.Module] = {}
    paths: dict[int, str] = {}
    for name, module in block.named_modules():
        made[module] = shadow = object.__new__(type(module))
        vars(shadow).update({k: config if isinstance(v, PreTrainedConfig) else v for k, v in vars(module).items()})
        vars(shadow).update(
            training=False,
            _parameters=_symbols(graph, "parameter", name, module._parameters),
            _buffers=_symbols(graph, "buffer", name, module._buffers),
        )
        if isinstance(module, (QLinear, nn.Linear)):
            vars(shadow)["forward"] = functools.partial(_linear, graph, name, module)
        paths[id(shadow)] = name
    for module, shadow in made.items():
        shadow._modules = {name: None if m is None else made[m] for name, m in module._modules.items()}
    return made[block], paths


def _symbols(graph: Graph, kind: str, module: str, tensors: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{module}." if module else ""
    return {
        name: None if t is None else graph.symbol(kind, tuple(t.shape), prefix + name, dtype=t.dtype)
        for name, t in tensors.items()
    }


def _linear(graph: Graph, name: str, layer: Any, x: Any) -> Symbol:
    if not isinstance(layer, QLinear):
        raise Met(f"a linear layer that is not quantized, {name}")
    if type(x) is not Symbol or x.shape[-1:] != (layer.in_features,):
        raise Met(f"a call of {name} with something else than (…, {layer.in_features})")
    return graph.symbol("linear", (*x.shape[:-1], layer.out_features), name, x.node, dtype=x.dtype)


class _Cache(Opaque):
    """A cache of which only `update` is known."""

    graph: Graph
    updates: list[Node]

    def __init__(self, graph: Graph) -> None:
        super().__init__("the cache")
        self.__dict__.update(graph=graph, updates=[])

    def update(self, key: Symbol, value: Symbol, layer: int, *others: Any, **named: Any) -> tuple[Symbol, Symbol]:
        if others or named or type(layer) is not int:
            raise Met("an update of the cache with more than keys, values and the number of the layer")
        node: Node = self.graph.node("update", key.node, value.node, layer)
        self.updates.append(node)
        keys, values = (
            self.graph.symbol(name, (*states.shape[:2], _CACHED, states.shape[3]), node)
            for name, states in (("cached keys", key), ("cached values", value))
        )
        return keys, values


@contextmanager
def _recorded_attention(
    graph: Graph, paths: dict[int, str], arguments: dict[str, Any], implementation: str
) -> Iterator[list[Node]]:
    """Calls of the attention function with symbols are written down inside."""
    calls: list[Node] = []
    real = ALL_ATTENTION_FUNCTIONS[implementation]

    def record(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        if type(query) is not Symbol:  # of another thread
            return real(module, query, key, value, attention_mask, **options)
        if attention_mask is not arguments["attention_mask"]:
            raise Met("a call of attention with another mask than that of the block")
        if any(t.dtype is not graph.dtype for t in (query, key, value)):
            raise Met("attention in another type than that of the model")
        passed = [name for name in _PASSED if name in options and options[name] is arguments[name]]
        constants = tuple(sorted((n, o) for n, o in options.items() if n not in passed))
        for name, option in constants:
            if type(option) not in (bool, int, float, str, type(None)):
                raise Met(f"a call of attention with {name}")
        nodes = (query.node, key.node, value.node)
        calls.append(graph.node("attention", paths[id(module)], *nodes, constants, tuple(sorted(passed))))
        batch, heads, length, _ = query.shape
        return Symbol(graph, calls[-1], (batch, length, heads, value.shape[3]), graph.dtype), None

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    ALL_ATTENTION_FUNCTIONS[implementation] = record
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)
