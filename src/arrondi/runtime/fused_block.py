"""A transformer block in few compiled calls: `FusedBlock`.

A fused block is of a class of its own that derives from that of the original, holds the same parts under the same names, and so has the
same `state_dict` and answers as the original does. While it is fused its numbers are frozen: compiled calls read float32 copies of norms and
biases that were made when it was fused, loaded, moved or copied. Change parameters in place after `unfuse`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from arrondi.runtime.attention import IMPLEMENTATIONS
from arrondi.runtime.compiled import Compiled
from arrondi.runtime.pattern import Differs, Pattern
from arrondi.runtime.recognize import ARGUMENTS

try:
    from transformers.utils.output_capturing import _active_collector as _recorded
except ImportError:  # transformers before 5.2 takes away what it recorded with
    _recorded = None

_KNOWN = frozenset(ARGUMENTS)
_Block = TypeVar("_Block", bound="FusedBlock")


class FusedBlock(nn.Module):
    """What the class of every fused block derives from, before the class of the original."""

    original: nn.Module
    pattern: Pattern
    layer: int
    names: tuple[str, ...]
    compiled: Compiled | None
    frozen: bool

    @staticmethod
    def of(block: nn.Module, pattern: Pattern, layer: int) -> FusedBlock:
        """The fused form of a block that `recognize` found to be of this pattern.

        Raises:
            Differs: its layers cannot be called together.
        """
        fused = _empty(type(block))
        # The original goes into the dictionary itself: as an attribute it would become a part of the module.
        vars(fused).update(vars(block), original=block, pattern=pattern, layer=layer, frozen=True)
        fused.names = tuple(inspect.signature(type(block).forward).parameters)[2:]
        fused.compiled = Compiled(fused, pattern, layer)
        return fused

    def _freeze(self) -> None:
        """Read the numbers anew; None if parts were replaced by others that cannot be called together."""
        try:
            self.compiled = Compiled(self, self.pattern, self.layer)
        except Differs:
            self.compiled = None
        self.frozen = True

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original's: hidden states (batch, tokens, width) in and out.

        Calls that ask for more than inference on the CPU in the type of the weights (gradients, training, a trace, other
        arguments, attention weights, hooks inside) take the original's own forward.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs if args else kwargs
        if not self.frozen:
            self._freeze()
        compiled = self.compiled
        if compiled is None or not self._takes(compiled, hidden_states, given):
            return super().forward(hidden_states, *args, **kwargs)
        return compiled(hidden_states, given)

    def _takes(self, compiled: Compiled, hidden: torch.Tensor, given: dict[str, Any]) -> bool:
        """Whether this is a call for the compiled products."""
        mask, positions = given.get("attention_mask"), given.get("position_embeddings")
        return (
            type(hidden) is torch.Tensor
            and hidden.is_cpu
            and hidden.dtype is compiled.dtype
            and hidden.dim() == 3
            and positions is not None
            and compiled.fits(hidden, *positions)
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4))
            and given.keys() <= _KNOWN
            and compiled.config._attn_implementation in IMPLEMENTATIONS
            and not self.training
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and (hidden.requires_grad or compiled.needs_gradients()))
            and compiled.holds_its_layers()
            and ((hidden.shape[1] == 1 and given.get("past_key_values") is not None) or self._untouched(compiled))
        )

    def _untouched(self, compiled: Compiled) -> bool:
        """Whether parts are still those that were fused, and nobody listens to them. Asked once a text, not for every token."""
        return (
            not (_global_forward_hooks or _global_forward_pre_hooks)
            and compiled.holds_its_parts()
            and not any(hooks and _busy(hooks.values()) for hooks in compiled.hooks)
        )

    def _apply(self: _Block, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Block:
        self.frozen = False
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.frozen = False
        super()._load_from_state_dict(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (type(self.original),), vars(self) | {"compiled": None, "frozen": False}


def _empty(original: type[nn.Module]) -> FusedBlock:
    cls = _fused_class(original)
    return cls.__new__(cls)


_CLASSES: dict[type[nn.Module], type[FusedBlock]] = {}


def _fused_class(original: type[nn.Module]) -> type[FusedBlock]:
    if original not in _CLASSES:
        _CLASSES[original] = type(f"Fused{original.__name__}", (FusedBlock, original), {"__module__": __name__})
    return _CLASSES[original]


def _busy(hooks: Collection[Callable[..., Any]]) -> bool:
    """Whether hooks have something to do in this call.

    Those with which transformers records attentions stay for good once it was asked to, and mostly record nothing.
    """
    recording = _recorded is None or _recorded.get()
    return bool(recording) or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)
