"""Who can read a layout, in sentences: at the end of a run, and before it when nobody but arrondi can.

Readers come as rows of {reader, ok, sentence} (`arrondi.checkpoint.readers.Verdict`); a sentence stands by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def readers_lines(document: Mapping[str, Any]) -> list[str]:
    """The sentences for people: the layout with those who read it, then what there is to know of each reader."""
    rows = document["readers"]
    able = [row["reader"] for row in rows if row["ok"]]
    lines = [f"Layout {document['layout']}, read by {', '.join(able) or 'nobody that is known'}."]
    plain = {f"{reader} {verb} it." for reader in able for verb in ("reads", "loads")}
    return lines + [row["sentence"] for row in rows if row["sentence"] and row["sentence"] not in plain]


def sole_reader(document: Mapping[str, Any]) -> str | None:
    """The warning before a run whose output only arrondi will read; None where others read it, too."""
    if [row["reader"] for row in document["readers"] if row["ok"]] != ["arrondi"]:
        return None
    return (
        f"only arrondi will read the output: no other reader takes what the layout {document['layout']!r} stores. "
        "Other programs may load it as random weights. `arrondi dequantize` makes plain weights of it."
    )
