"""Runs that are killed, that meet each other, or that run out of disk: nothing is lost and nothing half is taken for whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
from arrondi.checkpoint import Checkpoint, ShardWriter
from arrondi.errors import FileFormatError, OutputError
from arrondi.pipeline.journal import MANIFEST, WORK, Journal, finished_key
from tests.pipeline.killer import digest

REPOSITORY = Path(__file__).parents[2]
RTN = arrondi.Recipe.simple("W4A16", group_size=32)
GPTQ = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)


# ── SIGKILL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("method", "every"), [("rtn", 11), ("gptq", 9)])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    method: str, every: int, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = models("llama", num_hidden_layers=2)
    command = [sys.executable, "-m", "tests.pipeline.killer", str(model), str(tmp_path), str(text), method, str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])

    once, often, total = found["once"], found["often"], found["total"]
    assert len(once) > 18
    assert all(run["kills"] == 1 and run["finished"] and run["same"] for run in once), once
    # Only when nothing is left to do but to remove the working folder is there a config.json.
    assert [run["moments"] for run in once if run["half"] == "finished"] == [[total]]
    assert all("config.json: no such file" in run["half"] for run in once[:-1])
    # What was finished is not done again: the later the kill, the less there is to do.
    changes = [run["changes"] for run in once]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] == total and changes[-1] == 1
    if method == "gptq":
        assert len(set(changes)) > 5, "blocks are steps of their own"
    assert often["kills"] > 3 and often["finished"] and often["same"]

    # A file that the kernel does not let grow is a full disk: one sentence, no model, and the same bytes once there is room.
    for limited in found["limited"]:
        assert "the disk is full" in limited["said"] and "run the same command again" in limited["said"]
        assert limited["half"] != "finished" and limited["finished"] and limited["same"]


class Stop(Exception):
    """Ends a run from inside, as a kill would, but in this process."""


@pytest.fixture
def stopped(models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a gptq run that was stopped after its first block."""
    record = Journal.record

    def once(self: Journal, step: str, data: Any) -> None:
        record(self, step, data)
        raise Stop

    monkeypatch.setattr(Journal, "record", once)
    with pytest.raises(Stop):
        gptq(models, text, tmp_path / "out")
    monkeypatch.undo()
    return tmp_path / "out"


def gptq(models: Callable[..., Path], text: Path, out: Path, **options: Any) -> dict[str, Any]:
    texts = arrondi.TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    return arrondi.quantize_model(models("llama", num_hidden_layers=2), out, GPTQ, texts, **options)


