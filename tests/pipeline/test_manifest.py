"""Finished outputs: they are verified before they are taken for done, published in order, and overwritten when asked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
from arrondi.checkpoint import Entry, ShardWriter
from arrondi.checkpoint.containers import disk
from arrondi.checkpoint.containers.tensor_file import read_bytes
from arrondi.errors import FileFormatError, OutputError
from arrondi.measure.comparison import Comparison
from arrondi.model import OnDisk
from arrondi.pipeline import TextOptions, make_plan, publish, quantize_model
from arrondi.pipeline.ledger import travelling
from arrondi.pipeline.manifest import MANIFEST, WORK, check_apart
from tests.pipeline.killer import digest
from tests.pipeline.stopping import DAMAGES

RTN = arrondi.Recipe.simple("W4A16", group_size=32)


def quantize(models: Callable[..., Path], out: Path, **options: Any) -> dict[str, Any]:
    return quantize_model(models("llama", num_hidden_layers=1), out, RTN, shard_bytes=100_000, **options)


@pytest.fixture(scope="module")
def whole(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output in several shards; copy it before you touch it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(models, out)
    return out


# ── the same command again ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_call_on_a_finished_output_does_nothing(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    first = quantize_model(source, out, RTN)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(ShardWriter, "put", None)
    assert quantize_model(source, out, RTN) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


FIRST = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((FIRST, d) for d in DAMAGES),
        ("model.safetensors.index.json", "deleted"),
        ("config.json", "deleted"),
        ("config.json", "one bit"),
        ("tokenizer.json", "cut"),
        ("tokenizer_config.json", "one bit"),
        ("report.json", "one bit"),
        ("report.json", "deleted"),
        ("report.json", "cut"),
    ],
)
def test_a_finished_output_that_was_damaged_since_is_refused_and_made_again_when_asked(
    name: str, damage: str, whole: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    DAMAGES[damage](out / name)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OutputError, match=rf"{name}: .*(--overwrite|Delete .* and run again)"):
        quantize(models, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    quantize(models, out, overwrite=True)
    assert digest(out) == digest(whole)


def test_the_manifest_lists_what_was_written(whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    found = {p.name: p.read_bytes() for p in whole.iterdir() if p.name not in (MANIFEST, "report.json")}
    report = json.loads((whole / "report.json").read_text())
    said = json.dumps({k: v for k, v in report.items() if k not in ("seconds", "model")}, sort_keys=True)
    wanted: dict[str, Any] = {"report.json": {"content": hashlib.sha256(said.encode()).hexdigest()}}
    for name, content in found.items():
        tensors = name.endswith(".safetensors")
        digest = {"digest": by_hand(content)} if tensors else {"sha256": hashlib.sha256(content).hexdigest()}
        wanted[name] = {"bytes": len(content)} | digest
    assert manifest["files"] == wanted
    assert FIRST in found and "tokenizer.json" in found


def test_a_report_whose_numbers_were_changed_is_not_believed(
    whole: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    """The same command would answer with them, and `--max-kl` would be held against them."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**report, "seconds": 1e-9}))
    assert quantize(models, out)["seconds"] == 1e-9, "how long it took is nothing that the run promises"
    report["layers"][0]["sqnr_db"] = 99.0
    (out / "report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match=r"report\.json: holds other bytes"):
        quantize(models, out)


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_tokenizer_that_changes_while_the_run_goes_on_is_noticed(
    change: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """The text was cut with the one, and the other would lie beside the weights."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models("llama", num_hidden_layers=1), model)
    tokenizer = model / "tokenizer.json"
    before = tokenizer.read_bytes()

    def progress(done: int, total: int, what: str) -> None:
        tokenizer.write_bytes(before + b" ") if change == "changed" else tokenizer.unlink(missing_ok=True)

    with pytest.raises(FileFormatError, match=r"tokenizer\.json: changed while the run was going on"):
        quantize_model(model, out, RTN, progress=progress)
    assert not (out / "config.json").exists()
    tokenizer.write_bytes(before)
    quantize_model(model, out, RTN)
    assert (out / "tokenizer.json").read_bytes() == before


def by_hand(content: bytes) -> str:
    """The digest of a file of tensors, all smaller than a piece: of its header and the digests of its tensors."""

    def of(*pieces: bytes) -> str:
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in pieces if p)).hexdigest()[:32]

    base = 8 + int.from_bytes(content[:8], "little")
    header = {n: e["data_offsets"] for n, e in json.loads(content[8:base]).items() if n != "__metadata__"}
    places = sorted(header.values())
    return of(content[:base] + "".join(of(content[base + a : base + b]) for a, b in places).encode())


def test_what_stands_beside_a_finished_output_does_not_matter(
    whole: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("my model")
    assert quantize(models, tmp_path / "out") == json.loads((whole / "report.json").read_text())


def test_a_finished_run_that_was_killed_before_it_cleaned_up_is_finished(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    quantize_model(source, out, RTN)
    (out / WORK).mkdir()
    (out / WORK / "journal.jsonl").write_text(
        json.dumps({"run": json.loads((out / MANIFEST).read_text())["run"]}) + "\n"
    )
    with pytest.raises(OutputError, match="finished model of another run"):
        quantize_model(source, out, arrondi.Recipe.simple("W8A16", group_size=32))
    quantize_model(source, out, RTN)
    assert not (out / WORK).exists()


# ── an output directory that is not empty ─────────────────────────────────────────────────────────────────────────────


def test_overwriting_leaves_nothing_of_the_earlier_model(models: Callable[..., Path], tmp_path: Path) -> None:
    """The first model has a tokenizer of more files, some of them in a folder; what a user added is theirs."""
    first = tmp_path / "first"
    shutil.copytree(models("llama", num_hidden_layers=1), first)
    (first / "added_tokens.json").write_text("{}")
    (first / "spiece.model").write_bytes(b"pieces")
    out = tmp_path / "out"
    quantize_model(first, out, RTN)
    assert (out / "spiece.model").exists()
    (out / "notes.md").write_text("years of work")
    second = models("llama", num_hidden_layers=1)
    quantize_model(second, out, RTN, overwrite=True)
    (out / "notes.md").unlink()
    quantize_model(second, tmp_path / "fresh", RTN)
    assert digest(out) == digest(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("model", "out", "said"),
    [("m", "m", "same directory"), ("m", "m/sub", "inside the model"), ("m", "m/a/b", "inside"), ("a/m", "a", "holds the model"), ("m", "link", "same"), ("m", "link/sub", "inside"), ("link", "m/sub", "inside"), ("m", "m/../m", "same")],
)  # fmt: skip
def test_output_and_model_do_not_hold_each_other(model: str, out: str, said: str, tmp_path: Path) -> None:
    for name in ("m", "a/m"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(OutputError, match=said):
        check_apart(tmp_path / model, tmp_path / out)
    check_apart(tmp_path / "m", tmp_path / "m2")
    check_apart(tmp_path / "m", tmp_path / "a" / "out")


def test_a_finished_output_of_another_run_is_refused_and_replaced_when_asked(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    quantize_model(source, out, RTN, shard_bytes=100_000)
    assert (out / "model.safetensors.index.json").exists()
    (out / "my notes.md").write_text("years of work")
    before = digest(out)
    other = arrondi.Recipe.simple("W8A16", group_size=32)
    with pytest.raises(OutputError, match=r"finished model of another run.*--overwrite"):
        quantize_model(source, out, other)
    assert digest(out) == before
    quantize_model(source, out, other, overwrite=True)
    quantize_model(source, tmp_path / "fresh", other)
    assert (out / "my notes.md").read_text() == "years of work"
    (out / "my notes.md").unlink()
    assert digest(out) == digest(tmp_path / "fresh"), "nothing of the first run is left"


def test_overwrite_does_the_same_run_again(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    quantize_model(source, out, RTN)
    whole = digest(out)
    (out / "model.safetensors").write_bytes(b"damaged")
    quantize_model(source, out, RTN, overwrite=True)
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
        quantize_model(models("llama", num_hidden_layers=1), out, RTN, overwrite=overwrite)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in out.rglob("*")) == before


def test_an_output_that_is_a_file_or_the_model_itself_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("llama", num_hidden_layers=1)
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match=r"a file\. Give a directory"):
        quantize_model(source, tmp_path / "file", RTN)
    with pytest.raises(OutputError, match="same directory"):
        quantize_model(source, source, RTN, overwrite=True)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="same directory"):
        quantize_model(source, tmp_path / "link", RTN, overwrite=True)
    assert (tmp_path / "file").read_text() == "text"


# ── the order of publishing ───────────────────────────────────────────────────────────────────────────────────────────


def test_names_last_before_config_json_makes_a_model_of_them(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a rename may be lost that no fsync of its directory followed, and a later one be there."""
    out, log = tmp_path / "out", list[str]()
    replace, fsync = os.replace, os.fsync

    def logged(old: Any, new: Any) -> None:
        replace(old, new)
        log.append(f"{Path(new).relative_to(out)}")

    def synced(handle: int) -> None:
        fsync(handle)
        if Path(f"/proc/self/fd/{handle}").resolve() == out:
            log.append("sync")

    monkeypatch.setattr(os, "replace", logged)
    monkeypatch.setattr(os, "fsync", synced)
    quantize(models, out)
    log = [what for what in log if WORK not in what]
    shards = [i for i, what in enumerate(log) if what.startswith("model-")]
    assert len(shards) == 3 and log[-2:] == ["config.json", "sync"]
    for name in (log[shards[-1]], "model.safetensors.index.json", MANIFEST):
        assert "sync" in log[log.index(name) : log.index("config.json")], name


def test_a_hash_that_cannot_be_taken_ends_the_run(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads that hash have no silence of their own: no manifest lacks a digest."""
    threads, pieces = torch.get_num_threads(), itertools.count()

    def broken(entry: Entry, offset: int, nbytes: int) -> torch.Tensor:
        if next(pieces) == 7:
            raise OSError(5, "Input/output error", str(entry.path))
        return read_bytes(entry, offset, nbytes)

    torch.set_num_threads(2)
    monkeypatch.setattr(disk, "PIECE", 1000)
    try:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
            patch.setattr("arrondi.checkpoint.containers.writer.read_bytes", broken)
            quantize(models, tmp_path / "out")
        assert not (tmp_path / "out" / MANIFEST).exists() and not (tmp_path / "out" / "config.json").exists()
        quantize(models, tmp_path / "out")
    finally:
        torch.set_num_threads(threads)


def test_the_files_of_a_run_are_those_that_it_announces(whole: Path, models: Callable[..., Path]) -> None:
    source = OnDisk.open(models("llama", num_hidden_layers=1))
    shards, travel = make_plan(source, RTN).shards(100_000), travelling(source.checkpoint.folder)
    assert sorted(publish.planned_files(shards, travel, ["report.json"])) == sorted(p.name for p in whole.iterdir())


# ── numbers that JSON does not have ───────────────────────────────────────────────────────────────────────────────────


def test_an_infinite_error_is_json_and_the_same_when_it_is_read_again(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = Comparison.summary

    class Infinite:
        def __init__(self, of: Any) -> None:
            self.found = summary(of).to_dict()

        def to_dict(self) -> dict[str, Any]:
            return {**self.found, "kl_mean": math.inf, "kl_p99": math.nan}

    monkeypatch.setattr(Comparison, "summary", lambda self: Infinite(self))
    options = TextOptions(eval_text=text, seq_len=24, eval_samples=2)
    source, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    first = quantize_model(source, out, RTN, options)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    stored = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert stored["evaluation"]["kl_mean"] is None
    assert stored["evaluation"]["not_finite"] == {"kl_mean": "infinity", "kl_p99": "nan"}
    assert first == stored == quantize_model(source, out, RTN, options)
