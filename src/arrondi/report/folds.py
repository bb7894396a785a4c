"""What `arrondi inspect --folds` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arrondi.report.rows import Rows, console, say

_NAMED = 6
"""Consumers that are listed by name."""


def print_folds(document: Mapping[str, Any]) -> None:
    """Which layers read one activation, what makes it, and why it cannot be scaled if it cannot."""
    out = console()
    for unit in dict.fromkeys(fold["unit"] for fold in document["folds"]):
        own = [fold for fold in document["folds"] if fold["unit"] == unit]
        start = "" if unit is None else f"{document['units']}.{unit}."
        rows = Rows(start.rstrip(".") or "outside of the blocks", ("read by", "made by", "scales"))
        for fold in own:
            rows.add(_consumers(fold["consumers"], start), _producer(fold["producer"], start), _verdict(fold, start))
        rows.show(out)
    say(out, f"Scales can be folded for {document['foldable']} activations, not for {document['not_foldable']}.")


def _consumers(names: list[str], start: str) -> str:
    more = [f"{len(names) - _NAMED + 1} more"] if len(names) > _NAMED else []
    return ", ".join([n.removeprefix(start) for n in names[: _NAMED - 1 if more else None]] + more)


def _producer(producer: Mapping[str, Any] | None, start: str) -> str:
    if producer is None:
        return "–"
    name = producer["param"].removeprefix(start)
    name += "" if producer["index"] is None else f"[{producer['index']}]"
    if producer["rows"] is not None:
        name += f" rows {producer['rows'][0]}–{producer['rows'][1] - 1}"
    return f"{producer['offset']:g} + {name}" if producer["offset"] else name


def _verdict(fold: Mapping[str, Any], start: str) -> str:
    if fold["reason"] is not None:
        return f"no: {fold['reason'].replace(start, '') if start else fold['reason']}"
    channels = fold["channels"]
    if channels == "same":
        return "fold"
    return f"fold, {channels}" if isinstance(channels, str) else "fold, channels in another order"
