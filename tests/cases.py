"""Cases chosen from a product: the default run takes few, `make test-full` takes all.

Owns: `pairwise` and `each_once`, lists of parameters of which those that are not chosen are marked `full`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes; every value of one meets every value of another in the default run.

    Greedy: a case is taken in the order of the product when it has the most pairs that no case before it has.
    """
    return _covering(2, axes)


def each_once(*axes: Iterable[Any]) -> list[Any]:
    """The product of the axes; every value of each is met in the default run."""
    return _covering(1, axes)


def _covering(strength: int, axes: Iterable[Iterable[Any]]) -> list[Any]:
    values = [list(axis) for axis in axes]
    cases = list(itertools.product(*(range(len(v)) for v in values)))
    parts = {case: set(itertools.combinations(enumerate(case), strength)) for case in cases}
    missing = set().union(*parts.values())
    chosen = set()
    while missing:
        best = max(cases, key=lambda case: len(parts[case] & missing))
        chosen.add(best)
        missing -= parts[best]
    return [
        pytest.param(
            *(v[i] for v, i in zip(values, case, strict=True)), marks=() if case in chosen else pytest.mark.full
        )
        for case in cases
    ]
