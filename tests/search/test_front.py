"""Judgement on rows made by hand."""

from __future__ import annotations

from typing import Any

from arrondi.documents import finite
from arrondi.search.front import answer, judge, sizes


def row(scheme: str, method: str, size: int, kl: float, spread: float = 0.0) -> dict[str, Any]:
    numbers = {"kl_mean": kl, "kl_mean_interval": [kl - spread, kl + spread]}
    sized = {"output_bytes": size, "model_bits_per_weight": size / 1e6}
    return finite({"scheme": scheme, "method": method, "status": "done", **numbers, **sized})


REFUSED = {"scheme": "NF4", "method": "hqq", "status": "refused", "reason": "no", "kl_mean": None, "output_bytes": None}


def test_the_front_is_what_nothing_beats() -> None:
    rows = [
        row("W4", "rtn", 4_000_000, 0.010),
        row("W4", "gptq", 4_000_000, 0.006),
        row("W3", "gptq", 3_000_000, 0.030),
        row("W3", "big", 3_500_000, 0.040),  # larger than W3 gptq and worse
        row("W2", "rtn", 2_000_000, float("inf")),
        row("W2", "worse", 2_500_000, float("inf")),
        REFUSED,
    ]
    judged = judge(rows)
    assert [r["pareto"] for r in judged] == [False, True, True, False, True, False, None]
    # Equal rows are both on the front; any order of rows gives the same marks.
    twins = judge([row("W4", "a", 10, 0.1), row("W4", "b", 10, 0.1)])
    assert [r["pareto"] for r in twins] == [True, True]
    assert [r["pareto"] for r in judge(rows[::-1])] == [r["pareto"] for r in judged][::-1]


def test_overlapping_intervals_are_level() -> None:
    rows = [
        row("W4", "gptq", 4_000_000, 0.0060, 0.0010),
        row("W4", "awq", 4_000_400, 0.0075, 0.0010),
        row("W4", "rtn", 4_000_000, 0.0100, 0.0010),
        row("W3", "gptq", 3_000_000, 0.0060, 0.0010),
    ]
    assert [r["level_with_best"] for r in judge(rows)] == [True, True, False, True]
    assert [[r["method"] for r in group] for group in sizes(rows)] == [["gptq"], ["gptq", "awq", "rtn"]]
    said = answer(rows)
    assert said.startswith("At 3.0 MB") and said.endswith(".") and said.count(". ") == 0
    assert "W3 by gptq is the only one (KL 0.006)" in said
    assert "W4 by gptq loses least (KL 0.006), level with awq within the noise" in said
    assert "rtn" not in said


def test_nothing_done_is_said() -> None:
    assert answer([REFUSED]) == "No method could be compared."
    assert "∞" in answer([row("W2", "rtn", 1_000_000, float("inf"))])