def test_a_finished_block_is_read_back_not_rounded_again(
    stopped: Path, models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = ShardWriter.put
    monkeypatch.setattr(ShardWriter, "put", lambda self, name, t: (written.append(name), put(self, name, t)))
    report = gptq(models, text, stopped)
    assert written and not any(".layers.0." in n for n in written)
    gptq(models, text, tmp_path / "whole")
    assert digest(stopped) == digest(tmp_path / "whole")
    assert {r["name"] for r in report["layers"]} > {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }


@pytest.mark.parametrize("tear", ["half a line", "no newline", "garbage", "zeros", "another value"])
def test_a_torn_line_of_the_journal_is_left_out(
    tear: str, stopped: Path, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    journal = stopped / WORK / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2
    end = {
        "half a line": lines[1][:50],
        "no newline": lines[1][:-1],
        "garbage": "}{\n",
        "zeros": "\0" * 64,
        "another value": "7\n",
    }
    journal.write_text(lines[0] + end[tear])
    gptq(models, text, stopped)
    gptq(models, text, tmp_path / "whole")
    assert digest(stopped) == digest(tmp_path / "whole")


def test_another_command_starts_anew_where_an_unfinished_run_was(
    stopped: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    (stopped / "model-00001-of-00002.safetensors").write_bytes(b"published before the kill")
    (stopped / "model.safetensors.index.json").write_text("{}")
    source = models("llama", num_hidden_layers=2)
    arrondi.quantize_model(source, stopped, RTN)
    arrondi.quantize_model(source, tmp_path / "whole", RTN)
    assert digest(stopped) == digest(tmp_path / "whole")


def test_the_half_written_output_is_no_model(stopped: Path) -> None:
    assert finished_key(stopped) is None
    for read in (Checkpoint.open, arrondi.load, arrondi.inspect_model):
        with pytest.raises(FileFormatError, match=r"config\.json: no such file"):
            read(stopped)
    assert [p.name for p in stopped.iterdir()] == [WORK], "nothing has its final name"


# ── an output directory that is not empty ─────────────────────────────────────────────────────────────────────────────


def test_two_runs_at_once_do_not_mix(stopped: Path, models: Callable[..., Path], text: Path) -> None:
    before = (stopped / WORK / "journal.jsonl").read_bytes()
    with (stopped / WORK / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is writing here"):
            gptq(models, text, stopped)
    assert (stopped / WORK / "journal.jsonl").read_bytes() == before
    assert gptq(models, text, stopped)["layers"], "and when the other is gone it goes on"


def test_the_lock_is_free_again_after_a_run_that_failed(models: Callable[..., Path], tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "key"):
        pass
    with Journal(tmp_path / "out", "key"):
        pass


def test_the_same_call_on_a_finished_output_does_nothing(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    first = arrondi.quantize_model(source, out, RTN)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(ShardWriter, "put", None)
    assert arrondi.quantize_model(source, out, RTN) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_finished_output_of_another_run_is_refused_and_replaced_when_asked(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    arrondi.quantize_model(source, out, RTN, shard_bytes=100_000)
    assert (out / "model.safetensors.index.json").exists()
    (out / "my notes.md").write_text("years of work")
    before = digest(out)
    other = arrondi.Recipe.simple("W8A16", group_size=32)
    with pytest.raises(OutputError, match=r"finished model of another run.*--overwrite"):
        arrondi.quantize_model(source, out, other)
    assert digest(out) == before
    arrondi.quantize_model(source, out, other, overwrite=True)
    arrondi.quantize_model(source, tmp_path / "fresh", other)
    assert (out / "my notes.md").read_text() == "years of work"
    (out / "my notes.md").unlink()
    assert digest(out) == digest(tmp_path / "fresh"), "nothing of the first run is left"


def test_overwrite_does_the_same_run_again(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    arrondi.quantize_model(source, out, RTN)
    whole = digest(out)
    (out / "model.safetensors").write_bytes(b"damaged")
    arrondi.quantize_model(source, out, RTN, overwrite=True)
    assert digest(out) == whole


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("holds", ["a file", "a folder", "a model", "a restored model"])
def test_a_foreign_directory_is_not_touched(
    holds: str, overwrite: bool, models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    if holds == "a file":
        (out / "thesis.txt").write_text("years of work")
    elif holds == "a folder":
        (out / "pictures").mkdir()
    else:
        for name in ("config.json", "model.safetensors"):
            (out / name).write_bytes((models("llama", num_hidden_layers=1) / name).read_bytes())
    before = sorted((p.name, p.stat().st_mtime_ns) for p in out.rglob("*"))
    with pytest.raises(OutputError, match=r"already holds .* Nothing was touched"):
        arrondi.quantize_model(models("llama", num_hidden_layers=1), out, RTN, overwrite=overwrite)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in out.rglob("*")) == before


def test_an_output_that_is_a_file_or_the_model_itself_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("llama", num_hidden_layers=1)
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match=r"a file\. Give a directory"):
        arrondi.quantize_model(source, tmp_path / "file", RTN)
    with pytest.raises(OutputError, match="same directory"):
        arrondi.quantize_model(source, source, RTN, overwrite=True)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="same directory"):
        arrondi.quantize_model(source, tmp_path / "link", RTN, overwrite=True)
    assert (tmp_path / "file").read_text() == "text"


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_later(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write from the n-th on meets a full disk: each n ends in the sentence, and the last call ends with the bytes."""
    gptq(models, text, tmp_path / "whole")
    write, room = os.pwrite, [0]

    def until_full(handle: int, data: Any, offset: int) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        return write(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", until_full)
    for n in (0, 1, 20, 35):
        room[0] = n
        with pytest.raises(OutputError, match=r"the disk is full.*run the same command again"):
            gptq(models, text, tmp_path / "out")
        assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    gptq(models, text, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_full_disk_under_the_hidden_states_is_the_same_sentence(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import arrondi.pipeline.quantize as pipeline

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "_HIDDEN_LIMIT", 0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        gptq(models, text, tmp_path / "out")


def test_too_little_room_is_said_before_anything_is_computed(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"needs .* MB and the disk has 0 MB free"):
        arrondi.quantize_model(models("llama", num_hidden_layers=1), tmp_path / "out", RTN)
    monkeypatch.undo()
    assert arrondi.quantize_model(models("llama", num_hidden_layers=1), tmp_path / "out", RTN)["layers"]


# ── the journal by itself ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_journal_remembers_its_steps_and_only_its_own_runs(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", "one") as journal:
        journal.record("a", [1, {"x": None}])
        journal.record("b", 0.1 + 0.2)
    with Journal(tmp_path / "out", "one") as journal:
        assert journal.steps == {"a": [1, {"x": None}], "b": 0.1 + 0.2}
    with Journal(tmp_path / "out", "two") as journal:
        assert journal.steps == {}


def test_a_finished_run_that_was_killed_before_it_cleaned_up_is_finished(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    arrondi.quantize_model(source, out, RTN)
    (out / WORK).mkdir()
    (out / WORK / "journal.jsonl").write_text(
        json.dumps({"run": json.loads((out / MANIFEST).read_text())["run"]}) + "\n"
    )
    with pytest.raises(OutputError, match="finished model of another run"):
        arrondi.quantize_model(source, out, arrondi.Recipe.simple("W8A16", group_size=32))
    arrondi.quantize_model(source, out, RTN)
    assert not (out / WORK).exists()


def test_resuming_gives_the_numbers_of_a_run_that_was_not_interrupted(
    stopped: Path, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    resumed, whole = gptq(models, text, stopped), gptq(models, text, tmp_path / "whole")
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert torch.tensor(whole["evaluation"]["kl_mean"]) > 0
