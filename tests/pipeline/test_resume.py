"""Runs that are killed, whose files are damaged, or that run out of disk: nothing is lost and nothing half is taken for whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import Checkpoint, ModelDir, ShardWriter, read_header
from arrondi.errors import FileFormatError, OutputError
from arrondi.native import native
from arrondi.pipeline import TextOptions, inspect_model, quantize_model
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.manifest import MANIFEST, WORK, finished_key
from tests.pipeline.killer import TAIL, digest
from tests.pipeline.stopping import DAMAGES, Stop, stopped_after

REPOSITORY = Path(__file__).parents[2]
RTN = arrondi.Recipe.simple("W4A16", group_size=32)
GPTQ = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)


# ── SIGKILL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("gptq", 3),
        ("awq", 1),
        pytest.param("trellis-yaqa", 1, marks=pytest.mark.full),
        ("dequantize", 2),
        *(pytest.param(m, 50, marks=pytest.mark.full) for m in ("rtn", "gptq", "dequantize")),
    ],
)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(
    method: str, kills: int, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = models("llama", num_hidden_layers=2)
    command = [sys.executable, "-m", "tests.pipeline.killer", str(model), str(tmp_path), str(text), method, str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])

    once, often, total = found["once"], found["often"], found["total"]
    assert len(once) == kills + TAIL
    assert all(run["kills"] == 1 and run["finished"] and run["same"] for run in once), once
    # Only when nothing is left to do but to remove the working folder is there a config.json.
    assert [run["moments"] for run in once if run["half"] == "finished"] == [[total - 1], [total]]
    assert all("a run that has not ended" in run["half"] for run in once[:-2])
    # What was finished is not done again: the later the kill, the less there is to do.
    changes = [run["changes"] for run in once]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] == total and changes[-1] == 1
    assert len(set(changes)) > 2, "there are several steps"
    assert often["kills"] > 2 and often["finished"] and often["same"]

    # A file that the kernel does not let grow is a full disk: one sentence, no model, and the same bytes once there is room.
    for limited in found["limited"]:
        assert "the disk is full" in limited["said"] and "run the same command again" in limited["said"]
        assert limited["half"] != "finished" and limited["finished"] and limited["same"]


@pytest.fixture
def stopped(models: Callable[..., Path], text: Path, tmp_path: Path) -> Path:
    """The output of a gptq run that was stopped after its first block."""
    with stopped_after():
        gptq(models, text, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(models: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of a gptq run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    gptq(models, text, out)
    return digest(out)


def gptq(models: Callable[..., Path], text: Path, out: Path, **options: Any) -> dict[str, Any]:
    texts = TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    return quantize_model(models("llama", num_hidden_layers=2), out, GPTQ, texts, **options)


def test_a_finished_block_is_read_back_not_rounded_again(
    stopped: Path, models: Callable[..., Path], text: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = ShardWriter.put
    monkeypatch.setattr(ShardWriter, "put", lambda self, name, t: (written.append(name), put(self, name, t))[1])
    report = gptq(models, text, stopped)
    assert written and not any(".layers.0." in n for n in written)
    assert digest(stopped) == whole
    assert {r["name"] for r in report["layers"]} > {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    }


@pytest.mark.parametrize("end", [b'{"step": "block 1", "da', b"\xff\xfe\x80\n", b"7\n"])
def test_a_run_goes_on_from_a_journal_with_a_bad_line(
    end: bytes, stopped: Path, models: Callable[..., Path], text: Path, whole: dict[str, str]
) -> None:
    with (stopped / WORK / "journal.jsonl").open("ab") as journal:
        journal.write(end)
    gptq(models, text, stopped)
    assert digest(stopped) == whole


def test_a_run_without_a_readable_journal_starts_again(
    stopped: Path, models: Callable[..., Path], text: Path, whole: dict[str, str]
) -> None:
    (stopped / WORK / "journal.jsonl").write_bytes(b"\xff" * 1000)
    gptq(models, text, stopped)
    assert digest(stopped) == whole


# ── bytes that are not what the journal says ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "damage"), [*(("measured", d) for d in DAMAGES), ("unit 0", "deleted"), ("unit 0", "one bit")]
)
def test_a_part_that_is_damaged_is_written_again(
    step: str, damage: str, models: Callable[..., Path], text: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with stopped_after(step):
        gptq(models, text, out)
    (part,) = (out / WORK).glob("*.partial")
    DAMAGES[damage](part)
    gptq(models, text, out)
    assert digest(out) == whole


@pytest.mark.parametrize("damage", ["deleted", "cut", "one bit"])
def test_a_shard_that_is_damaged_while_others_wait_for_their_names_is_written_again(
    damage: str, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(out: Path) -> None:
        quantize_model(models("llama", num_hidden_layers=2), out, RTN, shard_bytes=100_000)

    replace, out = os.replace, tmp_path / "out"

    def first(old: Any, new: Any) -> None:
        replace(old, new)
        if Path(new).suffix == ".safetensors":
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", first)
        quantize(out)
    (shard,) = out.glob("*.safetensors")
    DAMAGES[damage](shard)
    quantize(out)
    quantize(tmp_path / "whole")
    assert digest(out) == digest(tmp_path / "whole")


def test_only_the_steps_from_the_damage_on_are_done_again(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, name = tmp_path / "out", "model.layers.1.mlp.up_proj.weight_packed"
    with stopped_after("measured"):
        gptq(models, text, out)
    (part,) = (out / WORK).glob("*.partial")
    entry = read_header(part)[name]
    with part.open("r+b") as file:
        file.seek(entry.start)
        file.write(bytes(8))
    written: list[str] = []
    put = ShardWriter.put
    monkeypatch.setattr(ShardWriter, "put", lambda self, name, t: (written.append(name), put(self, name, t))[1])
    said: list[str] = []
    gptq(models, text, out, progress=lambda done, total, what: said.append(what))
    assert name in written and not any(".layers.0." in n for n in written)
    assert any("step 'unit 1' is damaged" in what for what in said)


def test_another_command_starts_anew_where_an_unfinished_run_was(
    stopped: Path, models: Callable[..., Path], tmp_path: Path
) -> None:
    (stopped / "model-00001-of-00002.safetensors").write_bytes(b"published before the kill")
    (stopped / "model.safetensors.index.json").write_text("{}")
    source = models("llama", num_hidden_layers=2)
    quantize_model(source, stopped, RTN)
    quantize_model(source, tmp_path / "whole", RTN)
    assert digest(stopped) == digest(tmp_path / "whole")


def test_the_half_written_output_is_no_model(stopped: Path) -> None:
    assert finished_key(stopped) is None
    for read in (Checkpoint.open, arrondi.load, inspect_model):
        with pytest.raises(FileFormatError, match="a run that has not ended"):
            read(stopped)
    assert [p.name for p in stopped.iterdir()] == [WORK], "nothing has its final name"


# ── sources that are replaced ─────────────────────────────────────────────────────────────────────────────────────────


def replaced(source: Path, seed: int = 1) -> None:
    """Other weights in the same file, with its size and date kept, as `cp -p` and `rsync -t` leave it."""
    path = source / "model.safetensors"
    stat = path.stat()
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def source(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of this test's own."""
    return Path(shutil.copytree(models("llama", num_hidden_layers=2), tmp_path / "source"))


