"""What the report says of calibration, and when it warns."""

from __future__ import annotations

from typing import Any

from arrondi.pipeline.coverage import MOVES, coverage
from arrondi.report.calibration import calibration_lines


class Tensor:
    """What is asked of a planned tensor."""

    def __init__(self, name: str, shape: tuple[int, int]) -> None:
        self.name, self.matrix_shape = name, shape
        self.sites = (self,)


def row(name: str, tokens: int | None, moved: float | None = 0.01, experts: list[int] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "calibration_tokens": tokens}
    if moved is not None:
        found["moved"] = {"second_moments": moved, "absmax": moved / 2}
    return {**found, **({"expert_tokens": experts} if experts else {})}


PLANNED: Any = [Tensor("q", (4, 64)), Tensor("experts", (4, 32))]
BOTH = {"q", "experts"}


def test_experts_and_weights_that_few_tokens_reached() -> None:
    rows = [row("q", 512), row("experts", 0, None, [0, 127, 128, 400])]
    facts = coverage(PLANNED, rows, BOTH)
    warnings = facts["warnings"]
    assert facts["experts"] == {
        "matrices": 4,
        "without": 1,
        "on_all_tokens": 0,
        "tokens": {"least": 0, "median": 127, "most": 400},
    }
    assert facts["thin"]["weights"] == 2
    assert facts["thin"]["named"] == [
        {"name": "experts[0]", "tokens": 0, "inputs": 32},
        {"name": "experts[1]", "tokens": 127, "inputs": 32},
    ]
    assert len(warnings) == 1 and "127 for 32 inputs of experts[1]" in warnings[0]
    assert coverage(PLANNED, rows, {"q"})["warnings"] == []
    assert coverage(PLANNED, [row("experts", 128, 0.01, [128, 128])], BOTH)["warnings"] == []


def test_statistics_that_move_are_said_and_warned_of() -> None:
    facts = coverage(PLANNED, [row("q", 512, 0.1), row("experts", 512, 0.04)], BOTH)
    assert facts["moved"]["second_moments"] == {"median": 0.07, "worst": 0.1, "weight": "q"} and not facts["warnings"]
    rows = [row("q", 512, MOVES), row("experts", 512, MOVES)]
    warnings = coverage(PLANNED, rows, BOTH)["warnings"]
    assert len(warnings) == 1 and f"change by {100 * MOVES:.0f} %" in warnings[0]
    assert coverage(PLANNED, rows, ())["warnings"] == []


def test_without_calibration_nothing_is_said() -> None:
    assert coverage(PLANNED, [row("q", None, None)], BOTH) == {}


def test_the_sentences() -> None:
    text = {"text": "a.jsonl", "windows": 4, "window_tokens": 64, "tokens": 256, "distinct_tokens": 90, "vocabulary": 900, "vocabulary_share": 0.1, "documents": 7, "document_tokens": {"least": 3, "median": 9, "most": 1200}, "scripts": {"Latin": 0.75, "Han": 0.25}}  # fmt: skip
    learned = coverage(PLANNED, [row("q", 512, 0.1), row("experts", 1, 0.04, [1, 400])], BOTH)
    lines = calibration_lines({**text, **learned})
    assert lines[0] == "Calibrated on 4 windows of 64 tokens of a.jsonl, from 7 documents of 3 to 1,200 tokens: 256 tokens, 90 distinct (10 % of the vocabulary); script: Latin 75 %, Han 25 %."  # fmt: skip
    assert lines[1] == "2 matrices of experts: 1 to 400 calibration tokens each, 200 in the middle."
    assert "second moments of inputs change by 7 % (worst 10 %, q), largest values by 4 %" in lines[2]
    ids = {**text, "vocabulary_share": None, "documents": None, "document_tokens": None, "scripts": None}
    assert calibration_lines(ids) == ["Calibrated on 4 windows of 64 tokens of a.jsonl: 256 tokens, 90 distinct."]
