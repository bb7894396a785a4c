"""Writing in any order, twice, and onto a disk that is full."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arrondi.checkpoint import ShardPlan, ShardWriter, TensorSpec, guard_disk, read_header, shard_digest, write_json
from arrondi.checkpoint.containers import disk
from arrondi.errors import OutputError

TENSORS = {name: torch.arange(n, dtype=torch.float32) for name, n in (("a", 3), ("b", 5), ("c", 0), ("d", 2))}
SPECS: list[TensorSpec] = [(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()]


def written(folder: Path, plan: ShardPlan, order: list[str], target: Path | None = None) -> ShardWriter:
    writer = ShardWriter(folder, plan, target)
    for name in order:
        writer.put(name, TENSORS[name])
    writer.sync()
    return writer


def test_shards_are_filled_in_order_and_named_as_hugging_face_does() -> None:
    plan = ShardPlan.split(SPECS, 24)
    assert {f: [n for n, _, _ in specs] for f, specs in plan.files.items()} == {
        "model-00001-of-00003.safetensors": ["a"],
        "model-00002-of-00003.safetensors": ["b", "c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert plan.nbytes == 40
    assert plan.index() == {
        "metadata": {"total_size": 40},
        "weight_map": {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors", "c": "model-00002-of-00003.safetensors", "d": "model-00003-of-00003.safetensors"},
    }  # fmt: skip


def test_one_shard_has_no_index() -> None:
    plan = ShardPlan.split(SPECS, 40)
    assert list(plan.files) == ["model.safetensors"]
    assert plan.index() is None


@pytest.mark.parametrize("limit", [1, 12, 13, 39, 40, 10**9])
def test_no_shard_is_larger_than_the_limit_unless_one_tensor_is(limit: int) -> None:
    for specs in ShardPlan.split(SPECS, limit).files.values():
        size = sum(4 * shape[0] for _, _, shape in specs)
        assert size <= limit or sum(shape[0] > 0 for _, _, shape in specs) == 1


def test_the_order_of_writing_does_not_change_the_bytes(tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, 24)
    for folder, order in (("one", "abcd"), ("two", "dbca")):
        written(tmp_path / folder, plan, list(order)).publish()
    for file in plan.files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    together = {n: t for file in plan.files for n, t in load_file(tmp_path / "one" / file).items()}
    assert all(torch.equal(together[n], t) for n, t in TENSORS.items())


def test_what_a_killed_writer_put_is_there_for_the_next(tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, 10**9)
    written(tmp_path, plan, ["b"])
    again = ShardWriter(tmp_path, plan)
    assert torch.equal(again.get("b"), TENSORS["b"])
    for name in "acd":
        again.put(name, TENSORS[name])
    again.publish()
    assert all(torch.equal(t, TENSORS[n]) for n, t in load_file(tmp_path / "model.safetensors").items())


def test_nothing_has_its_final_name_before_publish(tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, 24)
    written(tmp_path, plan, list("abcd"))
    assert {p.name for p in tmp_path.iterdir()} == {f"{f}.partial" for f in plan.files}


def test_publish_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """A file that has its name already is the one that is read, checked and, if need be, written."""
    plan, (work, out) = ShardPlan.split(SPECS, 24), (tmp_path / "work", tmp_path / "out")
    out.mkdir()
    put = written(work, plan, list("abcd"), out).digest("a")
    first, *rest = plan.files
    os.replace(work / f"{first}.partial", out / first)
    again = ShardWriter(work, plan, out)
    assert not (work / f"{first}.partial").exists() and again.digest("a") == put
    again.put("a", TENSORS["a"] + 1)
    again.publish()
    assert {p.name for p in out.iterdir()} == {first, *rest, "model.safetensors.index.json"} == set(plan.names)
    assert torch.equal(load_file(out / first)["a"], TENSORS["a"] + 1)


def test_publish_says_when_a_finished_file_is_gone(tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, 10**9)
    writer = written(tmp_path, plan, list("abcd"))
    (tmp_path / "model.safetensors.partial").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors: gone"):
        writer.publish()


def test_a_checkpoint_may_have_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    plan = ShardPlan.split([(f"t{i}", torch.uint8, (3,)) for i in range(60)], 1)
    assert len(plan.files) == 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        writer = ShardWriter(tmp_path, plan)
        for i in range(60):
            writer.put(f"t{i}", torch.full((3,), i, dtype=torch.uint8))
        assert len(writer.sync()) == 60
        writer.publish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_file(tmp_path / "model-00060-of-00060.safetensors")["t59"].tolist() == [59, 59, 59]


# ── digests ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(content: bytes, piece: int) -> str:
    parts = [hashlib.sha256(content[i : i + piece]).digest() for i in range(0, len(content), piece)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000])
def test_put_copy_and_what_lies_there_have_one_digest(
    n: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 64 bytes here, so that there are several, on one thread and on three."""
    monkeypatch.setattr(disk, "PIECE", 64)
    tensor = torch.randn(n, generator=torch.Generator().manual_seed(n))
    save_file({"copied": tensor}, tmp_path / "in.safetensors")
    writer = ShardWriter(tmp_path, ShardPlan({"m.safetensors": [(x, torch.float32, (n,)) for x in ("put", "copied")]}))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = writer.put("put", tensor), writer.copy(read_header(tmp_path / "in.safetensors")["copied"])
        assert {*found, writer.digest("put"), writer.digest("copied")} == {by_hand(tensor.numpy().tobytes(), 64)}
        assert writer.sync() == {"put": found[0], "copied": found[1]}
        assert writer.sync() == {}, "only what was put since"
    finally:
        torch.set_num_threads(before)
    assert torch.equal(writer.get("put"), tensor) and torch.equal(writer.get("copied"), tensor)


