"""The lists of blocks in a model: `find_lists`. No model family is named."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.parametrize import ParametrizationList

_SHARE = 16
"""A list that holds less than the largest one's share of parameters by this factor is no chain of blocks."""


def find_lists(model: torch.nn.Module) -> list[str]:
    """Names of the outermost module lists, those with most parameters first; blocks of several classes are a list too."""
    lists = [
        n for n, m in model.named_modules()
        if isinstance(m, torch.nn.ModuleList) and not isinstance(m, ParametrizationList) and len(m)
    ]  # fmt: skip
    sizes: dict[str, int] = {}
    for name in lists:
        if not any(name.startswith(other + ".") for other in lists if other != name):
            members: Any = model.get_submodule(name)
            sizes[name] = sum(p.numel() for p in members.parameters())
    largest = max(sizes.values(), default=0)
    return sorted((n for n, s in sizes.items() if s * _SHARE > largest), key=lambda n: -sizes[n])
