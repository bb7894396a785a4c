"""What running a model's units once says of their weights: `probe`, with made-up weights.

No file is read: parameters are random numbers, a stack is one matrix seen many times, and an embedding gives random
rows. One unit of every structure is run, on a few tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from arrondi.errors import ArrondiError
from arrondi.model.chain import REFUSALS, Chain, Inputs
from arrondi.model.flow import rows_on_two_axes, trace
from arrondi.model.instance import Instance, Origin
from arrondi.model.shapes import facts_by_shapes
from arrondi.model.site import Facts, is_stack

_TOKENS = 8
_REPEATED = 1 << 16
"""Random numbers of which weights are made."""


class _MadeUp(Instance):
    """An instance whose weights are random."""

    weightless = False
    """Parameters are zeros that take no memory."""

    def _values(self, param: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        empty = self.empty[param]
        if self.weightless:
            return {param: torch.zeros((1,) * empty.ndim).expand(empty.shape)}
        module = self.model.get_submodule(param.rpartition(".")[0])
        if is_stack(module, empty):
            return {param: _random(empty.shape[1:], empty.dtype).expand(empty.shape)}
        return {param: _random(empty.shape, empty.dtype)}

    def _assign(self, param: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        for name in self.names.names_of(param):
            module, leaf = self._owner(name)
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)


def probe(source: Origin, lists: Sequence[str]) -> tuple[str, Facts]:
    """Which list of blocks runs on token ids, and what its weights do.

    Args:
        lists: names of the lists that may be the units, the likeliest first.

    Returns:
        the name of the list, the likeliest where none runs on token ids alone, "" where the model changes weights as it runs;
        routers, weights that are read otherwise than in
        products, and the orientation of stacks, as far as anything could be run. What runs on no ids is run on shapes.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        for name in lists:
            with contextlib.suppress(ArrondiError, *REFUSALS):  # other inputs are wanted, or blocks are not run
                facts = _observe(Chain(_MadeUp(source), name))
                return ("" if any(_in_place(how) for how in facts.bare.values()) else name), facts
    finally:
        torch.random.set_rng_state(state)
    return (lists[0] if lists else ""), facts_by_shapes(source.model)


def _observe(chain: Chain) -> Facts:
    model = chain.model
    handles = [_look_up(m) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    size = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 1000)
    ids = torch.randint(0, size, (1, _TOKENS))
    routers: set[str] = set()
    bare: dict[str, str] = {}
    flipped: set[str] = set()
    leaders: dict[str, str] = {}
    beside: dict[str, str] = {}
    reshaped: set[str] = set()
    with contextlib.ExitStack() as undo, torch.no_grad():
        for handle in handles:
            undo.callback(handle)
        entered: list[Any] = []
        everything = {n: chain.instance.parameter(n) for n in chain.instance.empty}
        chain.strict = False
        with chain.outer_loaded():
            before = trace(model, everything, lambda: entered.append(chain.begin(Inputs.of(ids))))
        hidden, calls = entered[0]
        # What the model does to the weights of blocks before these run; all else is seen in the blocks.
        bare |= {n: how for n, how in before.bare.items() if n.startswith(f"{chain.prefix}.") and _in_place(how)}
        reshaped |= before.reshaped
        seen: set[Any] = set()
        for i, block in enumerate(chain.blocks):
            structure = (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters()))
            if structure in seen:
                continue
            seen.add(structure)
            chain.fill(i)
            params = {n: chain.instance.parameter(n) for n in chain.params(i)}
            flow = trace(block, params, partial(chain.call, i, hidden.clone(), calls[i].filled(chain.likely)))
            chain.drop(i)
            own = f"{chain.prefix}.{i}."
            like = _others(chain, i, structure)
            routers |= {p + n.removeprefix(own) for n in flow.routers for p in like}
            bare |= {p + n.removeprefix(own): how for n, how in flow.bare.items() for p in like}
            reshaped |= {p + n.removeprefix(own) for n in flow.reshaped for p in like}
            beside |= {p + n.removeprefix(own): how for n, how in flow.beside.items() for p in like}
            leaders |= {p + n.removeprefix(own): p + leader.removeprefix(own) for s in flow.stages for n, leader in s.leaders.items() for p in like}  # fmt: skip
            flipped |= {p + u.param.removeprefix(own) for u in flow.uses if u.matrix is not None and not u.reduces_last for p in like}  # fmt: skip
        unreached: frozenset[str] = frozenset()
        with contextlib.suppress(*REFUSALS):  # what follows the blocks may need more than shapes
            unreached, outside = _called(chain, Inputs.of(ids), hidden)
            reshaped |= outside
    return Facts(frozenset(routers), bare, frozenset(flipped), unreached, leaders, frozenset(reshaped), beside)


def _called(chain: Chain, inputs: Inputs, hidden: torch.Tensor) -> tuple[frozenset[str], frozenset[str]]:
    """Of the parameters outside the blocks: those of modules that the model does not call on token ids (towers for images
    and sound), and those of linear layers whose input does not come as (windows, tokens, n)."""
    called: dict[str, bool] = {}

    def note(name: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        called[name] = (
            isinstance(module, torch.nn.Linear) and isinstance(args[0], torch.Tensor) and not rows_on_two_axes(args[0])
        )

    handles = []
    with contextlib.ExitStack() as undo:
        for name, module in chain.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args)))
            if isinstance(module, torch.nn.Linear) and not name.startswith(f"{chain.prefix}."):
                undo.callback(setattr, module, "forward", module.forward)
                setattr(module, "forward", _blank(module.out_features))  # noqa: B010
        for handle in handles:
            undo.callback(handle.remove)
        assert isinstance(chain.instance, _MadeUp)
        chain.instance.weightless = True
        with chain.outer_loaded():
            chain.finish(inputs, hidden)
    owners = {n: n.rpartition(".")[0] for n in chain.instance.empty if not n.startswith(f"{chain.prefix}.")}
    unreached = frozenset(n for n, owner in owners.items() if owner not in called)
    return unreached, frozenset(n for n, owner in owners.items() if called.get(owner))


def _blank(size: int) -> Any:
    """The forward of a linear layer of which only the shape counts."""
    return lambda x: x.new_zeros(1).expand(*x.shape[:-1], size)


def _in_place(how: str) -> bool:
    """Whether a weight is changed by the operation that was seen."""
    return how.partition(" ")[0].endswith("_")


def _others(chain: Chain, i: int, structure: Any) -> list[str]:
    """The starts of the names of all blocks of the same structure."""
    return [
        f"{chain.prefix}.{j}."
        for j, block in enumerate(chain.blocks)
        if (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters())) == structure
    ]


def _look_up(module: Any) -> Any:
    """Make an embedding give random rows, without its weight; returns what undoes it."""
    forward, kept = module.forward, module._parameters["weight"]

    def rows(*args: Any, **kwargs: Any) -> torch.Tensor:
        """As many rows as the first tensor has numbers: ids, or of tables of positions the mask. One that gets no tensor gives zeros."""
        ids = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
        if ids is None:
            return forward(*args, **kwargs)
        return torch.randn(*ids.shape, module.embedding_dim, dtype=kept.dtype)

    module.forward = rows
    module._parameters["weight"] = torch.nn.Parameter(torch.zeros(1, 1).expand(kept.shape), requires_grad=False)

    def undo() -> None:
        module.forward, module._parameters["weight"] = forward, kept

    return undo


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    size = math.prod(shape)
    few = torch.randn(min(size, _REPEATED)).mul_(0.02).to(dtype)
    return few.repeat(-(-size // _REPEATED))[:size].reshape(shape)
