"""What became of every tensor of a model that was put into another layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arrondi.report.tables import console, say


def print_conversion(document: Mapping[str, Any]) -> None:
    """The tensors whose values changed, and how many of each verdict there are."""
    out = console()
    for row in document["tensors"]:
        if row["verdict"] in ("rescaled", "requantized"):
            lost = f", {row['sqnr_db']} dB" if row["sqnr_db"] is not None else ""
            say(
                out,
                f"{row['name']}: {row['verdict']}, {row['from']} → {row['to']}, at most {row['max_error']:.3g} off{lost}",
            )
    counts = [f"{document[v]} {v}" for v in ("exact", "rescaled", "requantized", "copied") if document[v]]
    say(out, f"{', '.join(counts)}; {document['to']}, {document['bytes'] / 1e6:,.1f} MB.")
