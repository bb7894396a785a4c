"""Which group of a config a module belongs to, exactly as the package decides.

Owns: `match` and `is_ignored`. A target is an exact module path, a pattern (`re:…`, matched from the start of the path) or a class
name. Exact names win over patterns and patterns over classes; among several of one kind the first in the alphabet wins; of two
groups with the same target the later one has it.

Source: compressed_tensors/utils/match.py (`match_targets`) and quantization/lifecycle/apply.py of version 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Group = TypeVar("Group")


def match(path: str, classes: Iterable[str], groups: Mapping[str, Group]) -> Group | None:
    """The group of a module, None if none has it.

    Args:
        path: the module's path in the model.
        classes: names of its class and of the classes above it.
        groups: target → group, later groups put over earlier ones.
    """
    ordered = sorted(groups, key=lambda target: ("re:" in target, target))
    names = set(classes)
    for target in ordered:
        if names_match(path, target):
            return groups[target]
    return next((groups[target] for target in ordered if target in names), None)


def is_ignored(path: str, classes: Iterable[str], ignore: Sequence[str]) -> bool:
    """Whether an entry of `ignore` names the module or one of its classes."""
    names = set(classes)
    return any(names_match(path, entry) or entry in names for entry in ignore)


def names_match(path: str, target: str) -> bool:
    """Whether an exact name or a pattern is that of the module."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return target == path
