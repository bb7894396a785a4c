"""What `arrondi inspect --outliers` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arrondi.report.rows import Rows, console, say

_NAMED = 4
"""Channels that are listed."""


def print_outliers(document: Mapping[str, Any]) -> None:
    """Every activation with its extremes, and what 8 bits would cost it."""
    out = console()
    rows = Rows(
        "inputs", ("read by", "absmax", "median", "kurtosis", "channels > 20×", "int8 tensor", "token", "group of 128")
    )
    for row in document["inputs"]:
        names, large, error = row["read_by"], row["outliers"], row["int8_error"]
        more = f" +{len(names) - 1}" if len(names) > 1 else ""
        named = ", ".join(map(str, large[:_NAMED])) + (" …" if len(large) > _NAMED else "")
        rows.add(
            names[0].removesuffix(".weight") + more,
            f"{row['absmax']:.3g}",
            f"{row['median_channel']:.3g}",
            f"{row['kurtosis']:.3g}",
            f"{len(large)}: {named}" if large else "–",
            *(f"{100 * error[name]:.2g} %" for name in ("tensor", "token", "group")),
        )
    rows.show(out)
    worst = max(document["inputs"], key=lambda row: row["int8_error"]["tensor"])
    ways = worst["int8_error"]
    say(
        out,
        f"One scale a tensor costs the inputs of {worst['read_by'][0]} {100 * ways['tensor']:.2g} % of their energy, one a token "
        f"{100 * ways['token']:.2g} %, one for 128 columns {100 * ways['group']:.2g} % ({document['tokens']:,} tokens).",
    )
