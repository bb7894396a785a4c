"""What a caller gave, held against what a function or a dataclass says that it takes.

Owns: `check_arguments`, `check_fields`, `Between` and `said`. The annotations are the only description of kinds and of ranges:
`damping: Annotated[float, Between(0, 1e6)] = 0.01`.
"""

from __future__ import annotations

import collections.abc
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from arrondi.errors import ArrondiError, SchemeError, unknown

_LONGEST: Final = 60
"""Characters of a value that a message quotes."""
_WORDS: Final = {
    type(None): "None", bool: "True or False", int: "a whole number", float: "a number", str: "a word",
    collections.abc.Callable: "a function", collections.abc.Mapping: "a dict", collections.abc.Iterable: "a list",
}  # fmt: skip


class Between(NamedTuple):
    """The least and the largest number, both allowed."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


def bounds_of(annotation: Any) -> Between | None:
    """The bounds in an annotation, if it has some."""
    return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, Between)), None)


def check_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], error: type[ArrondiError] = SchemeError
) -> None:
    """Refuse arguments of another kind than a function's annotations say.

    Args:
        function: whose annotations count.
        given: its arguments by name, for example its `locals()` before anything else; others are not looked at.

    Raises:
        ArrondiError: of the class `error`; names the argument, what it takes and what it got.
    """
    for name, hint in _hints(function).items():
        if name not in given or name == "return" or _fits(given[name], hint):
            continue
        if get_origin(hint) is Literal and isinstance(given[name], str):
            raise unknown(name, given[name], get_args(hint), error)
        raise error(f"{name} takes {_kind(hint)}, got {said(given[name])}.")


def check_fields(instance: Any, error: type[ArrondiError] = SchemeError) -> None:
    """The same for the fields of a dataclass, in its `__post_init__`."""
    owner: Any = type(instance)
    hints = _hints(owner)
    for field in fields(instance):
        value = getattr(instance, field.name)
        if not _fits(value, hints[field.name]):
            raise error(f"{type(instance).__name__}: {field.name} takes {_kind(hints[field.name])}, got {said(value)}.")


def said(value: object) -> str:
    """A value in one short line: its type, and the value itself where it is a plain one."""
    kind = type(value).__name__
    if not isinstance(value, str | int | float | bytes | type(None)):
        return f"an object of the class {kind}" if kind not in ("list", "tuple", "dict") else f"a {kind}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@functools.lru_cache(maxsize=256)
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        bounds = bounds_of(hint)
        return _fits(value, parts[0]) and (bounds is None or bounds.low <= value <= bounds.high)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple and isinstance(value, tuple):
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(kinds) == len(value) and all(_fits(v, k) for v, k in zip(value, kinds, strict=True))
    return isinstance(value, origin or hint)


def _kind(hint: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_kind(parts[0])} {bounds_of(hint) or ''}".strip()
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in parts))
    if origin is tuple:
        return "a tuple"
    kind = origin or hint
    return _WORDS.get(kind) or f"a {kind.__name__}"
