"""Rows of a trellis that make up for each other's errors, as far as the model's outputs are concerned.

Owns: `RowFeedback`. The loss changes with the differences D of a layer by about tr(G D H Dᵀ), see `arrondi.rounding.yaqa`. Rows are visited in
bands that no ring leaves: those of tiles have sixteen rows, rings of rows as many as they are long. G is turned as the weight's rows are.

Source: Tseng, Sun, De Sa 2025, arXiv:2505.22988.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from arrondi.formats import Scheme, Trellis
from arrondi.formats.trellis import RING
from arrondi.rounding.gptq_factor import root_factor
from arrondi.tensor.trellis import TILE, ring_values
from arrondi.tensor.turned import Sides, hadamard_rows

Swept = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(some rows (k, n), their scales) → their codes (k, n)."""


@dataclass(frozen=True)
class RowFeedback:
    """How errors of rows count together.

    Attributes:
        trellis: whose rings join rows.
        moments: G in the basis of the codes, damped, as (k, k) blocks of its diagonal.
        factors: of each block U, upper triangular, with G = U Uᵀ.
    """

    trellis: Trellis
    moments: list[torch.Tensor]
    factors: list[torch.Tensor]

    @classmethod
    def of(cls, moments: Sequence[torch.Tensor], sides: Sides | None, scheme: Scheme, damping: float) -> RowFeedback:
        """Of what gradients say of a weight's outputs."""
        assert scheme.format.trellis is not None
        turned, factors, start = [], [], 0
        for moment in moments:
            g = moment.double()
            if sides is not None and scheme.turned is not None:
                signs = sides.rows[start : start + len(g)].sign().to(g)
                half = hadamard_rows(g * signs[:, None] * signs, scheme.turned)
                g = hadamard_rows(half.T.contiguous(), scheme.turned)
            factor, needed = root_factor(g.clone(), damping)
            g.diagonal().add_(needed * g.diagonal().mean())
            turned.append(g.float())
            factors.append(factor.triu().float())
            start += len(g)
        return cls(scheme.format.trellis, turned, factors)

    def visited(self, work: torch.Tensor, scale: torch.Tensor, swept: Swept) -> torch.Tensor:
        """Codes (m, n) of a weight, band by band, each rounded for what is owed by those before it."""
        codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        first = 0
        for factor in self.factors:
            left = torch.zeros_like(work[first : first + len(factor)])
            for start, stop in self._bands(len(factor)):
                band = slice(first + start, first + stop)
                owed = factor[:start, start:stop].T @ left[:start]
                due = work[band] + torch.linalg.solve_triangular(factor[start:stop, start:stop].T, owed, upper=False)
                own = scale[band] if len(scale) > 1 else scale
                codes[band] = swept(due, own)
                left[start:stop] = work[band] - ring_values(codes[band], self.trellis) * own
            first += len(factor)
        return codes

    def _bands(self, rows: int) -> list[tuple[int, int]]:
        height = RING if self.trellis.ring == "rows" else TILE
        whole = max(rows // height - (rows % height > 0), 1)
        return [(i * height, (i + 1) * height if i < whole - 1 else rows) for i in range(whole)]

    def best_scales(
        self, values: torch.Tensor, seen: torch.Tensor, work: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The scales (m, 1) of rows of values v with the least tr(G D H Dᵀ); `seen` is v H."""
        found, first = scale.clone(), 0
        for g in self.moments:
            rows = slice(first, first + len(g))
            ours, theirs = seen[rows].double(), g.to(seen).double()
            system, wanted = theirs * (ours @ values[rows].double().T), (theirs * (ours @ work[rows].double().T)).sum(1)
            system.diagonal().add_(1e-9 * system.diagonal().mean().clamp(min=1e-30))
            found[rows] = _positive(system, wanted, scale[rows].flatten().double())[:, None].to(scale)
            first += len(g)
        return found


def _positive(system: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The solution of a positive definite system; what would not be positive stays as it was at the start, and the others make up for that."""
    found, free = start.clone(), torch.ones_like(start, dtype=torch.bool)
    while bool(free.any()):
        rest = wanted[free] - system[free][:, ~free] @ found[~free]
        best = torch.linalg.solve(system[free][:, free], rest)
        if bool((best > 0).all()):
            found[free] = best
            break
        free[free.nonzero().flatten()[best <= 0]] = False
    return found
