"""What consumers compute of an output, beside what its codes mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arrondi.report.tables import console, say


def print_verification(document: Mapping[str, Any]) -> None:
    """A line for each consumer, the reason of its bound, and who was not asked."""
    out = console()
    for row in document["consumers"]:
        who = " ".join(filter(None, (row["consumer"], row["version"])))
        if row["relative_difference"] is None:
            say(out, f"{who}: FAILED: {row['failure']}.")
            continue
        found = f"at most {row['max_difference']:.3g} off, {row['relative_difference']:.2g} of the outputs' spread"
        say(out, f"{who}: {'ok' if row['ok'] else 'MISMATCH'}, {found}; expected up to {row['bound']:.2g}.")
        say(out, f"  {row['reason']}")
        if row["failure"]:
            say(out, f"  {who}: {row['failure']}.")
    for row in document["skipped"]:
        say(out, f"Not asked: {row['reason']}")
    say(out, f"Asked: {document['prompt']}.")
