"""A bounded sample of the rows of a stream.

Owns: `Reservoir`.  Uses: `errors` only.  Source: Vitter 1985, algorithm R.
"""

from __future__ import annotations

import math

import torch

from arrondi.errors import DataError, ShapeError


class Reservoir:
    """A uniform sample of at most `capacity` rows of a stream of any length.

    Every subset of that size is equally likely, whatever the batches were; how the stream is cut into batches does not
    change the sample. Draws come from an own generator, never from the global one.

    Attributes:
        capacity: most rows kept.
        seen: rows observed so far.
        name: what the inputs are called in messages.

    Source: Vitter 1985, algorithm R.
    """

    def __init__(self, capacity: int, *, seed: int = 0, name: str = "input") -> None:
        if capacity < 1:
            raise ShapeError(f"{name}: a reservoir holds at least one row, got capacity={capacity}.")
        self.capacity = capacity
        self.seen = 0
        self.name = name
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: torch.Tensor | None = None  # (capacity, n); allocated at the first batch

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Let every row of `x` compete for a place.

        Args:
            x: (..., n), any dtype; kept in the dtype of the first batch, on the CPU.

        Raises:
            ShapeError: n differs from earlier batches.
            DataError: a NaN or an infinity anywhere in `x`.
        """
        if x.ndim == 0:
            raise ShapeError(f"{self.name}: a sample is of rows, got a scalar. Pass (..., n).")
        rows = x.detach().reshape(-1, x.shape[-1])
        if not math.isfinite(float(rows.sum(dtype=torch.float32))) and (bad := int((~torch.isfinite(rows)).sum())):
            raise DataError(
                f"{self.name}: {bad} of {rows.numel()} values are NaN or infinite. Repair or exclude their source."
            )
        kept = self._storage(rows)
        free = min(max(self.capacity - self.seen, 0), rows.shape[0])
        kept[self.seen : self.seen + free] = rows[:free]
        order = torch.arange(self.seen + free, self.seen + rows.shape[0])  # position in the stream of the rows left
        place = (torch.rand(len(order), generator=self._generator, dtype=torch.float64) * (order + 1)).long()
        accepted = torch.nonzero(place < self.capacity).flatten()
        winner = torch.full((self.capacity,), -1)  # of several rows for one place the last one stays
        winner.scatter_reduce_(0, place[accepted], accepted, "amax")
        places = torch.nonzero(winner >= 0).flatten()
        kept[places] = rows[(winner[places] + free).to(rows.device)].to(kept)
        self.seen += rows.shape[0]

    def rows(self) -> torch.Tensor:
        """(min(seen, capacity), n): the sample. It is the reservoir's own storage, not a copy; the order means nothing.

        Raises:
            DataError: nothing was observed.
        """
        if self._kept is None or self.seen == 0:
            raise DataError(
                f"{self.name}: the reservoir is empty, no row was observed. Run calibration data through it first."
            )
        return self._kept[: self.seen]

    def merge(self, other: Reservoir) -> None:
        """Become a uniform sample of both streams: each side keeps places in proportion to the rows it saw.

        Raises:
            ShapeError: another capacity or another number of features.
        """
        if other.capacity != self.capacity:
            raise ShapeError(
                f"{self.name}: cannot merge reservoirs of {self.capacity} and {other.capacity} rows. Use one size."
            )
        if other.seen == 0:
            return
        theirs = other.rows()
        kept = self._storage(theirs)
        size = min(self.capacity, self.seen + other.seen)
        here = self._share(self.seen, other.seen, size)
        mine = kept[: self.seen][self._choose(min(self.seen, self.capacity), here)]
        kept[:size] = torch.cat((mine, theirs[self._choose(len(theirs), size - here)].to(kept)))
        self.seen += other.seen

    def _storage(self, rows: torch.Tensor) -> torch.Tensor:
        if self._kept is None:
            self._kept = torch.empty(self.capacity, rows.shape[-1], dtype=rows.dtype)
        if self._kept.shape[-1] != rows.shape[-1]:
            raise ShapeError(
                f"{self.name}: rows have {rows.shape[-1]} features, earlier ones had {self._kept.shape[-1]}."
            )
        return self._kept

    def _share(self, here: int, there: int, draws: int) -> int:
        """How many of `draws` rows, drawn without replacement from both streams, are this one's (hypergeometric)."""
        left = here
        for i, u in enumerate(torch.rand(draws, generator=self._generator, dtype=torch.float64).tolist()):
            left -= u * (here + there - i) < left
        return here - left

    def _choose(self, count: int, size: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator)[:size]
