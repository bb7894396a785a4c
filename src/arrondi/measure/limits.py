"""Quality limits that a user sets: whether they can be measured at all, and whether they were kept.

Owns: `Limits` and `check_limits`. What counts is the upper end of the 95 % interval: a limit is kept when the text shows that it is,
not when it might be. Infinity and NaN miss every limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from arrondi.arguments import check_fields
from arrondi.documents import number
from arrondi.errors import SchemeError

MEASURES_KL = "language model"
"""The kind of comparison (`Comparison.kind`) that has a KL divergence and a perplexity."""


@dataclass(frozen=True)
class Limits:
    """The most that a model may lose.

    Attributes:
        kl: mean KL divergence to the original in nats, or None.
        ppl_increase: relative increase of perplexity (0.05: 5 %), or None.
    """

    kl: float | None = None
    ppl_increase: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for option, _, limit in self:
            if math.isnan(limit):
                raise SchemeError(f"{option} takes a number, got nan. Example: {option} 0.02.")
        if self.kl is not None and self.kl < 0:
            raise SchemeError(f"--max-kl takes a number that is not negative, got {self.kl:g}. Example: --max-kl 0.02.")
        if self.ppl_increase is not None and self.ppl_increase <= -1:
            raise SchemeError(
                f"--max-ppl-increase takes a fraction above -1, got {self.ppl_increase:g}. Example: --max-ppl-increase 0.05."
            )

    def __iter__(self) -> Iterator[tuple[str, str, float]]:
        """(option, key of the result, limit) of those that are set."""
        if self.kl is not None:
            yield "--max-kl", "kl_mean", self.kl
        if self.ppl_increase is not None:
            yield "--max-ppl-increase", "perplexity_increase", self.ppl_increase

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def missed(self, result: Mapping[str, Any]) -> list[str]:
        """A sentence for every limit that the result of a measurement does not keep."""
        sentences = []
        for option, key, limit in self:
            value, low, high = (number(result, name) for name in (key, f"{key}_interval.0", f"{key}_interval.1"))
            worst = [v for v in (value, high) if v is not None]
            if worst and all(v <= limit for v in worst):
                continue
            interval = "" if low is None or high is None else f", 95 % interval {_said(low)} … {_said(high)}"
            about = "was not measured" if value is None else f"is {_said(value)}{interval}"
            rule = " (the upper end counts)" if value is not None and value <= limit else ""
            sentences.append(f"{option} {limit:g} was missed: {key} {about}{rule}.")
        return sentences


def check_limits(kind: str, max_kl: float | None, max_ppl_increase: float | None) -> None:
    """Refuse, before any work, limits that cannot be measured on this kind of model.

    Args:
        kind: "language model" or "encoder", as the comparison that fits the model says of itself.
        max_kl, max_ppl_increase: the limits, or None.

    Raises:
        SchemeError: a limit is set and the model has no distribution over tokens.
    """
    asked = list(Limits(max_kl, max_ppl_increase))
    if asked and kind != MEASURES_KL:
        option, key, _ = asked[0]
        raise SchemeError(
            f"{option} cannot be checked: this is no language model, so it has no {key}; its outputs are compared by cosine and "
            f"relative error. Leave the limit out, and read the numbers that are reported."
        )


def _said(value: float) -> str:
    return "no number" if math.isnan(value) else f"{value:.6g}".replace("inf", "∞")