def quantized(source: Path, out: Path, text: Path | None) -> None:
    if text is None:
        quantize_model(source, out, RTN)
    else:
        quantize_model(source, out, GPTQ, TextOptions(text, samples=2, seq_len=24, eval_samples=2))


@pytest.mark.parametrize(("calibrated", "step"), [(True, "unit 0"), (True, "measured"), (False, "tensors 0")])
def test_two_models_are_never_mixed(calibrated: bool, step: str, source: Path, text: Path, tmp_path: Path) -> None:
    used, before = text if calibrated else None, ModelDir.open(source).fingerprint()
    with stopped_after(step):
        quantized(source, tmp_path / "out", used)
    replaced(source)
    assert ModelDir.open(source).fingerprint() == before, "size and date do not tell"
    quantized(source, tmp_path / "out", used)
    quantized(source, tmp_path / "whole", used)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert named(tmp_path / "out") == {n: digest_by_hand(t) for n, t in load_file(source / "model.safetensors").items()}


def named(out: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((out / MANIFEST).read_text())["model"]["tensors"]
    return found


def digest_by_hand(tensor: torch.Tensor) -> str:
    content, piece = tensor.numpy().tobytes(), 4 << 20
    parts = [hashlib.sha256(content[i : i + piece]).digest() for i in range(0, len(content), piece)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def test_a_source_that_changes_while_it_is_read_ends_the_run(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is read twice in a run with text: as it is, and to be rounded."""
    record = Journal.record

    def then_replace(self: Journal, step: str, data: Any, **claims: Any) -> None:
        record(self, step, data, **claims)
        replaced(source)

    with monkeypatch.context() as patch, pytest.raises(FileFormatError, match=r"the bytes of .* changed while the run"):
        patch.setattr(Journal, "record", then_replace)
        quantized(source, tmp_path / "out", text)
    assert not (tmp_path / "out" / "config.json").exists()
    quantized(source, tmp_path / "out", text)
    quantized(source, tmp_path / "whole", text)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_finished_output_of_other_weights_is_not_taken_for_this_models(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "out", None)
    before = digest(tmp_path / "out")
    replaced(source)
    with pytest.raises(OutputError, match=r"was made of other weights: .* has changed since.*--overwrite"):
        quantized(source, tmp_path / "out", None)
    assert digest(tmp_path / "out") == before


def test_another_tokenizer_makes_another_run(source: Path, text: Path, tmp_path: Path) -> None:
    """Its files travel with the output, and the ids of the text are its work."""
    with stopped_after():
        quantized(source, tmp_path / "out", text)
    path = source / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"marked": true,', 1))
    quantized(source, tmp_path / "out", text)
    quantized(source, tmp_path / "whole", text)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["model.safetensors", f"{WORK}/model.safetensors.partial", "tokenizer.json", "1_Pooling"]
)
def test_a_run_that_goes_on_never_writes_through_a_link(name: str, source: Path, tmp_path: Path) -> None:
    """Somebody saves space by links to the model: its files stay as they are."""
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    out = tmp_path / "out"
    with stopped_after("tensors 0"):
        quantize_model(source, out, RTN)
    (out / WORK / "model.safetensors.partial").unlink()
    (out / name).symlink_to(source / name.removeprefix(f"{WORK}/").removesuffix(".partial"))
    before = digest(source)
    try:
        quantize_model(source, out, RTN)
    except OSError:
        (out / name).unlink()
        quantize_model(source, out, RTN)
    assert digest(source) == before
    quantize_model(source, tmp_path / "whole", RTN)
    assert digest(out) == digest(tmp_path / "whole") and not any(p.is_symlink() for p in out.rglob("*"))


@pytest.mark.parametrize("change", ["path", "threads"])
def test_a_run_that_goes_on_on_another_machine_is_one_of_that_machine(
    change: str, stopped: Path, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Sums are rounded in another order there, so blocks of the two are not mixed."""
    if change == "path" and native is None:
        pytest.skip("the kernels are not compiled")
    path, threads = native and native.path(), torch.get_num_threads()
    try:
        if change == "path":
            native.use_path("portable")
        else:
            torch.set_num_threads(threads + 1)
        if change == "path" and path == "portable":
            pytest.skip("this machine has one path only")
        said: list[str] = []
        gptq(models, text, stopped, progress=lambda done, total, what: said.append(what))
        gptq(models, text, tmp_path / "whole")
        assert digest(stopped) == digest(tmp_path / "whole")
        assert any("unfinished run" in what and "here" in what for what in said)
    finally:
        torch.set_num_threads(threads)
        if native is not None:
            native.use_path(path)


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
    import arrondi.pipeline.run as pipeline

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "HIDDEN_LIMIT", 0)
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
        quantize_model(models("llama", num_hidden_layers=1), tmp_path / "out", RTN)
    monkeypatch.undo()
    assert quantize_model(models("llama", num_hidden_layers=1), tmp_path / "out", RTN)["layers"]


def test_resuming_gives_the_numbers_of_a_run_that_was_not_interrupted(
    stopped: Path, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    resumed, whole = gptq(models, text, stopped), gptq(models, text, tmp_path / "whole")
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert torch.tensor(whole["evaluation"]["kl_mean"]) > 0
