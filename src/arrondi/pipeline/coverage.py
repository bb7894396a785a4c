"""What a run has learned of its calibration data: which weights they reached, and how far statistics move inside them.

Owns: `coverage`, from the rows of a report, so that a run that was continued says the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from arrondi.calibration import Moved
from arrondi.pipeline.resolve import PlannedTensor
from arrondi.pipeline.statistics import FEW

_NAMED: Final = 20
"""Weights that the report names."""
MOVES: Final = 0.1
"""Change of second moments between two halves of the text, median over weights, from which on the report warns. On a small language
model GPTQ at 3 bits loses a third more than it must where it is 0.1, and nearly twice as much at 0.12."""
ENOUGH: Final = 10
"""Tokens for every input at which the loss is within some percent of that on as much text as one likes."""


def coverage(
    planned: Sequence[PlannedTensor], rows: Sequence[Mapping[str, Any]], learning: Collection[str]
) -> dict[str, Any]:
    """Facts about calibration for the report.

    Args:
        planned: the quantized tensors.
        rows: their lines of the report.
        learning: names of those whose method learns from second moments of inputs; the others are told of, and not warned of.

    Returns:
        experts: matrices of stacks, how many tokens the model sent to them (least, median, most), and how many were calibrated on all
            tokens instead; None where there are no stacks.
        thin: weights that fewer than `FEW` tokens for every input reached, so that their second moments say little; the worst named.
        moved: median and worst of `Moved` over weights, with the worst one's name; None where no halves were seen.
        warnings: sentences about what matters of this.
    """
    seen = [row for row in rows if row["calibration_tokens"] is not None]
    if not seen:
        return {}
    shapes = {t.name: t.sites[0].matrix_shape for t in planned}
    experts = [n for row in seen for n in row.get("expert_tokens", ())]
    thin = sorted(
        _thin([row for row in seen if row["name"] in learning], shapes),
        key=lambda one: (one["tokens"] / one["inputs"], one["name"]),
    )
    moved = {field: _spread(seen, field) for field in Moved._fields}
    facts = {
        "experts": _counted(experts, sum(len(r.get("on_all_tokens", ())) for r in seen)) if experts else None,
        "thin": {"weights": len(thin), "named": thin[:_NAMED]},
        "moved": None if None in moved.values() else moved,
    }
    return {**facts, "warnings": _warnings(facts, thin) if learning else []}


def _thin(rows: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Weights that too few tokens reached."""
    found = []
    for row in rows:
        name, inputs = row["name"], shapes[row["name"]][1]
        each, everywhere = row.get("expert_tokens"), row.get("on_all_tokens", ())
        reached = [(name, row["calibration_tokens"])]
        if each is not None:
            spelled = [name] if len(each) == 1 else [f"{name}[{i}]" for i in range(len(each))]
            reached = [(one, n) for i, (one, n) in enumerate(zip(spelled, each, strict=True)) if i not in everywhere]
        found += [{"name": n, "tokens": t, "inputs": inputs} for n, t in reached if t < FEW * inputs]
    return found


def _counted(tokens: Sequence[int], everywhere: int) -> dict[str, Any]:
    return {
        "matrices": len(tokens),
        "without": sum(n == 0 for n in tokens),
        "on_all_tokens": everywhere,
        "tokens": {"least": min(tokens), "median": int(statistics.median(tokens)), "most": max(tokens)},
    }


def _spread(rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, Any] | None:
    values = [(row["moved"][field], row["name"]) for row in rows if "moved" in row]
    if not values:
        return None
    worst, name = max(values)
    return {"median": round(statistics.median(v for v, _ in values), 4), "worst": round(worst, 4), "weight": name}


def _warnings(facts: Mapping[str, Any], thin: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    reached = [one for one in thin if one["tokens"]]  # of those without any token the report says more
    if reached:
        one = reached[0]
        found.append(
            f"{len(thin)} weights saw fewer than {FEW} calibration tokens for each of their inputs (the fewest: {one['tokens']:,} for {one['inputs']:,} inputs of {one['name']}). "
            f"Give {ENOUGH} times as many tokens as inputs."
        )
    moved = facts["moved"]
    if moved and moved["second_moments"]["median"] >= MOVES:
        share = moved["second_moments"]["median"]
        found.append(
            f"Second moments of inputs change by {100 * share:.0f} % (median over weights) from one half of the calibration text to the other, so they depend on which text was taken. Give more."
        )
    return found
