"""A JSON object of which every key is claimed by somebody, or refused.

Owns: `Claims`, and `check_described` and `check_ignored` of our own descriptions. A layout asks for the keys that it knows, each with the kind of its value, names those that change no number, and
refuses the rest with `done`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from arrondi.errors import FileFormatError

_LARGE: Final = 3.4e38
"""The largest float32."""


class Claims:
    """The keys of one object of a config, read once.

    Args:
        value: the JSON value.
        where: its place in config.json, for messages.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise FileFormatError(f"{where} should be an object, found {_said(value)}.")
        self._left: dict[str, Any] = dict(value)
        self._where = where

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def number(self, key: str, default: int | None, allowed: Iterable[int] | None = None, least: int = 0) -> int:
        """A whole number: one of `allowed`, or any from `least` to 2³¹; without a default the key has to be there."""
        value = self._take(key, default)
        some = None if allowed is None else sorted(allowed)
        fits = type(value) is int and (value in some if some is not None else least <= value < 2**31)
        if not fits:
            raise self._wrong(key, value, f"one of {', '.join(map(str, some))}" if some else f"a whole number from {least}")  # fmt: skip
        return int(value)

    def word(self, key: str, default: str | None, allowed: Iterable[str]) -> str:
        """One of some words, in any case; without a default the key has to be there."""
        value = self._take(key, default)
        known = list(allowed)
        if not isinstance(value, str) or value.lower() not in known:
            raise self._wrong(key, value, f"one of {', '.join(map(repr, known))}")
        return value.lower()

    def text(self, key: str, default: str | None = None) -> str:
        """Any word; without a default the key has to be there."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a word")
        return value

    def words(self, key: str) -> list[str]:
        """A list of words; empty where the key is null or absent."""
        value = self._take(key, None)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, value, "a list of words")
        return value

    def numbers(self, key: str, default: list[int] | None = None) -> list[int]:
        """A list of whole numbers; without a default the key has to be there."""
        value = self._take(key, default)
        if not isinstance(value, list) or not all(type(n) is int for n in value):
            raise self._wrong(key, value, "a list of whole numbers")
        return value

    def real(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGE:
            raise self._wrong(key, value, "a number")
        return float(value)

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty where the key is null or absent."""
        value = self._take(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return value

    def only(self, key: str, *allowed: object) -> None:
        """A key that may be there to say that it is not used: null, or one of these values."""
        value = self._take(key, None)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise FileFormatError(f"{self._where}.{key} is {_said(value)}, which is not read here.")

    def remarks(self, keys: Iterable[str]) -> None:
        """Keys that say how the numbers were found, or how a runtime multiplies them, and change none of them."""
        for key in keys:
            self._left.pop(key, None)

    def done(self) -> None:
        """Refuse whatever nobody claimed."""
        if self._left:
            key = sorted(map(str, self._left))[0]
            raise FileFormatError(
                f"{self._where} has the key {key[:60]!r}, which is not known here. Remove it, or update arrondi."
            )

    def _take(self, key: str, default: Any) -> Any:
        value = self._left.pop(key, None)
        return default if value is None else value

    def _wrong(self, key: str, value: object, wanted: str) -> FileFormatError:
        found = "nothing" if value is None else _said(value)
        return FileFormatError(f"{self._where}.{key} should be {wanted}, found {found}.")


def check_described(name: str, facts: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse what describes a tensor if it has a key that `kinds` lacks, or a value of another kind.

    Raises:
        FileFormatError: it does.
    """
    for key, value in facts.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            raise FileFormatError(f"{name} has {key}: {value!r}, which is not known here.")


def check_ignored(ignore: object) -> None:
    """Refuse a list of what is not quantized that is no list of words.

    Raises:
        FileFormatError: it is none.
    """
    if not isinstance(ignore, list) or not all(isinstance(word, str) for word in ignore):
        raise FileFormatError("ignore should be a list of words.")


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """A pattern of module paths.

    Raises:
        FileFormatError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FileFormatError(f"{where}: {pattern[:60]!r} is no pattern (error: {error}).") from error


def _said(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
