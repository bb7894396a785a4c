"""What compression lost, sent along the next time.

Owns: `Memory` (errors by parameter or by place) and `Sender`, which encodes at every site of a script and keeps the errors there.

Sources: Karimireddy et al. 2019, arXiv:1901.09847 ("ef": p = g + e is sent as u, e becomes p - u, so that Σu + e = Σg);
Xie et al. 2024, arXiv:2407.04480 ("loco": e is a moving average of p - u, kept in 8 bits and forgotten every so many steps).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from arrondi.distributed.parcel import Layout, Parcel
from arrondi.tensor.blocks import BlockCodec

Feedback = Literal["none", "ef", "loco"]

_KEPT: Final = BlockCodec(bits=8, block=256, side="bfloat16")
"""How LoCo keeps its errors."""


@dataclass
class Memory:
    """The errors of one rank, by name. Nothing in here refers to a process group, so it can be pickled.

    Attributes:
        beta: of the moving average; "loco" only.
        reset: steps after which all errors are forgotten; "loco" only.
    """

    kind: Feedback = "none"
    beta: float = 0.8
    reset: int = 1024
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def load(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """The error of a name, in the shape of `like`, float32: zeros at first, and of a place that has another size by now."""
        kept = self.held.get(key)
        if kept is None or not self.fits(key, like.numel()):
            return torch.zeros(like.shape, device=like.device)
        kept = kept.to(like.device)
        return (_KEPT.decode(kept, like.numel()) if self.kind == "loco" else kept).view(like.shape)

    def save(self, key: str, before: torch.Tensor | None, lost: torch.Tensor) -> None:
        """Keeps what was lost; `before` is the error that was sent along. NaN and infinity are not kept: they were passed on."""
        lost = torch.where(lost.isfinite(), lost, 0.0).reshape(-1)
        if self.kind == "loco":
            average = (1 - self.beta) * lost
            if before is not None:
                average += self.beta * before.reshape(-1)
            lost = _KEPT.encode(average)
        self.held[key] = lost

    def fits(self, key: str, count: int) -> bool:
        """Whether what is kept under a name, if anything, is for so many numbers."""
        return key not in self.held or len(self.held[key]) == self._length(count)

    def _length(self, count: int) -> int:
        return _KEPT.nbytes(count) if self.kind == "loco" else count

    def tick(self, step: int) -> None:
        """At the end of a step."""
        if self.kind == "loco" and (step + 1) % self.reset == 0:
            self.held.clear()


class Sender:
    """Encodes for one bucket in one step.

    Args:
        memory: of errors; its kind may be "none".
        key: of the bucket, for errors that belong to places and not to parameters.
        generator: of stochastic rounding, or None.
        layout, names: of the bucket's parameters, whose errors at the site "worker" go by their names; without them, by places.
    """

    def __init__(
        self,
        memory: Memory,
        key: str,
        generator: torch.Generator | None = None,
        layout: Layout | None = None,
        names: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.memory, self.key, self.generator = memory, key, generator
        self.layout, self.names = layout, names

    def __call__(self, site: str, numbers: torch.Tensor, parcel: Parcel) -> torch.Tensor:
        if self.memory.kind == "none":
            return parcel.encode(numbers, self.generator)
        by_name = self.layout if site == "worker" and self.names else None
        key = f"{self.key}/{site}"
        before = (
            self.memory.load(key, numbers) if by_name is None else by_name.share(self.errors(numbers), len(numbers))
        )
        wanted = numbers + before
        message = parcel.encode(wanted, self.generator)
        lost = wanted - parcel.decode(message)
        if by_name is None:
            self.memory.save(key, before, lost)
        else:
            self.keep(by_name.join(before), by_name.join(lost))
        return message

    def errors(self, like: torch.Tensor) -> torch.Tensor:
        """The errors of all parameters of the bucket, one after another."""
        empty = (like.new_empty(count, dtype=torch.float32) for _, count in self.names)
        return torch.cat([self.memory.load(name, e) for (name, _), e in zip(self.names, empty, strict=True)])

    def keep(self, before: torch.Tensor, lost: torch.Tensor) -> None:
        """Stores (count,) errors under the names of the parameters."""
        sizes = [count for _, count in self.names]
        for (name, _), old, new in zip(self.names, before.split(sizes), lost.split(sizes), strict=True):
            self.memory.save(name, old, new)


def generator_for(device: torch.device, *what: object) -> torch.Generator:
    """A generator whose seed is a hash of the seed, step, bucket and rank: no two of them share their noise."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