def test_a_digest_tells_of_the_bytes_that_are_there(tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, 10**9)
    writer = written(tmp_path, plan, list("abcd"))
    path, before = tmp_path / "model.safetensors.partial", {n: writer.digest(n) for n in TENSORS}
    entries = read_header(path)
    with path.open("r+b") as file:
        file.seek(entries["b"].start + 2)
        file.write(b"\1")
    after = {n: writer.digest(n) for n in TENSORS}
    assert {n for n in TENSORS if before[n] != after[n]} == {"b"}
    os.truncate(path, entries["d"].start)
    again = ShardWriter(tmp_path, plan)
    assert {n for n in TENSORS if after[n] != again.digest(n)} == {"d"}
    assert again.digest("none of these") is None


@pytest.mark.parametrize("shard_bytes", [1, 24, 10**9])
def test_the_digest_of_a_file_is_known_without_reading_it(shard_bytes: int, tmp_path: Path) -> None:
    plan = ShardPlan.split(SPECS, shard_bytes)
    writer = ShardWriter(tmp_path, plan)
    digests = {name: writer.put(name, tensor) for name, tensor in TENSORS.items()}
    writer.publish()
    found = writer.described(digests)
    assert found == {
        f: {"bytes": (tmp_path / f).stat().st_size, "digest": shard_digest(tmp_path / f)} for f in plan.files
    }
    with pytest.raises(AssertionError, match="a was never written"):
        writer.described({name: digest for name, digest in digests.items() if name != "a"})


def test_every_bit_of_a_file_counts_in_its_digest(tmp_path: Path) -> None:
    written(tmp_path, ShardPlan.split(SPECS, 10**9), list("abcd")).publish()
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    seen = {shard_digest(path)}
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        seen.add(shard_digest(path) or str(i))
    assert len(seen) == len(content) + 1


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_one_piece_is_an_error(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PIECE", 4)

    def piece(offset: int, length: int) -> bytes:
        if offset == 8:
            raise OSError(errno.EIO, "no")
        return bytes(length)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(OSError, match="no"):
            disk.digest_pieces(20, piece)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("piece", [1, 7, 8, 1000])
def test_a_tensor_is_copied_in_pieces_as_it_is(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PIECE", piece)
    source = {"x": torch.randn(5, 3).to(torch.float8_e5m2), "empty": torch.zeros(0, dtype=torch.int16)}
    save_file(source, tmp_path / "in.safetensors")
    writer = ShardWriter(
        tmp_path, ShardPlan({"out.safetensors": [(n, t.dtype, tuple(t.shape)) for n, t in source.items()]})
    )
    for entry in read_header(tmp_path / "in.safetensors").values():
        writer.copy(entry)
    for name, tensor in source.items():
        assert torch.equal(writer.get(name).view(torch.uint8), tensor.view(torch.uint8))


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    matrix = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    writer = ShardWriter(tmp_path, ShardPlan({"m.safetensors": [("x", torch.int32, (3, 2))]}))
    writer.put("x", matrix.T)
    assert writer.get("x").tolist() == [[0, 3], [1, 4], [2, 5]]


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence_that_says_what_is_kept(code: int, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"the disk is full.*run the same command again") as caught,
        guard_disk(tmp_path),
    ):
        raise OSError(code, os.strerror(code))
    assert str(tmp_path) in str(caught.value)


def test_other_errors_of_the_system_pass() -> None:
    with pytest.raises(PermissionError), guard_disk(Path()):
        raise PermissionError(errno.EACCES, "no")


def full(*args: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "the header": ("pwrite", lambda folder: ShardWriter(folder, ShardPlan.split(SPECS, 24))),
    "the size": ("ftruncate", lambda folder: ShardWriter(folder, ShardPlan.split(SPECS, 24))),
    "json": ("fsync", lambda folder: write_json(folder / "x.json", {})),
}


@pytest.mark.parametrize("what", WRITES)
def test_every_write_is_guarded(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function, write = WRITES[what]
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OutputError, match="disk is full"):
        write(tmp_path)


@pytest.mark.parametrize("what", ["put", "copy", "sync"])
def test_a_writer_at_work_is_guarded(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "in.safetensors")
    entry = read_header(tmp_path / "in.safetensors")["a"]
    writer = ShardWriter(tmp_path, ShardPlan.split(SPECS, 10**9))
    writer.put("b", TENSORS["b"])
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "fdatasync", full)
    work = {"put": lambda: writer.put("a", TENSORS["a"]), "copy": lambda: writer.copy(entry), "sync": writer.sync}
    with pytest.raises(OutputError, match="disk is full"):
        work[what]()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: whole(handle, data[:3], offset))
    writer = written(tmp_path, ShardPlan.split(SPECS, 10**9), list("abcd"))
    assert all(torch.equal(writer.get(n), t) for n, t in TENSORS.items())
