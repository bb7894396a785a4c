"""Options that several methods share: what they take, said once."""

from __future__ import annotations

from typing import Annotated

from arrondi.arguments import Between

Damping = Annotated[float, Between(0, 1e6)]
"""Fraction of the mean diagonal of a moment that is added to its diagonal."""
BlockSize = Annotated[int, Between(1, 100_000)]
"""Columns between two updates of the far columns."""
Power = Annotated[float, Between(0.1, 16)]
"""Exponent of the error that a search of ranges minimises."""
Refine = Annotated[int, Between(0, 100)]
"""How often scales are fitted to codes and codes to scales again."""
Sweeps = Annotated[int, Between(1, 100)]
"""How often the columns are visited."""
Strength = Annotated[float, Between(0, 2)]
"""Share of a correction; 0 is none, 1 all of it."""
