"""Where values of a compiled network lie: `Room`, `Held`, and `Rooms`, which gives memory to new values when old ones are read no more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor

SLACK = 64
"""Bytes behind codes that kernels may read."""


@dataclass(eq=False)
class Room:
    """Memory of one value at a time.

    Attributes:
        slot: its number in the native plan.
        memory: uint8 bytes; None where the caller gives it at every run.
        users: values that lie in it now.
    """

    slot: int
    memory: Tensor | None
    users: int = 0


@dataclass(frozen=True)
class Held:
    """A value in memory.

    Attributes:
        shape: as ONNX counts it.
        last: its channels, axis 1, lie last.
        codes: one byte each, 128 higher than they are where `signed`; else float32.
    """

    room: Room
    shape: tuple[int, ...]
    last: bool
    codes: bool
    signed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 1 if self.codes else 4

    @property
    def up(self) -> int:
        """By how much codes are higher in memory."""
        return 128 if self.codes and self.signed else 0

    @property
    def either(self) -> bool:
        """Whether the order is the same with channels last and without."""
        return len(self.shape) < 3 or self.shape[1] == 1 or math.prod(self.shape[2:]) == 1

    def strides(self) -> tuple[int, ...]:
        """Numbers from one to the next along every axis of `shape`."""
        return strides_of(self.shape, self.last)

    def read(self) -> Tensor:
        """A copy as PyTorch has it."""
        assert self.room.memory is not None
        kind = torch.uint8 if self.codes else torch.float32
        flat = self.room.memory[: self.numel * self.size].view(kind)
        value = flat.as_strided(self.shape, self.strides()).clone(memory_format=torch.contiguous_format)
        return (value ^ 128).view(torch.int8) if self.up else value

    def write(self, value: Tensor) -> None:
        """Take a tensor over."""
        assert self.room.memory is not None
        kind = torch.uint8 if self.codes else torch.float32
        flat = self.room.memory[: self.numel * self.size].view(kind)
        raised = value.view(torch.uint8) ^ 128 if self.up else value
        flat.as_strided(self.shape, self.strides()).copy_(raised)


def strides_of(shape: Sequence[int], last: bool) -> tuple[int, ...]:
    """Strides of a dense tensor, its channels last or not."""
    order = [0, *range(2, len(shape)), 1] if last and len(shape) > 2 else list(range(len(shape)))
    found, step = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis], step = step, step * shape[axis]
    return tuple(found)


@dataclass
class Rooms:
    """All memory of a plan.

    Attributes:
        plan: the native plan.
        every: what was taken.
        free: what holds no value now.
    """

    plan: Any
    every: list[Room] = field(default_factory=list)
    free: list[Room] = field(default_factory=list)

    def take(self, count: int) -> Room:
        """Room for so many bytes: the smallest that is free, unless it is much too large."""
        count += SLACK
        fitting = [r for r in self.free if r.memory is not None and count <= len(r.memory) <= 4 * count]
        if fitting:
            room = min(fitting, key=lambda r: 0 if r.memory is None else len(r.memory))
            self.free.remove(room)
            return room
        memory = torch.zeros(max(count, 1), dtype=torch.uint8)
        self.every.append(Room(self.plan.slot(memory.data_ptr(), count), memory))
        return self.every[-1]

    def given(self, count: int) -> Room:
        """Room that the caller gives at every run."""
        return Room(self.plan.slot(0, count), None)

    def leave(self, room: Room) -> None:
        """One value fewer lies in a room."""
        room.users -= 1
        if room.users <= 0 and room.memory is not None and room not in self.free:
            self.free.append(room)
