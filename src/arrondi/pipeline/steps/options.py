"""Options that several steps share: what they take, said once."""

from __future__ import annotations

from typing import Annotated

from arrondi.arguments import Between

Iterations = Annotated[int, Between(1, 1_000_000)]
"""Of Adam."""
Rate = Annotated[float, Between(0, 10)]
"""Of Adam."""
Regular = Annotated[float, Between(0, 1e6)]
"""Weight of the regulariser that sends every weight to one of its sides."""
Batch = Annotated[int, Between(1, 1 << 20)]
"""Samples, or rows, of one iteration."""
SampledRows = Annotated[int, Between(1, 1 << 24)]
"""Rows of a layer that are looked at; of convolutions, patches."""
Share = Annotated[float, Between(0, 1)]
"""A part of one, or a rate relative to the size of what is learned."""
