"""JSON documents that every JSON reader takes: no NaN, no Infinity.

Owns: `finite`, which makes plain data of a result, and `to_json`. JSON has no word for numbers that are none, and Python's
would be refused elsewhere. Such a number becomes null, and the object that holds it says what it was:

    {"kl_mean": null, "kl_mean_interval": [0.2, null], "not_finite": {"kl_mean": "infinity", "kl_mean_interval.1": "infinity"}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

NOT_FINITE: Final = "not_finite"
"""Key of the names of an object's numbers that are none, each with "infinity", "-infinity" or "nan"."""


def finite(document: Any) -> Any:
    """The same plain data with null for every number that is none, and `not_finite` beside it; the input is not changed.

    >>> finite({"kl_mean": float("inf"), "tokens": 3})
    {'kl_mean': None, 'tokens': 3, 'not_finite': {'kl_mean': 'infinity'}}
    """
    if isinstance(document, Mapping):
        lost: dict[str, str] = {}
        plain = {str(key): _value(value, str(key), lost) for key, value in document.items()}
        return {**plain, NOT_FINITE: {**plain.get(NOT_FINITE, {}), **lost}} if lost else plain
    return _value(document, "", {})


def to_json(document: Any, *, ascii_only: bool = False) -> str:
    """One line of JSON; letters beyond ASCII as they are, or escaped."""
    return json.dumps(finite(document), ensure_ascii=ascii_only, allow_nan=False)


def number(document: Mapping[str, Any], key: str) -> float | None:
    """A number of a document that went through `finite`, as it was: `number(d, "kl_mean")`, `number(d, "kl_mean_interval.1")`.

    None where there is no such number.
    """
    word = document.get(NOT_FINITE, {}).get(key)
    if word is not None:
        return float(word)
    name, _, index = key.partition(".")
    value = document.get(name)
    if index:
        value = value[int(index)] if isinstance(value, (list, tuple)) and int(index) < len(value) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _value(value: Any, path: str, lost: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, (list, tuple)):
        return [_value(item, f"{path}.{i}" if path else str(i), lost) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost[path] = "nan" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
        return None
    return value
