"""What became of every tensor of a model that was put into another layout, and what differs between two models."""

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
    for note in document.get("notes", ()):
        say(out, note, warn=True)
    verdicts = ("exact", "rescaled", "requantized", "copied", "left_out")
    counts = [f"{document[v]} {v.replace('_', ' ')}" for v in verdicts if document.get(v)]
    say(out, f"{', '.join(counts)}; {document['to']}, {document['bytes'] / 1e6:,.1f} MB.")


def print_difference(document: Mapping[str, Any]) -> None:
    """The tensors that differ, and how many of each verdict there are."""
    out = console()
    for row in document["tensors"]:
        if row["verdict"] not in ("same codes", "same values"):
            apart = f", at most {row['max_error']:.3g} apart, {row['sqnr_db']} dB" if "max_error" in row else ""
            say(out, f"{row['name']}: {row['verdict']} ({row['first']}, {row['second']}){apart}")
    verdicts = dict.fromkeys(row["verdict"] for row in document["tensors"])
    say(out, ", ".join(f"{document[v.replace(' ', '_')]} {v}" for v in verdicts) + ".")
