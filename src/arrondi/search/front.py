"""What rows say: which are on the front of size and loss, which are level, and which to take.

Owns: `judge`, which marks rows, `named`, a row in words, and `answer`, the sentence. A row's loss is `kl_mean`, or `relative_error` of models that give vectors.
Two rows are level where their 95 % intervals overlap: the text cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from arrondi.documents import number

LOSSES: Final = {"kl_mean": "KL", "relative_error": "relative error"}
"""Key of what is lost → its name for people."""
_SAME_SIZE: Final = 1.001
"""Files that differ by less count as of one size."""


def loss_key(row: Mapping[str, Any]) -> str:
    """Under which key a row has its loss."""
    return next(key for key in LOSSES if key in row)


def loss(row: Mapping[str, Any]) -> float:
    """What a row lost; infinite where it is no number."""
    found = number(row, loss_key(row))
    return math.inf if found is None or math.isnan(found) else found


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `pareto` (nobody is smaller and loses no more, or loses less and is no larger) and `level_with_best`.

    Args:
        rows: those without numbers have another status than "done"; for them both are null.
    """
    done = [row for row in rows if row["status"] == "done"]
    best = {id(row): group[0] for group in sizes(done) for row in group}
    judged = []
    for row in rows:
        on_front = level = None
        if row["status"] == "done":
            on_front = not any(_beats(other, row) for other in done)
            level = level_with(row, best[id(row)])
        judged.append({**row, "pareto": on_front, "level_with_best": level})
    return judged


def sizes(done: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of one size together, the smallest size first; in each the one that loses least first."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in sorted(done, key=lambda row: (row["output_bytes"], loss(row))):
        if groups and row["output_bytes"] <= _SAME_SIZE * groups[-1][0]["output_bytes"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [sorted(group, key=lambda row: (loss(row), row["output_bytes"])) for group in groups]


def level_with(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the intervals of two losses overlap."""
    (low, high), (least, most) = _interval(row), _interval(other)
    return low <= most and least <= high


def answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which method to take, at each size, in one sentence."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "No method could be compared."
    said = "; ".join(_said(group) for group in sizes(done))
    return f"{said[0].upper()}{said[1:]}."


def _said(group: Sequence[Mapping[str, Any]]) -> str:
    best, *others = group
    level = [named(row, best) for row in others if level_with(row, best)]
    bits = best["model_bits_per_weight"]
    size = f"{best['output_bytes'] / 1e6:,.1f} MB ({bits:.3f} bits a weight of the whole file)"
    lost = f"{LOSSES[loss_key(best)]} {loss(best):.3g}".replace("inf", "∞")
    said = f"at {size} {named(best)} {'loses least' if others else 'is the only one'} ({lost})"
    return f"{said}, level with {' and '.join(level)} within the noise" if level else said


def named(row: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """A row in words, by scheme, method and embeddings; without what it shares with another.

    Args:
        row: see `Candidate.names`; what is missing is not said.
        beside: a row that was named just before.
    """
    way = f"the preset {row['method']}" if row.get("preset") else str(row["method"])
    said = way if beside is not None and beside["scheme"] == row["scheme"] else f"{row['scheme']} by {way}"
    table = row.get("embeddings")
    if beside is not None and beside.get("embeddings") == table:
        return said
    if table is None:
        return said if beside is None else f"{said} with embeddings as they are"
    return f"{said} with embeddings in {table}"


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    smaller, better = one["output_bytes"] - other["output_bytes"], loss(one) - loss(other)
    if math.isnan(better):  # both are infinite
        better = 0.0
    return smaller <= 0 and better <= 0 and (smaller < 0 or better < 0)


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    key = f"{loss_key(row)}_interval"
    low, high = number(row, f"{key}.0"), number(row, f"{key}.1")
    unknown = low is None or high is None or math.isnan(low) or math.isnan(high)
    return (loss(row), loss(row)) if unknown or low is None or high is None else (low, high)
