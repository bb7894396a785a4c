"""Who can read a layout, in sentences: at the end of a run, and before it when nobody but arrondi can.

Readers come as rows of {reader, ok, sentence}, or as their names with commas between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def readers_lines(document: Mapping[str, Any]) -> list[str]:
    """The sentences for people: the layout with those who read it, then a line for each reader that has something to say."""
    rows = _rows(document)
    able = [row["reader"] for row in rows if row["ok"]]
    lines = [f"Layout {document['layout']}, read by {', '.join(able) or 'nobody that is known'}."]
    return lines + [f"{row['reader']}: {row['sentence']}" for row in rows if row.get("sentence")]


def sole_reader(document: Mapping[str, Any]) -> str | None:
    """The warning before a run whose output only arrondi will read; None where others read it, too."""
    if [row["reader"] for row in _rows(document) if row["ok"]] != ["arrondi"]:
        return None
    return (
        f"only arrondi will read the output: no other reader takes what the layout {document['layout']!r} stores. "
        "Other programs may load it as random weights. `arrondi dequantize` makes plain weights of it."
    )


def _rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    readers = document.get("readers") or []
    if isinstance(readers, str):
        return [{"reader": name.strip(), "ok": True} for name in readers.split(",")]
    return list(readers)
