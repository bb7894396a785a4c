"""What a text says of one layer's keys and values: `StateStatistics`, and what a cache is told of it.

Sums and maxima only, so any amount of text takes the same memory. For directions, keys are summed once as they are and once for every
rotary embedding that the model may have turned them by; the one that leaves least is theirs, so nobody has to say which it was. What
is left counts as the queries make it count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from arrondi.errors import DataError
from arrondi.formats.kv import AnyCache
from arrondi.formats.spectral import SpectralCache
from arrondi.tensor.spectrum import Basis, Moments, Turn, basis_of, energies

_LEAST: Final = 1e-3
"""Of the largest weight of a head: what hardly any query looks at is not forgotten."""


class StateStatistics:
    """Sums over queries, keys and values (batch, heads, tokens, width) of one layer, whose texts begin at position 0.

    Args:
        scheme: what they will become; what it does not need is not summed.
        turns: rotary embeddings of the model.
    """

    def __init__(self, scheme: AnyCache, turns: Sequence[Turn]) -> None:
        self.scheme, self.turns = scheme, (None, *turns)
        self.tokens = 0
        self.largest: dict[str, float] = {"keys": 0.0, "values": 0.0}
        self.moments: dict[Turn | str | None, Moments] = {}
        self.squares: torch.Tensor | None = None

    def see(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add some.

        Raises:
            DataError: NaN or infinity.
        """
        self.tokens += keys.shape[0] * keys.shape[2]
        for name, x in (("keys", keys), ("values", values)):
            largest = float(x.abs().max())
            if not largest < float("inf"):
                raise DataError(
                    f"There are {name} that are NaN or infinite. Look for the layer that computes them: `arrondi inspect --outliers`."
                )
            self.largest[name] = max(self.largest[name], largest)
        if not isinstance(self.scheme, SpectralCache):
            return
        squares = queries.double().square().sum((0, 2)).unflatten(0, (keys.shape[1], -1)).sum(1)
        self.squares = squares if self.squares is None else self.squares + squares
        self._add("values", values)
        real = keys.float()
        for turn in self.turns:
            if turn is None or 2 * len(turn.frequencies) <= real.shape[-1]:
                self._add(turn, real if turn is None else turn.apply(real, 0, back=True))

    def _add(self, key: Any, x: torch.Tensor) -> None:
        new = Moments.of(x)
        self.moments[key] = self.moments[key].plus(new) if key in self.moments else new

    def known(self) -> tuple[float | Basis, float | Basis]:
        """What a cache is told: clips, or directions, of keys and of values.

        Raises:
            DataError: too few tokens for directions.
        """
        if not isinstance(self.scheme, SpectralCache):
            return max(self.largest["keys"], 1e-30), max(self.largest["values"], 1e-30)
        width = max(m.total.shape[-1] for m in self.moments.values())
        if self.tokens < 2 * width:
            raise DataError(
                f"Directions of {width} channels need {2 * width} tokens of text or more, got {self.tokens}. Give more calibration text."
            )
        values, _ = basis_of(self.moments["values"], self.scheme.values)
        turned = [t for t in self.turns if t in self.moments]
        found = [basis_of(self.moments[turn], self.scheme.keys, turn, self._weight(turn)) for turn in turned]
        return min(found, key=lambda pair: pair[1])[0], values

    def _weight(self, turn: Turn | None) -> torch.Tensor:
        """(heads, width): the root of what an error of each channel of a key costs the scores; none is without any."""
        assert self.squares is not None
        weight = (energies(self.squares, turn) / self.tokens).sqrt()
        largest = weight.amax(-1, keepdim=True)
        return torch.where(largest > 0, torch.maximum(weight, _LEAST * largest), 1.0)


def clipped(x: torch.Tensor, clip: float) -> int:
    """Numbers beyond a clip value."""
    return int((x.abs() > clip).sum())
