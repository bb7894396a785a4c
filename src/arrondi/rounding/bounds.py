"""Between which numbers an option of a method makes sense.

Owns: `Between`, which stands in the annotation of the option: `damping: Annotated[float, Between(0, 1e6)] = 0.01`. Options are checked
before the work (`check_options`), so that a run does not end hours later on a number that never could be.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args


class Between(NamedTuple):
    """The least and the largest number, both allowed."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


def bounds_of(annotation: Any) -> Between | None:
    """The bounds in an annotation, if it has some."""
    return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, Between)), None)
