"""The limits that a user sets, and the exit status when one is missed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from arrondi.cli.answers import note

if TYPE_CHECKING:
    from arrondi.measure.limits import Limits

MISSED = 3
"""Exit status when a quality limit that the user set was missed."""


def limits_of(max_kl: float | None, max_ppl_increase: float | None) -> Limits:
    """The limits of the options; the module behind them is imported when it is needed."""
    from arrondi.measure.limits import Limits

    return Limits(max_kl, max_ppl_increase)


def hold_to(result: dict[str, Any], limits: Limits, written: str) -> None:
    """Exit with status 3 when a limit was missed."""
    missed = limits.missed(result)
    if missed:
        note(" ".join(filter(None, [*missed, written, "Use more bits, smaller groups or a better method."])))
        raise typer.Exit(MISSED)
