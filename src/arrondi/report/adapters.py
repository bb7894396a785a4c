"""What `adapt init` and `adapt merge` print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arrondi.report.rows import Rows, console, say


def print_start(result: Mapping[str, Any]) -> None:
    """Where an adapter starts."""
    out = console()
    rows = Rows(
        f"{result['init']}, rank {result['rank']}", ("layer", "rounded alone", "with adapter", "nuclear norm less")
    )
    for row in [*result["layers"], {**result, "name": "mean"}]:
        less = "" if row["nuclear_reduction"] is None else f"{100 * row['nuclear_reduction']:.1f} %"
        rows.add(row["name"], f"{row['rounded_error']:.4f}", f"{row['error']:.4f}", less)
    rows.show(out)
    for what, name in (("base", "base alone"), ("start", "base and adapter")):
        if what in result:
            say(out, f"{name}: {_measured(result[what])}")


def print_merge(result: Mapping[str, Any]) -> None:
    """What merging cost."""
    out = console()
    rows = Rows(f"{result['merged']} layers merged", ("layer", "SQNR dB"))
    for row in [*result["layers"], {"name": "all", "sqnr_db": result["sqnr_db"]}]:
        rows.add(row["name"], "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}")
    rows.show(out)
    if "kl_mean" in result:
        say(out, f"against base and adapter: {_measured(result)}")
    if "not_measured" in result:
        say(out, f"not measured on text: {result['not_measured']}")


def _measured(said: Mapping[str, Any]) -> str:
    parts = [f"KL {said['kl_mean']:.5f}"] if "kl_mean" in said else []
    if "perplexity" in said:
        parts.append(f"perplexity {said['perplexity']:.3f} (reference {said['reference_perplexity']:.3f})")
    return ", ".join(parts) or "no measure of this model"
