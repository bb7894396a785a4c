"""The units of a model, run one at a time: `Chain`.

How the model calls its blocks is found by running it: `begin` runs everything before the first block and records how each block is
called for this batch, `run` runs one block, `finish` everything after the last. Only one block's weights need to be in memory.
Recorded arguments belong to one batch of one model and serve no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from arrondi.errors import ArrondiError, SchemeError
from arrondi.model.flow_routers import tensors_of
from arrondi.model.handed import Handed, StandIns, filled, leaves
from arrondi.model.instance import Instance
from arrondi.model.unloaded import NotLoaded, Unloaded

REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)
"""What models raise that want other inputs."""


class _Stop(Exception):
    """Raised inside a forward pass when all that was wanted has been seen."""


@dataclass(frozen=True)
class Inputs:
    """How the whole model is called on one batch."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A tensor, a tuple of them, or a mapping of keyword arguments; token ids are given by name."""
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, torch.Tensor):
            return cls((), {"input_ids": batch}) if batch.dtype in (torch.int32, torch.int64) else cls((batch,))
        if isinstance(batch, (tuple, list)):
            return cls(tuple(batch))
        return cls((), dict(batch))


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden states, which go first or under `key`.

    What an earlier block hands to this one is named, and has to be filled in.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None

    def filled(self, give: Callable[[Handed], Any]) -> Call:
        """The same call with what earlier blocks have handed on."""
        return Call(filled(self.args, give), filled(self.kwargs, give), self.key)


