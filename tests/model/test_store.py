"""What passes between blocks is what comes back, from memory and from a file."""

from __future__ import annotations

import collections
import errno
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from arrondi.errors import OutputError, SchemeError
from arrondi.model import Budget, TreeStore


class Pair(NamedTuple):
    one: Any
    two: Any


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TREES: list[Any] = [
    tensor(2, 5, 4),
    tensor(2, 5, 4, seed=1),
    (tensor(1, 3), {"mask": tensor(3, 3) > 0, "positions": torch.arange(5)}, None, 7, "word", slice(1, 2)),
    Pair(tensor(4, 4).T, [tensor(2, dtype=torch.bfloat16), torch.polar(torch.ones(3), tensor(3))]),
    {"layers": collections.OrderedDict(a=tensor(0, 4), b=torch.tensor(1.5)), "size": torch.Size((2, 3))},
]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("limit", [0, 100, 10**9])
def test_what_comes_back_is_what_went_in(limit: int, tmp_path: Path) -> None:
    with TreeStore(Budget(limit), tmp_path, TREES) as store:
        assert len(store) == len(TREES) and equal(list(store), TREES)
        for i in (3, 0, 4, 1, 2):
            store[i] = TREES[i - 1]
        assert all(equal(store[i], TREES[i - 1]) for i in range(len(TREES)))


def test_what_comes_back_is_the_callers_own() -> None:
    """A block that changes its inputs in place changes nothing here, and what went in is not held."""
    given = tensor(3)
    with TreeStore(Budget(1000), None, [[given]]) as store:
        given.zero_()
        store[0][0].zero_()
        assert equal(store[0], [tensor(3)])


def test_equal_tensors_are_kept_once_and_a_budget_is_shared(tmp_path: Path) -> None:
    budget = Budget(10_000)
    with TreeStore(budget, tmp_path) as one, TreeStore(budget, tmp_path) as two:
        for _ in range(10):
            one.append({"mask": tensor(10, 10), "again": tensor(10, 10)})
        assert budget.used == 400
        two.append(tensor(10, 10, seed=1))
        assert budget.used == 800
        one[0] = {"mask": tensor(10, 10, seed=2)}
        assert budget.used == 1200 and equal(one[1]["mask"], tensor(10, 10)), "others still hold it"
    assert budget.used == 0


def test_the_file_has_no_name_and_its_descriptor_goes_for_sure(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    store = TreeStore(Budget(0), tmp_path, TREES)
    assert list(tmp_path.iterdir()) == [] and psutil.Process().num_fds() == before + 1
    store.close()
    store.close()
    assert psutil.Process().num_fds() == before

    def failing() -> Iterator[Any]:
        yield TREES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TreeStore(Budget(0), tmp_path, failing())
    assert TreeStore(Budget(0), tmp_path, TREES)  # and never closed
    gc.collect()
    assert psutil.Process().num_fds() == before


def test_an_object_of_the_models_own_is_refused_by_its_place() -> None:
    with (
        pytest.raises(SchemeError, match=r"hands a Random to its blocks at \['cache'\]\[1\]"),
        TreeStore(Budget(0)) as store,
    ):
        store.append({"cache": [1, __import__("random").Random()]})


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        TreeStore(Budget(0), tmp_path, TREES)
