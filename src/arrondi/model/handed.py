"""What a block hands to later blocks beside hidden states: a bias of positions, what a router has seen.

Owns: `Handed`, which stands for such a tensor in the arguments of a later block. Arguments are recorded while blocks are passed
over, so their other outputs are not known then: stand-ins are returned in their place, recognised where they come back as an
argument, and filled in when the block that gives them has run. A stand-in that is computed with gives NaN, which is never mistaken
for the model's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Handed(NamedTuple):
    """A tensor that a block returned beside its hidden states.

    Attributes:
        block: which.
        number: which of the tensors that it returned, in order.
    """

    block: int
    number: int


class StandIns:
    """The stand-ins of one pass over the blocks."""

    def __init__(self) -> None:
        self._made: list[tuple[torch.Tensor, Handed]] = []

    def of(self, block: int, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same structure as a block returned, with stand-ins of its tensors."""
        count = iter(range(len(leaves(rest))))

        def stand_in(tensor: torch.Tensor) -> torch.Tensor:
            value = float("nan") if tensor.is_floating_point() else False if tensor.dtype == torch.bool else -1
            made = torch.full((1,) * tensor.ndim, value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
            self._made.append((made, Handed(block, next(count))))
            return made

        changed: tuple[Any, ...] = mapped(rest, stand_in)
        return changed

    def marked(self, tree: Any) -> Any:
        """A tree in which stand-ins are named."""
        return mapped(tree, lambda t: next((which for made, which in self._made if made is t), t))


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree in order."""
    found: list[torch.Tensor] = []
    mapped(tree, found.append)
    return found


def named_in(tree: Any) -> list[Handed]:
    """What a tree names."""
    found: list[Handed] = []
    filled(tree, found.append)
    return found


def filled(tree: Any, give: Callable[[Handed], Any]) -> Any:
    """A tree with the tensors that it names."""
    return mapped(tree, lambda tensor: tensor, give)


def mapped(tree: Any, tensor: Callable[[torch.Tensor], Any], handed: Callable[[Handed], Any] = lambda h: h) -> Any:
    """A tree of plain tuples, lists and dicts with its tensors, and what stands for tensors, replaced."""
    if isinstance(tree, torch.Tensor):
        return tensor(tree)
    if isinstance(tree, Handed):
        return handed(tree)
    if type(tree) is dict:
        return {k: mapped(v, tensor, handed) for k, v in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)([mapped(v, tensor, handed) for v in tree])
    return tree
