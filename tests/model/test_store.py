"""Hidden states in a file are those in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arrondi.errors import OutputError
from arrondi.model import HiddenStore

SHAPES = [(2, 5, 4), (2, 5, 4), (1, 5, 4), (2, 3, 4)]
ALL = 4 * sum(a * b * c for a, b, c in SHAPES)


def states(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in SHAPES]


@pytest.mark.parametrize("limit", [0, 1, 160, 320, ALL - 1, ALL, 10**9])
def test_what_comes_back_is_what_went_in(limit: int, tmp_path: Path) -> None:
    first, second = states(0), states(1)
    store = HiddenStore(first, limit, tmp_path)
    assert len(store) == 4
    assert all(torch.equal(a, b) for a, b in zip(store, first, strict=True))
    for i in (3, 0, 2, 1):
        store[i] = second[i]
    assert all(torch.equal(a, b) for a, b in zip(store, second, strict=True))
    assert all(torch.equal(store[i], second[i]) for i in range(4)), "and again"
    store.close()


def test_a_tensor_that_is_not_contiguous_goes_in_its_own_order(tmp_path: Path) -> None:
    store = HiddenStore([torch.zeros(1, 3, 2)], 0, tmp_path)
    store[0] = torch.arange(6.0).reshape(1, 2, 3).transpose(1, 2)
    assert store[0].tolist() == [[[0, 3], [1, 4], [2, 5]]]


def test_the_file_has_no_name_and_is_gone_at_the_end(tmp_path: Path) -> None:
    store = HiddenStore(states(), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.close()
    store.close()


def test_without_a_folder_all_stays_in_memory() -> None:
    first = states()
    store = HiddenStore(first, 0)
    assert all(a is b for a, b in zip(store, first, strict=True))


def test_batches_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def one_by_one() -> Iterator[torch.Tensor]:
        for tensor in states():
            alive.append(1)
            yield tensor
            del tensor

    assert len(HiddenStore(one_by_one(), 0, tmp_path)) == len(alive) == 4


def test_another_shape_is_a_mistake_of_ours(tmp_path: Path) -> None:
    store = HiddenStore(states(), 0, tmp_path)
    with pytest.raises(AssertionError):
        store[0] = torch.zeros(1, 5, 4)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        HiddenStore(states(), 0, tmp_path)
