"""What passes between blocks, batch by batch, in memory up to a limit and in a file beyond it.

Owns: `TreeStore`, a list of trees: hidden states alone, or a block's arguments (tuples, lists and dicts of tensors and plain values).
A tensor that equals one already held (position embeddings and masks are the same for every batch) is kept once. A store is a
context manager, and gives memory, file and descriptor back at its end, also when an error ends it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from arrondi.errors import SchemeError
from arrondi.model.spill import Budget, Room, Rooms

_SAMPLE: Final = 256
"""Bytes by which most tensors are told apart before two are compared whole."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype, torch.device, torch.Size)  # fmt: skip

_Key = tuple[torch.dtype, torch.Size, bytes]


@dataclass(eq=False, slots=True)
class _Held:
    """One tensor that is kept, and how many places of the trees it fills."""

    key: _Key
    room: Room
    uses: int = 0


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A tensor's place in a kept tree, and the device that it came from."""

    held: _Held
    device: torch.device


class TreeStore:
    """A list of trees.

    What goes in is copied, and what comes out is the caller's own: a block that changes its inputs in place changes nothing here.
    Tensors come back on the device that they came from, with equal bytes, type and shape.
    """

    def __init__(self, budget: Budget, folder: Path | None = None, trees: Iterable[Any] = ()) -> None:
        """
        Args:
            budget: memory, shared with other stores.
            folder: where an unnamed file takes what the budget does not; None keeps everything in memory.
            trees: the first trees, taken one at a time.
        """
        self._rooms = Rooms(budget, folder)
        self._trees: list[Any] = []
        self._like: dict[_Key, list[_Held]] = {}
        try:
            for tree in trees:
                self.append(tree)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._trees)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def append(self, tree: Any) -> None:
        """Add a tree.

        Raises:
            SchemeError: it holds an object that is no plain value, so that nobody knows whether it stays as it is.
            OutputError: the disk is full.
        """
        self._trees.append(_mapped(tree, self._keep, _check))

    def __getitem__(self, i: int) -> Any:
        return _mapped(self._trees[i], self._give, lambda leaf, path: None)

    def __setitem__(self, i: int, tree: Any) -> None:
        """Replace a tree; raises as `append`. Tensors of the old sizes take the old rooms."""
        _mapped(self._trees[i], self._forget, lambda leaf, path: None)
        self._trees[i] = None
        self._trees[i] = _mapped(tree, self._keep, _check)

    def close(self) -> None:
        """Give everything back; the store is empty then."""
        self._trees, self._like = [], {}
        self._rooms.close()

    def __enter__(self) -> TreeStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _keep(self, tensor: torch.Tensor) -> _Leaf:
        own = tensor.detach().cpu().contiguous()
        raw = own.reshape(-1).view(torch.uint8)
        key = (own.dtype, own.shape, raw[:: max(len(raw) // _SAMPLE, 1)].numpy().tobytes())
        held = next((h for h in self._like.get(key, ()) if self._rooms.holds(h.room, raw)), None)
        if held is None:
            held = _Held(key, self._rooms.take(len(raw)))
            self._rooms.write(held.room, raw)
            self._like.setdefault(key, []).append(held)
        held.uses += 1
        return _Leaf(held, tensor.device)

    def _give(self, leaf: _Leaf) -> torch.Tensor:
        dtype, shape, _ = leaf.held.key
        return self._rooms.read(leaf.held.room).view(dtype).reshape(shape).to(leaf.device)

    def _forget(self, leaf: _Leaf) -> None:
        held = leaf.held
        held.uses -= 1
        if held.uses == 0:
            like = self._like[held.key]
            like.remove(held)
            if not like:
                del self._like[held.key]
            self._rooms.release(held.room)


def _mapped(tree: Any, leaf: Callable[[Any], Any], other: Callable[[Any, str], None], path: str = "") -> Any:
    """A tree of the same structure with `leaf` of every tensor; `other` sees everything else that is no container."""
    if isinstance(tree, torch.Tensor | _Leaf):
        return leaf(tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((k, _mapped(v, leaf, other, f"{path}[{k!r}]")) for k, v in tree.items())
    if type(tree) is list or (isinstance(tree, tuple) and not isinstance(tree, torch.Size)):
        members = [_mapped(v, leaf, other, f"{path}[{i}]") for i, v in enumerate(tree)]
        return tree._make(members) if hasattr(tree, "_make") else type(tree)(members)
    other(tree, path)
    return tree


def _check(value: Any, path: str) -> None:
    if not isinstance(value, _PLAIN):
        place = f" at {path}" if path else ""
        raise SchemeError(
            f"The model hands a {type(value).__name__} to its blocks{place}. It cannot be kept for later batches: only tensors, plain values, and tuples, lists and dicts of them can. Use --method rtn or hqq without text."
        )
