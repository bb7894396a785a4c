"""A model as a chain of blocks, run one block at a time.

Owns: `Chain`. Which modules are the blocks is found by structure (the list of like modules that holds the most parameters),
how they are called is found by running the model once. No model family is named.

Only one block's weights need to be in memory: `begin` runs everything before the first block, `run` one block, `finish`
everything after the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from arrondi.errors import FileFormatError, SchemeError
from arrondi.formats import Scheme
from arrondi.model.memory import release
from arrondi.model.skeleton import Skeleton
from arrondi.tensor.qtensor import fake_quantize


class _Stop(Exception):
    """Raised inside a forward pass when all that was wanted has been seen."""


@dataclass
class _Call:
    """How the model calls one block: everything but the hidden states, whose place is None in `args` or under `key`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None


class Chain:
    """The blocks of a skeleton.

    Attributes:
        skeleton: model and weights.
        prefix: name of the block list, for example `model.layers`.
        early: parameters that are used before the first block; known after `begin`.

    Raises:
        SchemeError: the model has no chain of like blocks that pass one tensor on.
    """

    def __init__(self, skeleton: Skeleton, activations: dict[str, Scheme] | None = None) -> None:
        """
        Args:
            activations: module name → scheme by which its input is quantized at run time.
        """
        self.skeleton = skeleton
        self.model = skeleton.model
        self.prefix = find_blocks(self.model)
        self.blocks: list[Any] = list(self.model.get_submodule(self.prefix))
        self._forward = [block.forward for block in self.blocks]
        self._calls: dict[int, list[_Call]] = {}
        self._wrap: Callable[[torch.Tensor], Any] | None = None
        self._rounding = True
        self.early: set[str] = set()
        self._outer = [n for n in skeleton.empty if not n.startswith(f"{self.prefix}.")]
        self._at_once = False
        self._entering = self._past_blocks = False
        modules = dict(self.model.named_modules())
        for name, scheme in (activations or {}).items():
            if name in modules:  # experts that are fused here are none, and their inputs stay as they are
                modules[name].register_forward_pre_hook(self._activation_hook(scheme))

    def __len__(self) -> int:
        return len(self.blocks)

    def params(self, i: int) -> list[str]:
        """Names of the parameters of block i."""
        start = f"{self.prefix}.{i}."
        return [n for n in self.skeleton.empty if n.startswith(start)]

    def fill(self, i: int) -> None:
        """Load block i."""
        self.skeleton.fill(self.params(i))

    def drop(self, i: int) -> None:
        """Release block i."""
        self.skeleton.drop(self.params(i))
        release()

    @torch.no_grad()
    def begin(self, batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Input ids (B, T) of every batch → hidden states (B, T, n) that enter the first block, one batch at a time.

        Take all of them before the first block is filled.
        """
        with self.outer_loaded():
            for ids in batches:
                if len(ids) not in self._calls:
                    self._record(ids)
                yield self.enter(ids)

    @torch.no_grad()
    def run(self, i: int, hidden: torch.Tensor, *, bfloat16: bool = False) -> torch.Tensor:
        """Hidden states after block i, whose weights must be filled; float32, with bfloat16 products if asked."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return _hidden_of(self._call(i, hidden), hidden).float()

    @torch.no_grad()
    def finish(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What follows the last block: logits, or the last hidden state of an encoder. Call it inside `outer_loaded`."""
        with self._replaced(self._passing(hidden)):
            output = self._forward_pass(ids)
        found: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
        return found

    def _call(self, i: int, hidden: torch.Tensor) -> Any:
        call = self._calls[len(hidden)][i]
        if call.key is not None:
            return self._forward[i](*call.args, **{**call.kwargs, call.key: hidden})
        return self._forward[i](hidden, *call.args, **call.kwargs)

    def _record(self, ids: torch.Tensor) -> None:
        """Learn how each block is called for batches of this size, and what a block returns."""
        calls: list[_Call] = []

        def recorder(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call, hidden = _split(args, kwargs)
                if i != len(calls):
                    raise SchemeError(
                        f"The blocks {self.prefix}.* are not run once each in order, so the model cannot be streamed block by block. Use --method rtn or hqq without text."
                    )
                calls.append(call)
                if self._wrap is None:
                    self.fill(i)
                    output = self._forward[i](*args, **kwargs)
                    self._wrap = _wrapper(output, hidden)
                    self.drop(i)
                self._past_blocks = i + 1 == len(
                    self.blocks
                )  # the next other module ends it, or a block that runs again
                return self._wrap(hidden)

            return forward

        try:
            with self._replaced(recorder), contextlib.suppress(_Stop):
                self._forward_pass(ids, calls.clear)
        except (SchemeError, FileFormatError):
            raise
        except Exception as error:  # whatever a model says that wants other inputs
            raise SchemeError(
                f"The model does not run on token ids alone ({type(error).__name__}: {error}), so it cannot be calibrated or measured. Use --method rtn or hqq without text."
            ) from error
        finally:
            self._past_blocks = False
        if len(calls) < len(self.blocks):
            raise SchemeError(
                f"The model does not run all blocks {self.prefix}.*, so it cannot be streamed block by block. Use --method rtn or hqq without text."
            )
        self._calls[len(ids)] = calls

    def _forward_pass(self, ids: torch.Tensor, before_again: Callable[[], None] = lambda: None) -> Any:
        """The model on token ids. One that reaches into the weights of modules that it does not call gets all at once."""
        try:
            return self.model(input_ids=ids)
        except (RuntimeError, NotImplementedError) as error:
            if self._at_once or "meta" not in str(error):
                raise
        self._at_once = True
        self.skeleton.fill(self._outer)
        before_again()
        return self.model(input_ids=ids)

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """Input ids (B, T) → hidden states that enter the first block. Call it inside `outer_loaded`."""
        caught: list[torch.Tensor] = []
        self._entering = True

        def catcher(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                caught.append(_split(args, kwargs)[1])
                raise _Stop

            return forward

        with self._replaced(catcher), contextlib.suppress(_Stop):
            self._forward_pass(ids)
        self._entering = False
        return caught[0].clone()

    def _passing(self, last: torch.Tensor) -> Callable[[int], Callable[..., Any]]:
        """Blocks that hand their input on, the last one `last` instead."""

        def factory(i: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                assert self._wrap is not None
                return self._wrap(last if i + 1 == len(self.blocks) else _split(args, kwargs)[1])

            return forward

        return factory

    @contextlib.contextmanager
    def _replaced(self, factory: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        for i, block in enumerate(self.blocks):
            block.forward = factory(i)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, self._forward, strict=True):
                block.forward = forward

    @contextlib.contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """Inside, modules outside the blocks load their own weights when they are called; all are released at the end."""
        handles = []
        if self._at_once:
            self.skeleton.fill(self._outer)
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
            self.skeleton.drop(self._outer)

    @contextlib.contextmanager
    def unrounded(self) -> Iterator[None]:
        """Inside, activations stay as they are: the original model is not to be measured with rounded ones."""
        self._rounding = False
        try:
            yield
        finally:
            self._rounding = True

    def _activation_hook(self, scheme: Scheme) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (fake_quantize(args[0], scheme, name="activation"), *args[1:]) if self._rounding else args

        return hook

    def _filler(self, own: list[str]) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if self._past_blocks:
                raise _Stop
            if self._entering:
                self.early.update(own)
            self.skeleton.fill(own)

        return hook


def find_blocks(model: torch.nn.Module) -> str:
    """Name of the outermost module list of like modules that holds the most parameters.

    Raises:
        SchemeError: there is none.
    """
    best, size = "", 0
    lists = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    for name in lists:
        if any(name.startswith(other + ".") for other in lists if other != name):
            continue
        members: Any = model.get_submodule(name)
        if len({type(m) for m in members}) == 1:
            parameters = sum(p.numel() for p in members.parameters())
            if parameters > size:
                best, size = name, parameters
    if not best:
        raise SchemeError(
            "The model has no list of like blocks, so it cannot be calibrated block by block. Use --method rtn or hqq without calibration text."
        )
    return best


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Call, torch.Tensor]:
    """A block's arguments without its hidden states, and those."""
    if args and isinstance(args[0], torch.Tensor):
        return _Call(args[1:], dict(kwargs), None), args[0]
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return _Call(args, rest, "hidden_states"), kwargs["hidden_states"]
    raise SchemeError(
        "The model's blocks do not take hidden states as their first argument, so it cannot be streamed block by block."
    )


def _hidden_of(output: Any, like: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    if found.shape != like.shape:
        raise SchemeError(
            f"A block turns hidden states {tuple(like.shape)} into {tuple(found.shape)}; only chains of one width can be streamed."
        )
    return found


def _wrapper(output: Any, hidden: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """Put other hidden states into the same structure that a block returned."""
    _hidden_of(output, hidden)
    if isinstance(output, torch.Tensor):
        return lambda h: h
    rest = tuple(output[1:])
    return lambda h: (h, *rest)
