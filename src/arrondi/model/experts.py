"""Experts that see every token: a module that holds a stack of experts is called once more, for chosen ones, with all tokens.

Owns: `every_token`. What the module returns to the model is not touched: the extra calls are made before its own, and their results
are dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def every_token(
    modules: Sequence[tuple[nn.Module, Sequence[int]]], begin: Callable[[], object], end: Callable[[], object]
) -> Iterator[None]:
    """Inside, a call of one of the modules is preceded by one call for each of its listed experts, with every token.

    Args:
        modules: each with the experts that shall see all tokens. Its forward takes hidden states, and beside them the numbers of the
            experts that each token goes to, integers (tokens, k), and their weights, floats (tokens, k); a module that takes none
            of these is left as it is.
        begin, end: called around each extra call.
    """
    busy = False

    def extra(module: nn.Module, experts: Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal busy
        if busy or not _chooses(args, kwargs):
            return
        busy = True
        try:
            for expert in experts:
                begin()
                try:
                    module(
                        *(_sent(a, expert, args, kwargs) for a in args),
                        **{k: _sent(v, expert, args, kwargs) for k, v in kwargs.items()},
                    )
                finally:
                    end()
        finally:
            busy = False

    with contextlib.ExitStack() as hooks:
        for module, experts in modules:

            def before(m: nn.Module, args: Any, kwargs: Any, experts: Sequence[int] = experts) -> None:
                extra(m, experts, args, kwargs)

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def _numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """What may be the numbers of experts: integers (tokens, k)."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    return [t for t in tensors if t.ndim == 2 and not t.dtype.is_floating_point and t.dtype != torch.bool]


def _chooses(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return len(_numbers(args, kwargs)) == 1


def _sent(value: Any, expert: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An argument as it is where every token goes to one expert, with the weight 1."""
    (numbers,) = _numbers(args, kwargs)
    if value is numbers:
        return torch.full_like(numbers[:, :1], expert)
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.shape == numbers.shape:
        return torch.ones_like(value[:, :1])
    return value
