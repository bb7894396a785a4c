"""Of which channels the numbers of a tensor are multiples: `Origin` and `Shadows`.

A number is *of* a channel if it is positively homogeneous of degree one in it: multiply the channel by any s > 0 and the number is
multiplied by s. For every such origin, each storage has a shadow of whole numbers that lie as its own numbers do: 0 where a number is
zero and stays so, 1 where it does not depend on the origin, c + 2 where it is of channel c. Views share the shadow as they share
the storage, and what moves numbers moves their shadows by the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from arrondi.model.flow_regions import storage_key

ZERO, OTHER, FIRST = 0, 1, 2
"""A number that is zero, one that does not depend on the origin, and one of channel 0."""

_SWEEP = 256
"""New shadows after which those of storages that are gone are dropped."""


@dataclass(eq=False)
class Origin:
    """A row of numbers that can be scaled channel by channel.

    Attributes:
        kind: "norm", a parameter that activations are multiplied by; "linear", the outputs of a matrix.
        param: the parameter.
        index: which matrix of a stack.
        offset: activations are multiplied by (offset + parameter).
        axis: the axis of the matrix along which its outputs lie.
        count: number of channels.
        biases: parameters that were added to it, and how often; a fold scales them along.
        reads: number of operations that have taken the bare parameter (of a "norm" without offset).
        place: names what runs at the moment.
    """

    kind: str
    param: str
    index: int | None
    offset: float
    axis: int
    count: int
    biases: dict[Origin, int] = field(default_factory=dict)
    reads: int = 0
    place: Callable[[], str] = field(default=str, repr=False)
    _reasons: list[str] = field(default_factory=list, repr=False)
    _why: torch.Tensor | None = field(default=None, repr=False)

    def why(self, channels: torch.Tensor) -> str | None:
        """The reason why one of these channels cannot be scaled, None if all can."""
        found = 0 if self._why is None or not channels.numel() else int(self._why[channels.long() + FIRST].max())
        return self._reasons[found - 1] if found else None

    def spoil(self, numbers: torch.Tensor, reason: str) -> None:
        """What these numbers of a shadow are of cannot be scaled any more."""
        if self._why is None:
            self._why = torch.zeros(self.count + FIRST, dtype=torch.int16)
        met = torch.zeros(self.count + FIRST, dtype=torch.bool)
        met[numbers.flatten().long()] = True
        fresh = met & (self._why == 0)
        if bool(fresh[FIRST:].any()):
            where = self.place()
            self._reasons.append(f"{reason} in {where}" if where else reason)
            self._why[fresh] = len(self._reasons)


Tags = dict[Origin, torch.Tensor]
"""The shadows of one tensor, each of its shape."""


@dataclass
class _Record:
    ref: StorageWeakRef
    itemsize: int
    size: int
    zero: bool = False
    bare: Origin | None = None
    note: str = ""
    shadows: Tags = field(default_factory=dict)


class Shadows:
    """The shadows of all storages that are alive."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._made = 0

    def of(self, tensor: torch.Tensor) -> Tags:
        """What the numbers of a tensor are of; origins that it has nothing of are left out."""
        record = self._find(tensor)
        if record is None or not record.shadows:
            return {}
        if tensor.dtype.itemsize != record.itemsize:  # its numbers are read as numbers of another type
            for origin, shadow in record.shadows.items():
                origin.spoil(shadow, "its bits are read as another type")
            return {}
        views = {origin: _view(shadow, tensor) for origin, shadow in record.shadows.items()}
        return {origin: view for origin, view in views.items() if view.numel() and int(view.max()) >= FIRST}

    def seen_as(self, tensor: torch.Tensor, origin: Origin) -> torch.Tensor:
        """The shadow of a tensor for one origin, whether it has one or not."""
        record = self._find(tensor)
        if record is None or origin not in record.shadows or tensor.dtype.itemsize != record.itemsize:
            blank = ZERO if record is not None and record.zero else OTHER
            return torch.full((), blank, dtype=torch.int32).expand(tensor.shape)
        return _view(record.shadows[origin], tensor)

    def write(self, tensor: torch.Tensor, tags: Tags, note: str = "", *, zero: bool = False) -> None:
        """The numbers of a tensor are new: these are their shadows, all else in it is of nothing (or zero)."""
        record = self._find(tensor, make=True)
        if record is None:
            return
        whole = tensor.numel() * tensor.dtype.itemsize >= record.size * record.itemsize
        record.note, record.bare = note or record.note, None
        blank = ZERO if zero else OTHER
        for origin in {*tags, *record.shadows}:
            if whole and origin not in tags:
                del record.shadows[origin]
                continue
            if origin not in record.shadows:
                before = ZERO if record.zero else OTHER
                record.shadows[origin] = torch.full((record.size,), before, dtype=torch.int32)
            values = tags.get(origin)
            _view(record.shadows[origin], tensor).copy_(torch.full((), blank) if values is None else values)
        record.zero = zero if whole else record.zero and zero and not tags

    def hold(self, parameter: torch.Tensor, origin: Origin) -> None:
        """A tensor holds the numbers of a parameter, which `origin` is, as they are."""
        record = self._find(parameter, make=True)
        if record is not None:
            record.bare = origin

    def bare(self, tensor: torch.Tensor) -> Origin | None:
        """The parameter whose numbers a tensor holds, if nothing was done to them."""
        record = self._find(tensor)
        return None if record is None else record.bare

    def note(self, tensor: torch.Tensor) -> str:
        """What made the numbers of a tensor, in words; "" if that was not seen."""
        record = self._find(tensor)
        return "" if record is None else record.note

    def _find(self, tensor: torch.Tensor, *, make: bool = False) -> _Record | None:
        key = storage_key(tensor)
        if key is None:
            return None
        if key not in self._records and make:
            self._made += 1
            if self._made % _SWEEP == 0:
                self._records = {k: r for k, r in self._records.items() if not r.ref.expired()}
            storage = tensor.untyped_storage()
            size = storage.nbytes() // tensor.dtype.itemsize
            self._records[key] = _Record(StorageWeakRef(storage), tensor.dtype.itemsize, size)
        return self._records.get(key)


def _view(shadow: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return shadow.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
