"""Recipes: the user's rules, and the selectors in them.

Owns: `Rule`, `Recipe` and `matches`. A rule says which weights become what by which method; the later rule wins. Selectors
follow compressed-tensors: a class name, an exact module or tensor name, or `re:` and a pattern matched from the start.
`Linear` stands for every weight that multiplies activations: linears, Conv1D, fused experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arrondi.errors import FileFormatError, SchemeError
from arrondi.formats import LayerScheme, parse_scheme
from arrondi.rounding import check_options, get_method


@dataclass(frozen=True)
class Rule:
    """Weights that match `targets` become `scheme` by `method`. A scheme of None leaves them alone."""

    scheme: LayerScheme | None
    method: str = "rtn"
    targets: tuple[str, ...] = ("Linear",)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_method(self.method)
        check_options(self.method, self.options)
        if self.scheme is None:
            return
        if self.scheme.outputs is not None or self.scheme.kv is not None:
            raise SchemeError(
                f"Scheme {self.scheme} rounds outputs or the key/value cache, which is not done yet. Drop 'o' and 'kv'."
            )
        if self.scheme.inputs is not None and self.scheme.inputs.dynamic is not True:
            raise SchemeError(
                f"Scheme {self.scheme} asks for static scales of activations, which are not computed yet. Drop 'static': the scales then follow each input."
            )


@dataclass(frozen=True)
class Recipe:
    """Rules in order, and what stays as it is whatever the rules say. `ignore=None` means the output head."""

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] | None = None

    @classmethod
    def simple(
        cls,
        scheme: str,
        method: str = "rtn",
        *,
        group_size: int | None = None,
        targets: Iterable[str] = ("Linear",),
        ignore: Iterable[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """One rule, as the command line gives it."""
        layer = parse_scheme(scheme)
        if group_size is not None:
            layer = layer.with_group_size(group_size)
        rule = Rule(layer, method.lower(), tuple(targets), dict(options or {}))
        return cls((rule,), None if ignore is None else tuple(ignore))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe file: JSON with `rules` (each with scheme, method, targets, group_size, options) and `ignore`.

        Raises:
            FileFormatError: not there, not JSON, unknown keys.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            rules = []
            for entry in document["rules"]:
                unknown = entry.keys() - {"scheme", "method", "targets", "group_size", "options"}
                if unknown:
                    raise KeyError(f"unknown key {sorted(unknown)[0]!r} in a rule")
                scheme = None if entry["scheme"] is None else parse_scheme(entry["scheme"])
                if scheme is not None and "group_size" in entry:
                    scheme = scheme.with_group_size(entry["group_size"])
                rules.append(
                    Rule(
                        scheme,
                        entry.get("method", "rtn"),
                        _words(entry.get("targets", "Linear")),
                        entry.get("options", {}),
                    )
                )
            unknown = document.keys() - {"rules", "ignore"}
            if unknown:
                raise KeyError(f"unknown key {sorted(unknown)[0]!r}")
            ignore = None if document.get("ignore") is None else _words(document["ignore"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SchemeError):
                raise
            raise FileFormatError(f"{path}: not a recipe ({error}). Example: {_EXAMPLE}") from error
        return cls(tuple(rules), ignore)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` and the run's key record."""
        return {
            "rules": [
                {
                    "scheme": None if r.scheme is None else str(r.scheme),
                    "method": r.method,
                    "targets": list(r.targets),
                    "options": dict(r.options),
                }
                for r in self.rules
            ],
            "ignore": None if self.ignore is None else list(self.ignore),
        }


_EXAMPLE = '{"rules": [{"scheme": "W4A16", "method": "gptq"}, {"scheme": "W8A16", "targets": ["re:.*down_proj"]}]}'


def _words(selectors: Any) -> tuple[str, ...]:
    """One selector or a list of them."""
    found = (selectors,) if isinstance(selectors, str) else tuple(selectors)
    if not all(isinstance(s, str) for s in found):
        raise TypeError(f"selectors are words, got {selectors!r}")
    return found


def matches(selector: str, names: Iterable[str], classes: Iterable[str]) -> bool:
    """Whether a selector picks something with these names (module, tensor, …) and class names.

    Raises:
        SchemeError: a pattern that is no regular expression.
    """
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise SchemeError(
                f"Selector {selector!r} is not a regular expression: {error}. Escape dots and brackets with a backslash."
            ) from error
        return any(pattern.match(name) for name in names)
    return selector in classes or selector in names