class Chain:
    """The blocks of an instance.

    Attributes:
        instance: model and weights.
        prefix: name of the block list, for example `model.layers`.
        early: parameters that are used before the first block; known after `begin`.
        strict: a model that computes with weights of blocks outside of them is refused. A probe looks at what it does instead.
    """

    def __init__(self, instance: Instance, prefix: str) -> None:
        self.instance, self.model, self.prefix = instance, instance.model, prefix
        members: Any = self.model.get_submodule(prefix)
        self.blocks: list[Any] = list(members)
        self.early: set[str] = set()
        self.strict = True
        self._forward = [block.forward for block in self.blocks]
        self._returned: dict[type, tuple[Any, ...] | None] = {}
        self._outer = [n for n in instance.empty if self._is_outer(n)]
        self._at_once = False
        self._skipped: set[str] = set()
        self._entering = self._past_blocks = False

    def __len__(self) -> int:
        return len(self.blocks)

    def params(self, i: int) -> list[str]:
        """Names of the parameters of block i."""
        start = f"{self.prefix}.{i}."
        return [n for n in self.instance.empty if n.startswith(start)]

    def fill(self, i: int) -> None:
        """Load block i."""
        self.instance.fill(self.params(i))
        self.instance.put_added(lambda name: name.startswith(f"{self.prefix}.{i}."))

    def drop(self, i: int) -> None:
        """Release block i."""
        self.instance.drop(self.params(i))
        self.instance.drop_added(lambda name: name.startswith(f"{self.prefix}.{i}."))

    @torch.no_grad()
    def begin(self, inputs: Inputs) -> tuple[torch.Tensor, list[Call]]:
        """Run all that comes before the first block. Call it inside `outer_loaded`, while no block is filled.

        Returns:
            the hidden states that enter the first block, and how each block is called.

        Raises:
            SchemeError: the model does not run on these inputs, or not as a chain.
        """
        calls: list[Call] = []
        entered: list[torch.Tensor] = []
        stand_ins = StandIns()

        def recorder(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call, hidden = _split(args, kwargs)
                if i != len(calls):
                    raise SchemeError(f"The blocks {self.prefix}.* are not run once each in order.")
                calls.append(Call(stand_ins.marked(call.args), stand_ins.marked(call.kwargs), call.key))
                if not entered:
                    entered.append(hidden.clone())
                    self._entering = False
                if type(self.blocks[i]) not in self._returned:
                    self._learn(i, args, kwargs, hidden)
                self._past_blocks = i + 1 == len(self.blocks)  # the next module outside ends it
                return self._as_returned(i, hidden, stand_ins)

            return forward

        self._entering = True
        self._look_up_again()
        try:
            with self._replaced(recorder), contextlib.suppress(_Stop):
                self._forward_pass(inputs, calls.clear)
        except ArrondiError:
            raise
        except REFUSALS as error:
            raise SchemeError(f"The model does not run on this data ({said(error)}).") from error
        finally:
            self._past_blocks = self._entering = False
        if len(calls) < len(self.blocks):
            raise SchemeError(f"The model does not run all blocks {self.prefix}.* on this data.")
        return entered[0], calls

    def _learn(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> None:
        """What a block of this class returns: it is run once, on copies of what must not change."""
        self.fill(i)
        output = self._forward[i](*copied(args), **copied(kwargs))
        hidden_of(output, hidden)
        self._returned[type(self.blocks[i])] = rest_of(output)
        self.drop(i)

    def _as_returned(self, i: int, hidden: torch.Tensor, stand_ins: StandIns) -> Any:
        """Hidden states in the structure that block i returns."""
        rest = self._returned[type(self.blocks[i])]
        return hidden if rest is None else (hidden, *stand_ins.of(i, rest))

    def likely(self, which: Handed) -> torch.Tensor:
        """A tensor like one that a block hands on: what the first block of its class returned."""
        return leaves(self._returned[type(self.blocks[which.block])])[which.number]

    def run(
        self, i: int, hidden: torch.Tensor, call: Call, *, bfloat16: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states after block i, whose weights must be filled, in the type in which they came; with bfloat16 products if asked. And what else it returns."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bfloat16):
            output = self.call(i, hidden.clone(), call)
            return hidden_of(output, hidden).to(hidden.dtype), leaves(rest_of(output))

    def call(self, i: int, hidden: torch.Tensor, call: Call) -> Any:
        """Block i as the model calls it."""
        if call.key is not None:
            return self._forward[i](*call.args, **{**call.kwargs, call.key: hidden})
        return self._forward[i](hidden, *call.args, **call.kwargs)

    def finish(self, inputs: Inputs, hidden: torch.Tensor) -> torch.Tensor:
        """What follows the last block: logits, or the last hidden state of an encoder. Call it inside `outer_loaded`."""

        stand_ins = StandIns()

        def passing(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                own = _split(args, kwargs)[1]
                return self._as_returned(i, hidden if i + 1 == len(self.blocks) else own, stand_ins)

            return forward

        self._skip_look_ups()
        with self._replaced(passing):
            return result_of(self._forward_pass(inputs))

    def _skip_look_ups(self) -> None:
        """What went into the blocks does not matter at the end: embeddings that are not loaded give zeros, without their weights."""
        for name in self.early:
            if isinstance(
                self.model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding
            ) and self.instance.is_empty(name):
                zero = torch.zeros(1, self.instance.empty[name].shape[1], device=self.instance.device)
                self.instance.hold(name, torch.nn.Parameter(zero.expand(self.instance.empty[name].shape), False))
                self._skipped.add(name)

    def _look_up_again(self) -> None:
        for name in self._skipped:
            self.instance.hold(name, self.instance.empty[name])
        self._skipped.clear()

    @torch.no_grad()
    def whole(self, inputs: Inputs, see: Callable[[int, tuple[Any, ...], dict[str, Any], Any], None]) -> torch.Tensor:
        """The model's own forward pass, each block filled only while it runs.

        Args:
            see: called with (block, args, kwargs, output) after each block, while it is filled; the arguments are copies.
        """

        def filling(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if i == 0 and not self._at_once:
                    self.instance.drop(self.early)  # what is needed again is loaded again
                self.fill(i)
                before = copied(args), copied(kwargs)
                output = self._forward[i](*args, **kwargs)
                see(i, *before, output)
                self.drop(i)
                return output

            return forward

        self._look_up_again()
        with self.outer_loaded(), self._replaced(filling):
            return result_of(self._forward_pass(inputs))

    def _forward_pass(self, inputs: Inputs, before_again: Callable[[], None] = lambda: None) -> Any:
        """The model on a batch. One that reaches into the weights of modules that it does not call gets all at once.

        Raises:
            SchemeError: it reaches into the weights of blocks.
        """
        try:
            with Unloaded(self.instance.device) if self.strict else contextlib.nullcontext():
                if not self._at_once:
                    with contextlib.suppress(NotLoaded):
                        return self.model(*copied(inputs.args), **copied(inputs.kwargs))
                    self._at_once = True
                    self.instance.fill(self._outer)
                    before_again()
                return self.model(*copied(inputs.args), **copied(inputs.kwargs))
        except NotLoaded as error:
            raise SchemeError(
                f"The model computes with weights of {self.prefix}.* outside of them ({error})."
            ) from error

    @contextlib.contextmanager
    def _replaced(self, factory: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        for i, block in enumerate(self.blocks):
            block.forward = factory(i)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, self._forward, strict=True):
                del block.forward
                if block.forward != forward:  # it had one of its own, beside that of its class
                    block.forward = forward

    @contextlib.contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """Inside, modules outside the blocks load their own weights when they are called; all are released at the end."""
        handles = []
        self.instance.put_added(self._is_outer)
        if self._at_once:
            self.instance.fill(self._outer)
        for name, module in self.model.named_modules():
            if name == self.prefix or name.startswith(f"{self.prefix}."):
                continue
            own = [f"{name}.{leaf}".lstrip(".") for leaf in module._parameters if module._parameters[leaf] is not None]
            if own:
                handles.append(module.register_forward_pre_hook(self._filler(own)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.instance.drop(self._outer)
            self.instance.drop_added(self._is_outer)

    def _is_outer(self, name: str) -> bool:
        return not name.startswith(f"{self.prefix}.")

    def _filler(self, own: list[str]) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if self._past_blocks:
                raise _Stop
            if self._entering:
                self.early.update(own)
            self.instance.fill(own)

        return hook


def result_of(output: Any) -> torch.Tensor:
    """What a model computes: its logits, or the first tensor that it returns.

    Raises:
        SchemeError: there is none.
    """
    logits = getattr(output, "logits", None)
    parts = [output if logits is None else logits, getattr(output, "__dict__", {})]
    found = next(iter(tensors_of(parts)), None)
    if found is None:
        raise SchemeError(f"The model returns {type(output).__name__}, in which there is no tensor.")
    return found


def model_output(instance: Instance, inputs: Inputs) -> torch.Tensor:
    """What a model that is filled as a whole computes, float32; gradients are recorded where they are wanted."""
    inputs = moved(inputs, instance.device)
    return result_of(instance.model(*copied(inputs.args), **copied(inputs.kwargs))).float()


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, torch.Tensor]:
    """A block's arguments without its hidden states, and those."""
    if args and isinstance(args[0], torch.Tensor):
        return Call(args[1:], dict(kwargs), None), args[0]
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return Call(args, rest, "hidden_states"), kwargs["hidden_states"]
    raise SchemeError("The model's blocks do not take hidden states as their first argument.")


def hidden_of(output: Any, like: torch.Tensor) -> torch.Tensor:
    """The hidden states in what a block returned.

    Raises:
        SchemeError: they have another shape than those that entered it.
    """
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    if found.shape != like.shape:
        raise SchemeError(
            f"A block turns hidden states {tuple(like.shape)} into {tuple(found.shape)}; only chains of one width can be run block by block."
        )
    return found


def rest_of(output: Any) -> tuple[Any, ...] | None:
    """What a block returned beside the hidden states, None if nothing but these."""
    return None if isinstance(output, torch.Tensor) else tuple(output[1:])


def copied(tree: Any) -> Any:
    """Arguments whose tensors and containers a block may change without touching the originals."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if type(tree) is dict:
        return {k: copied(v) for k, v in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(copied(v) for v in tree)
    return tree


def moved(tree: Any, device: torch.device) -> Any:
    """Arguments on the device where a unit runs."""
    if device.type == "cpu":
        return tree
    if isinstance(tree, (Call, Inputs)):
        return replace(tree, args=moved(tree.args, device), kwargs=moved(tree.kwargs, device))
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if type(tree) is dict:
        return {k: moved(v, device) for k, v in tree.items()}
    return type(tree)(moved(v, device) for v in tree) if type(tree) in (tuple, list) else tree


def said(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
