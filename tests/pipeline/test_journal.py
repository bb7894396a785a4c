"""The journal by itself: what it remembers, whom it lets in, and that it believes nothing."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from arrondi.checkpoint import WORK, write_json
from arrondi.errors import OutputError
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.manifest import MANIFEST, finished_key, sealed

STEPS = {"a": [1, {"x": None, "ü": "é"}], "b": 0.1 + 0.2, "c": {"infinite": math.inf}}


def written(out: Path, key: str = "one") -> Path:
    with Journal(out, key, ["model.safetensors"], {"threads": "1"}) as journal:
        for step, data in STEPS.items():
            journal.record(step, data, wrote={f"{step}.out": step * 4}, read={f"{step}.in": step * 8})
    return out / WORK / "journal.jsonl"


def steps(out: Path, key: str = "one") -> dict[str, object]:
    with Journal(out, key, ["model.safetensors"], {"threads": "1"}) as journal:
        return dict(journal.steps)


def test_a_journal_remembers_its_steps_and_only_its_own_runs(tmp_path: Path) -> None:
    written(tmp_path)
    assert steps(tmp_path) == STEPS
    with Journal(tmp_path, "two", ["model.safetensors"], {"threads": "4"}) as journal:
        assert journal.steps == {}
        assert "held an unfinished run" in journal.note and "threads 1, here 4" in journal.note
    assert steps(tmp_path) == {}


def test_what_is_recorded_is_at_once_what_a_later_run_finds(tmp_path: Path) -> None:
    with Journal(tmp_path, "one") as journal:
        journal.record("a", {1: (2, 3)})
        assert journal.steps["a"] == {"1": [2, 3]}


TEARS: dict[str, tuple[int, Callable[[list[bytes]], bytes]]] = {
    "nothing is changed": (3, b"".join),
    "half a line": (2, lambda lines: b"".join(lines)[:-30]),
    "no newline": (2, lambda lines: b"".join(lines)[:-1]),
    "half a head": (0, lambda lines: lines[0][:30]),
    "nothing": (0, lambda lines: b""),
    "garbage at the end": (3, lambda lines: b"".join(lines) + b"}{\n"),
    "garbage between": (1, lambda lines: b"".join([*lines[:2], b"}{\n", *lines[2:]])),
    "zeros": (1, lambda lines: b"".join(lines[:2]) + b"\0" * 4096),
    "no UTF-8": (1, lambda lines: b"".join([*lines[:2], b"\xff\xfe\x80\n", *lines[2:]])),
    "no UTF-8 from the start": (0, lambda lines: b"\xff\xfe" + b"".join(lines)),
    "a number": (1, lambda lines: b"".join([*lines[:2], b"7\n", *lines[2:]])),
    "a list for a head": (0, lambda lines: b"[7]\n" + b"".join(lines)),
    "a word for a head": (0, lambda lines: b'"sum"\n' + b"".join(lines)),
    "deep": (1, lambda lines: b"".join(lines[:2]) + b"[" * 200_000 + b"\n"),
    "6,000 digits": (1, lambda lines: b"".join(lines[:2]) + b"9" * 6_000 + b"\n"),
    "no head": (0, lambda lines: b"".join(lines[1:])),
    "a line twice": (1, lambda lines: b"".join([*lines[:2], *lines[1:]])),
    "a line left out": (1, lambda lines: b"".join([*lines[:2], *lines[3:]])),
    "two lines exchanged": (0, lambda lines: b"".join([lines[0], lines[2], lines[1], lines[3]])),
    "other data": (1, lambda lines: b"".join(lines).replace(b"0.30000000000000004", b"0.40000000000000004")),
    "another digest": (0, lambda lines: b"".join(lines).replace(b"aaaaaaaa", b"aaaaaaab")),
    "another version": (0, lambda lines: b"".join(lines).replace(b'"journal": 2', b'"journal": 1')),
    "spaces": (1, lambda lines: b"".join([*lines[:2], b" " + lines[2], lines[3]])),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_line_that_is_torn_or_changed_counts_for_nothing_nor_does_what_follows(tear: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    left, change = TEARS[tear]
    path.write_bytes(change(path.read_bytes().splitlines(keepends=True)))
    assert steps(tmp_path) == dict(list(STEPS.items())[:left])
    assert steps(tmp_path) == dict(list(STEPS.items())[:left]), "and what is left is written well again"


@pytest.mark.parametrize("what", ["journal.jsonl", "lock", ""])
def test_what_is_in_the_way_is_named(what: str, tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / WORK / what
    if what:
        path.unlink()
        path.mkdir()
    else:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("a file")
    with pytest.raises(OutputError, match=r"is in the way|cannot be read"):
        steps(tmp_path)


# ── claims ────────────────────────────────────────────────────────────────────────────────────────────────────────────

OUTPUT = {f"{s}.out": s * 4 for s in STEPS}
SOURCE = {f"{s}.in": s * 8 for s in STEPS}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, "abc"),
        ({"c.out": "x"}, "ab"),
        ({"b.out": None}, "a"),
        ({"a.out": "x", "c.out": "x"}, ""),
        ({"c.in": "x"}, ""),
        ({"a.in": None}, ""),
    ],
)
def test_claims_are_compared_with_what_is_there(changes: dict[str, str | None], kept: str, tmp_path: Path) -> None:
    """Damage takes the steps from there on, other weights take all: they belong to another model."""
    written(tmp_path)
    now = {**OUTPUT, **SOURCE, **changes}
    with Journal(tmp_path, "one", ["model.safetensors"], {"threads": "1"}) as journal:
        journal.verify(now.get, now.get)
        assert "".join(journal.steps) == kept
        assert bool(journal.note) == (kept != "abc")
        journal.record("d", None)
    assert "".join(steps(tmp_path)) == kept + "d", "and a kill does not bring them back"


# ── who may write ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_one_run_writes_into_a_directory(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with (tmp_path / WORK / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing here"):
            steps(tmp_path)
    assert path.read_bytes() == before
    assert steps(tmp_path) == STEPS, "and when the other is gone it goes on"


def test_a_lock_that_was_removed_with_a_finished_run_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run opens the file, then the one that held it ends and removes it: the lock is taken again, on the file that is there."""
    path, flock = written(tmp_path).with_name("lock"), fcntl.flock

    def late(handle: int, how: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Journal(tmp_path, "one") as journal:
        assert path.exists() and os.path.samestat(os.fstat(journal._lock), path.stat())


def test_no_descriptor_is_left_whatever_happens(tmp_path: Path) -> None:
    written(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        steps(tmp_path / "out")
        with Journal(tmp_path / "out", "one"), pytest.raises(OutputError):
            Journal(tmp_path / "out", "one")
        with pytest.raises(OutputError):
            Journal(tmp_path / "other", "one")
    assert len(os.listdir("/proc/self/fd")) == before


# ── what an earlier run leaves ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A directory as a finished run leaves it, in which somebody keeps more."""
    out = tmp_path / "out"
    files = ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"]
    for name in [*files, "my notes.md", "tokenizer.model", "2_Dense/mine.txt"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    table = {n: {"bytes": 1, "sha256": "0"} for n in files}
    document = {"run": "old", "model": {"tensors": {"w": "1"}}, "files": table | {"report.json": {"content": "0"}}}
    write_json(out / MANIFEST, sealed(document))
    return out


def left(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and WORK not in p.parts}


def test_overwriting_removes_exactly_what_the_earlier_run_wrote(finished: Path) -> None:
    before = left(finished)
    with pytest.raises(OutputError, match=r"finished model of another run.*--overwrite"):
        Journal(finished, "new")
    assert left(finished) == before
    with Journal(finished, "new", overwrite=True):
        assert left(finished) == {"my notes.md", "tokenizer.model", "2_Dense/mine.txt"}
    assert not (finished / "1_Pooling").exists()


def test_overwriting_that_was_killed_goes_on_removing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink, count = Path.unlink, 0

    def third(self: Path, missing_ok: bool = False) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", third)
        Journal(finished, "new", overwrite=True)
    assert not (finished / "config.json").exists() and (finished / MANIFEST).exists()
    with Journal(finished, "new"):
        assert left(finished) == {"my notes.md", "tokenizer.model", "2_Dense/mine.txt"}


def test_an_unfinished_run_says_what_it_would_have_written(tmp_path: Path) -> None:
    with Journal(tmp_path, "one", ["model.safetensors", "vocab.txt", "a/b.json"]):
        for name in ("model.safetensors", "vocab.txt", "a/b.json", "notes.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
    with Journal(tmp_path, "two"):
        assert left(tmp_path) == {"notes.md"}


@pytest.mark.parametrize("name", ["../victim", "ABSOLUTE", "a/../../victim", "link/victim", ".", "", WORK + "/lock"])
def test_a_manifest_names_nothing_outside(name: str, finished: Path) -> None:
    """Whoever wrote it: names that lead out of the directory are not followed."""
    victim = finished.parent / "victim"
    victim.write_text("years of work")
    (finished / "link").symlink_to(finished.parent)
    document = json.loads((finished / MANIFEST).read_text())
    document["files"][str(victim) if name == "ABSOLUTE" else name] = {"content": "0"}
    write_json(finished / MANIFEST, sealed(document))
    try:
        with Journal(finished, "new", overwrite=True):
            pass
    except OutputError as error:
        assert "Nothing was touched" in str(error)
    assert victim.read_text() == "years of work"
    assert finished.is_dir() and (finished / "my notes.md").exists()


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"7", b"[]", b"{}", b'{"run": 7}', b'{"run": "a", "files": []}', b'{"run": "a", "files": {"x": 7}}', b'{"run": "a", "model": 7}', b"[" * 200_000],
    ids=lambda c: repr(c[:40]),
)  # fmt: skip
def test_a_manifest_that_is_none_makes_a_directory_nobodys(content: bytes, finished: Path) -> None:
    (finished / MANIFEST).write_bytes(content)
    before = left(finished)
    with pytest.raises(OutputError, match=r"already holds 1_Pooling and maybe more\. Nothing was touched"):
        Journal(finished, "old", overwrite=True)
    assert left(finished) == before


@pytest.mark.parametrize("change", ["run", "files", "model", "sum", "one file", "unknown fact", "the order"])
def test_a_manifest_that_was_changed_is_none(change: str, finished: Path) -> None:
    """Also where what is left is well formed: a list of files that lost one would hide that the file is damaged."""
    assert finished_key(finished) == "old"
    document = json.loads((finished / MANIFEST).read_text())
    if change == "one file":
        del document["files"]["model.safetensors"]
    elif change == "unknown fact":
        document = sealed({**document, "files": {"model.safetensors": {"crc": "0"}}})
    elif change == "the order":
        document = {**document, "files": dict(reversed(document["files"].items()))}
    else:
        document[f"{change}s"] = document.pop(change)
    write_json(finished / MANIFEST, document)
    assert finished_key(finished) is None


def test_a_link_in_the_place_of_the_working_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(tmp_path / "mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"in the way \(a link\)"):
            Journal(tmp_path / "out", "one", overwrite=overwrite)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
