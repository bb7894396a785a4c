"""What a run has learned of its calibration data: which weights they reached, and how far statistics move inside them.

Owns: `coverage`, from the rows of a report, so that a run that was continued says the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from arrondi.calibration import Moved
from arrondi.pipeline.resolve import PlannedTensor

_NAMED: Final = 20
"""Weights that the report names."""
MOVES: Final = 0.25
"""Change of second moments between two halves of the text, median over weights, from which on the report warns."""


def coverage(planned: Sequence[PlannedTensor], rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Facts about calibration for the report, and sentences of warning.

    Args:
        planned: the quantized tensors.
        rows: their lines of the report.

    Returns:
        experts: matrices of stacks, and how many tokens reached them (least, median, most); None where there are no stacks.
        thin: weights that fewer tokens reached than they have inputs, so that their second moments say little; the worst named.
        moved: median and worst of `Moved` over weights, with the worst one's name; None without calibration.
    """
    seen = [row for row in rows if row["calibration_tokens"] is not None]
    if not seen:
        return {}, []
    shapes = {t.name: t.sites[0].matrix_shape for t in planned}
    experts = [n for row in seen for n in row.get("expert_tokens", ())]
    thin = sorted(_thin(seen, shapes), key=lambda one: (one["tokens"], one["name"]))
    moved = {field: _spread(seen, field) for field in Moved._fields}
    facts = {
        "experts": _counted(experts) if experts else None,
        "thin": {"weights": len(thin), "named": thin[:_NAMED]},
        "moved": None if None in moved.values() else moved,
    }
    return facts, _warnings(facts)


def _thin(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Weights that fewer tokens reached than they have inputs."""
    found = []
    for row in rows:
        name, inputs = row["name"], shapes[row["name"]][1]
        each = row.get("expert_tokens")
        reached = (
            [(name, row["calibration_tokens"])] if each is None else [(f"{name}[{i}]", n) for i, n in enumerate(each)]
        )
        found += [{"name": n, "tokens": tokens, "inputs": inputs} for n, tokens in reached if tokens < inputs]
    return found


def _counted(tokens: Sequence[int]) -> dict[str, Any]:
    return {
        "matrices": len(tokens),
        "without": sum(n == 0 for n in tokens),
        "tokens": {"least": min(tokens), "median": int(statistics.median(tokens)), "most": max(tokens)},
    }


def _spread(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any] | None:
    values = [(row["moved"][field], row["name"]) for row in rows if "moved" in row]
    if not values:
        return None
    worst, name = max(values)
    return {"median": round(statistics.median(v for v, _ in values), 4), "worst": round(worst, 4), "weight": name}


def _warnings(facts: Mapping[str, Any]) -> list[str]:
    found = []
    thin = [one for one in facts["thin"]["named"] if one["tokens"]]
    if thin:
        one, count = thin[0], facts["thin"]["weights"]
        found.append(
            f"{count} weights saw fewer tokens than they have inputs (fewest, but not none: {one['tokens']} tokens for {one['inputs']} inputs of {one['name']}). "
            "Their statistics are thin; give more text."
        )
    moved = facts["moved"]
    if moved and moved["second_moments"]["median"] >= MOVES:
        share = moved["second_moments"]["median"]
        found.append(
            f"Second moments of inputs change by {100 * share:.0f} % (median over weights) from one half of the calibration text to the other. "
            "Give more text, or text of one kind."
        )
    return found
