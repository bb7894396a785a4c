"""JSON documents without NaN and Infinity."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrondi.documents import finite, number, to_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def refuse(word: str) -> None:
    raise AssertionError(f"not JSON: {word}")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))
def test_every_document_is_json_and_keeps_its_numbers(document: dict[str, Any]) -> None:
    read = json.loads(to_json(document), parse_constant=refuse)
    assert read == finite(document) == finite(read)
    for key, value in document.items():
        if isinstance(value, float):
            again = number(read, key)
            assert again == value or math.isnan(value)


def test_what_was_lost_stands_beside() -> None:
    document = {"a": math.inf, "b": {"c": (1.0, -math.inf), "d": math.nan}, "e": [{"f": math.nan}], "g": 1}
    assert finite(document) == {
        "a": None,
        "b": {"c": [1.0, None], "d": None, "not_finite": {"c.1": "-infinity", "d": "nan"}},
        "e": [{"f": None, "not_finite": {"f": "nan"}}],
        "g": 1,
        "not_finite": {"a": "infinity"},
    }


@pytest.mark.parametrize(("key", "value"), [("a", 1.5), ("a.0", None), ("b.1", 3.0), ("b.2", None), ("c", None), ("d", None), ("t", None)])  # fmt: skip
def test_numbers_are_found_by_their_place(key: str, value: float | None) -> None:
    assert number({"a": 1.5, "b": [2, 3], "c": "x", "t": True}, key) == value
