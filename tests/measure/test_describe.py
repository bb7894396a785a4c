"""What is said of a calibration text."""

from __future__ import annotations

import pytest
import torch

from arrondi.measure.data import Windows
from arrondi.measure.describe import describe, scripts_of
from arrondi.measure.text import load_tokenizer
from arrondi.sample import sample_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße, œuvre, ﬁ; 123 !?", {"Latin": 1.0}),
        ("漢字とカナ", {"Han": 0.4, "Katakana": 0.4, "Hiragana": 0.2}),
        ("한국어 abc", {"Hangul": 0.5, "Latin": 0.5}),
        ("नमस्ते", {"Devanagari": 1.0}),
        ("ＡＢ ｱ ー", {"Latin": 0.5, "Katakana": 0.5}),
        ("1234 ...", {}),
        ("a" * 9999 + "я", {"Latin": 0.9999, "other": 0.0001}),
    ],
)
def test_scripts_are_shares_of_letters(text: str, expected: dict[str, float]) -> None:
    assert scripts_of(text) == expected


def test_facts_of_windows() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 9]])
    found = describe(Windows(ids, "x", "0", (2, 9, 4)), 8)
    assert found["tokens"] == 6 and found["distinct_tokens"] == 4 and found["vocabulary_share"] == 0.5
    assert found["documents"] == 3 and found["document_tokens"] == {"least": 2, "median": 4, "most": 9}
    assert found["window_tokens"] == 3 and found["scripts"] is None
    assert describe(Windows(ids, "x", "0"), None)["documents"] is None


def test_scripts_are_those_of_the_windows() -> None:
    tokenizer = load_tokenizer(sample_path())
    ids = torch.tensor([tokenizer("Once upon a time there was")["input_ids"]])
    assert describe(Windows(ids, "x", "0"), 512, tokenizer)["scripts"] == {"Latin": 1.0}
