"""How far two sets of outputs are apart: `measure`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Apart(NamedTuple):
    """A difference.

    Attributes:
        most: the largest, in the outputs' own units.
        relative: root mean square of the difference, in those of how the numbers of a row vary around their mean.
        agree: share of rows whose largest number is at the same place; None where rows have one number.
    """

    most: float
    relative: float
    agree: float | None


def measure(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> Apart | str:
    """The largest of all outputs; or, as the end of a sentence, why they cannot be compared.

    A difference that is the same for a whole row of logits counts: it is none of the model's.
    """
    worst = Apart(0.0, 0.0, None)
    for name, expected in wanted.items():
        given = found.get(name)
        if given is None or given.shape != expected.shape:
            return f"{name} has the shape {None if given is None else given.shape} and should have {expected.shape}"
        a, b = given.astype(np.float64), expected.astype(np.float64)
        if not np.isfinite(a).all():
            return f"{name} has NaN or infinite numbers"
        rows = b.reshape(-1, b.shape[-1]) if b.ndim else b.reshape(1, 1)
        spread = rows - rows.mean(-1, keepdims=True) if rows.shape[-1] > 1 else rows
        scale = float(np.sqrt(np.square(spread).mean()))
        rms = float(np.sqrt(np.square(a - b).mean()))
        same = None
        if rows.shape[-1] > 1:
            same = float((a.reshape(rows.shape).argmax(-1) == rows.argmax(-1)).mean())
        worst = Apart(
            max(worst.most, float(np.abs(a - b).max(initial=0))),
            max(worst.relative, 0.0 if not rms else rms / scale if scale else np.inf),
            same if worst.agree is None else worst.agree if same is None else min(worst.agree, same),
        )
    return worst
