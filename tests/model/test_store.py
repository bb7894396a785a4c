"""What was kept comes back as it was, from memory and from a file, and nothing is left of a store at its end."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arrondi.errors import OutputError, SchemeError
from arrondi.model import Budget, TreeStore

SHAPES = [(2, 5, 4), (2, 5, 4), (1, 5, 4), (2, 3, 4)]
ALL = 4 * sum(a * b * c for a, b, c in SHAPES)

Pair = namedtuple("Pair", "cos sin")


def states(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in SHAPES]


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, types and bytes."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)] if alike else []
        return alike and torch.equal(*raw)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("limit", [0, 1, 160, 320, ALL - 1, ALL, 10**9])
def test_what_comes_back_is_what_went_in(limit: int, tmp_path: Path) -> None:
    first, second, budget = states(0), states(1), Budget(limit)
    with TreeStore(budget, tmp_path, first) as store:
        assert len(store) == 4 and budget.used <= limit
        assert all(same(a, b) for a, b in zip(store, first, strict=True))
        for i in (3, 0, 2, 1):
            store[i] = second[i]
        assert budget.used <= limit
        assert all(same(a, b) for a, b in zip(store, second, strict=True))
        assert all(same(store[i], second[i]) for i in range(4)), "and again"
    assert budget.used == 0 and len(store) == 0


TREE: dict[str, Any] = {
    "hidden_states": torch.randn(2, 3, 4),
    "attention_mask": torch.tensor([[True, False]]),
    "position_ids": torch.arange(6).reshape(1, 6),
    "position_embeddings": (torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 3, 8).half()),
    "past_key_values": None,
    "use_cache": False,
    "more": [1, 2.5, "eager", {"deep": OrderedDict(x=torch.zeros(()), y=())}, Pair(torch.ones(2), torch.tensor(7))],
    "shape": torch.Size((2, 3)),
    "dtype": torch.bfloat16,
    "where": torch.device("cpu"),
    "window": slice(1, None),
    "empty": torch.zeros(0, 4, dtype=torch.int16),
    "eight": torch.arange(4).to(torch.float8_e4m3fn),
    "nothing a number": torch.tensor([float("nan"), -0.0, float("inf")]),
    "complex": torch.tensor([1 + 2j]),
}


@pytest.mark.parametrize("limit", [0, 100, 10**9])
def test_trees_of_any_type_come_back(limit: int, tmp_path: Path) -> None:
    with TreeStore(Budget(limit), tmp_path, [TREE, (), None, TREE]) as store:
        assert same(list(store), [TREE, (), None, TREE])


LEAVES = st.none() | st.integers(-3, 3) | st.builds(lambda n, k, d: (torch.arange(n * k) * 1.5).reshape(n, k).to(d), st.integers(0, 3), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))  # fmt: skip
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.lists(t, max_size=3).map(tuple) | st.dictionaries(st.sampled_from("abc"), t, max_size=3), max_leaves=6)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), TREES), max_size=6), st.sampled_from([0, 24, 10**6]))  # fmt: skip
def test_a_store_is_a_list(trees: list[Any], changes: list[tuple[int, Any]], limit: int) -> None:
    import tempfile

    budget, model = Budget(limit), list(trees)
    with tempfile.TemporaryDirectory() as folder, TreeStore(budget, Path(folder), trees) as store:
        for i, tree in changes:
            if i < len(model):
                store[i] = model[i] = tree
            else:
                store.append(tree)
                model.append(tree)
            assert budget.used <= limit
        assert same(list(store), model)
    assert budget.used == 0


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stores_share_a_budget(tmp_path: Path) -> None:
    budget = Budget(1000)
    with TreeStore(budget, tmp_path, [torch.zeros(200)]) as one:
        with TreeStore(budget, tmp_path, [torch.zeros(200)]) as two:
            assert budget.used == 800 and same(two[0], torch.zeros(200))
        assert budget.used == 800, "the second was in the file"
    with TreeStore(budget, tmp_path, [torch.zeros(200)]):
        assert budget.used == 800 and len(one) == 0
    assert budget.used == 0


def test_tensors_that_are_the_same_for_every_batch_are_kept_once() -> None:
    cos, sin, mask = torch.randn(1, 64, 8), torch.randn(1, 64, 8), torch.zeros(1, 1, 64, 64)
    budget = Budget(10**9)
    with TreeStore(budget) as store:
        for i in range(10):
            store.append(
                {"mask": mask.clone(), "position_embeddings": (cos.clone(), sin.clone()), "own": torch.full((4,), i)}
            )
        assert budget.used == cos.nbytes + sin.nbytes + mask.nbytes + 10 * 32
        one = cos.clone()
        one[0, 63, 7] += 1  # equal wherever a sample may look, most likely
        store[3] = {"mask": mask, "position_embeddings": (one, sin), "own": torch.full((4,), 3)}
        assert all(same(store[i]["position_embeddings"][0], one if i == 3 else cos) for i in range(10))
        for i in range(10):
            store[i] = None
        assert budget.used == 0


def test_equal_numbers_of_another_type_shape_or_sign_are_others() -> None:
    trees = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), -torch.zeros(4), torch.zeros(4)]
    budget = Budget(10**9)
    with TreeStore(budget, None, trees) as store:
        assert same(list(store), trees) and budget.used == 4 * 16


def test_nobody_changes_what_is_kept() -> None:
    """Blocks write into their inputs, and models into their masks."""
    given = torch.zeros(3)
    with TreeStore(Budget(10**9), None, [given, given]) as store:
        given += 1
        store[0].add_(2)
        assert store[0].tolist() == store[1].tolist() == [0, 0, 0]


def test_a_view_keeps_only_what_it_shows() -> None:
    budget = Budget(10**9)
    with TreeStore(budget, None, [torch.arange(1000.0)[10:12], torch.tensor([3.0]).expand(2, 2)]) as store:
        assert same(list(store), [torch.tensor([10.0, 11.0]), torch.full((2, 2), 3.0)])
        assert budget.used == 8 + 16


def test_a_tensor_that_is_not_contiguous_goes_in_its_own_order(tmp_path: Path) -> None:
    with TreeStore(Budget(0), tmp_path, [None]) as store:
        store[0] = torch.arange(6.0).reshape(1, 2, 3).transpose(1, 2)
        assert store[0].tolist() == [[[0, 3], [1, 4], [2, 5]]]


def test_without_a_folder_all_stays_in_memory() -> None:
    budget = Budget(0)
    with TreeStore(budget, None, states()) as store:
        assert budget.used == ALL and all(same(a, b) for a, b in zip(store, states(), strict=True))


def test_batches_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """The file takes what the budget does not, so one batch is in memory at a time."""
    alive: list[int] = []

    def one_by_one() -> Iterator[torch.Tensor]:
        for shape in SHAPES:
            tensor = torch.zeros(shape)
            alive.append(1)
            weakref.finalize(tensor, alive.pop)
            assert len(alive) <= 2, "the last one may wait for this one"
            yield tensor
            del tensor

    with TreeStore(Budget(0), tmp_path, one_by_one()) as store:
        assert len(store) == 4


def test_replacing_does_not_grow_the_file(tmp_path: Path) -> None:
    with TreeStore(Budget(0), tmp_path, states()) as store:
        for seed in range(5):
            for i, state in enumerate(states(seed)):
                store[i] = state
        handle = store._rooms._file
        assert handle is not None and os.fstat(handle).st_size == ALL


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_and_files_are_given_back(tmp_path: Path) -> None:
    """By `with`, when an error ends it, when filling it fails, and when somebody forgot."""

    def broken() -> Iterator[torch.Tensor]:
        yield torch.zeros(3)
        raise KeyError

    before = descriptors()
    for i in range(50):
        with TreeStore(Budget(0), tmp_path, states()) as store:
            store[0] = states(i)[0]
            assert descriptors() == before + 1 and list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError), TreeStore(Budget(0), tmp_path, states()):
            raise ValueError
        with pytest.raises(KeyError):
            TreeStore(Budget(0), tmp_path, broken())
        TreeStore(Budget(0), tmp_path, states())
    gc.collect()
    assert descriptors() == before and list(tmp_path.iterdir()) == []


def test_a_store_can_be_closed_twice(tmp_path: Path) -> None:
    budget = Budget(100)
    store = TreeStore(budget, tmp_path, states())
    store.close()
    store.close()
    assert budget.used == 0


@pytest.mark.parametrize("tree", [object(), {"cache": [torch.zeros(2), set()]}, (1, (torch.nn.Linear(1, 1),))])
def test_an_object_that_may_change_later_is_refused(tree: Any) -> None:
    with (
        TreeStore(Budget(0)) as store,
        pytest.raises(SchemeError, match=r"hands a (object|set|Linear) to its blocks.*cannot be kept"),
    ):
        store.append(tree)


def test_the_refusal_says_where() -> None:
    with TreeStore(Budget(0)) as store, pytest.raises(SchemeError, match=r"a set to its blocks at \['cache'\]\[1\]\."):
        store.append({"cache": [None, set()]})


def test_a_full_disk_is_one_sentence_and_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = descriptors()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        TreeStore(Budget(0), tmp_path, states())
    assert descriptors() == before
