"""Which choice for each of many parts, under one budget: `choose_under`, an integer program.

Minimise the sum of losses, one choice a part, so that the sum of costs is at most the budget (a multiple-choice knapsack), solved exactly by
HiGHS through SciPy. Source: Hubara et al. 2020, arXiv:2006.10518, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arrondi.errors import SchemeError


def choose_under(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, noun: str = "bits"
) -> list[int]:
    """The choice of every part.

    Args:
        losses, costs: of every choice of every part; parts may have different numbers of choices.
        budget: what all may cost together.
        noun: what is counted, for messages.

    Raises:
        SchemeError: even the cheapest choices cost more; the sentence names what they cost.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    least = sum(min(row) for row in costs)
    if least > budget * (1 + 1e-12):
        raise SchemeError(
            f"The smallest choice for every layer takes {least:,.0f} {noun}, more than the budget of {budget:,.0f}. Raise --budget."
        )
    part = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    flat_loss, flat_cost = (np.array([v for row in rows for v in row], float) for rows in (losses, costs))
    one_each = csr_array((np.ones(len(part)), (part, np.arange(len(part)))), shape=(len(costs), len(part)))
    scale = flat_loss.max() if flat_loss.max() > 0 else 1.0  # the solver's tolerances are absolute
    found = milp(
        flat_loss / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_cost[None] / budget, -np.inf, 1.0)],
        bounds=Bounds(0, 1),
        integrality=np.ones(len(part)),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise SchemeError(f"No choice for every layer fits the budget of {budget:,.0f} {noun}. Raise --budget.")
    picked = np.flatnonzero(found.x > 0.5)
    first = np.searchsorted(part, np.arange(len(costs)))
    return [int(i - f) for i, f in zip(picked, first, strict=True)]
