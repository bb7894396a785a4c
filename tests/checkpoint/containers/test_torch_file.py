"""Files of torch.save: read to the bit where that is allowed, refused in one sentence elsewhere, and never run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.tensor_file import read_tensor
from arrondi.checkpoint.containers.torch_file import INDEX, allow_torch_load, read_torch_header, torch_load_allowed
from arrondi.errors import FileFormatError
from arrondi.pipeline.diff import diff_models


def tables() -> dict[str, torch.Tensor]:
    """Tensors of several types; two share a storage, one begins in the middle of it."""
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return {
        "all": base, "rows": base[2:4], "again": base, "bf16": torch.nn.Parameter(base.bfloat16()), "bytes": torch.arange(7, dtype=torch.uint8),
        "number": torch.tensor(3), "none": torch.zeros(0, 4), "f8": base.to(torch.float8_e4m3fn), "flags": base > 0,
    }  # fmt: skip


@pytest.mark.parametrize("inside", [None, "state_dict"])
def test_every_tensor_is_read_to_the_bit(inside: str | None, tmp_path: Path) -> None:
    state = tables()
    torch.save({inside: state, "epoch": 3} if inside else state, tmp_path / "x.pt")
    entries = read_torch_header(tmp_path / "x.pt")
    assert list(entries) == list(state)
    for name, tensor in state.items():
        found = read_tensor(entries[name])
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8)), name


class Runs:
    """Whoever unpickles this runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_what_would_run_is_refused_and_not_run(allowed: bool, plain: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "pytorch_model.bin"
    held = {"a": torch.ones(2), "b": Runs(trace)}
    if plain:
        file.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, file)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for model in (file, tmp_path):
        with pytest.raises(FileFormatError) as caught:
            if allowed:
                with allow_torch_load():
                    Checkpoint.open(model)
            else:
                Checkpoint.open(model)
        said = str(caught.value)
        assert "\n" not in said and "pytorch_model.bin" in said
        assert (
            ("which could run code. Ask for safetensors" in said or plain) if allowed else "--allow-torch-load" in said
        )
    assert not trace.exists() and not torch_load_allowed()
    os.system(f"touch {trace}")
    assert trace.exists()  # the trap works


def rewritten(file: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:700]), "no archive of torch.save"),
    "old": (lambda f: torch.save(tables(), f, _use_new_zipfile_serialization=False), "of PyTorch 1.6 or later"),
    "compressed": (lambda f: rewritten(f, lambda n, c: c, zipfile.ZIP_DEFLATED), "is compressed"),
    "big-endian": (lambda f: rewritten(f, lambda n, c: b"big" if n.endswith("byteorder") else c), "big-endian"),
    "short": (lambda f: rewritten(f, lambda n, c: c[:50] if n.endswith("data/0") else c), "which has 50"),
    "no table": (lambda f: torch.save([torch.ones(2)], f), "holds no table of tensors"),
    "a word": (lambda f: torch.save({"a": torch.ones(2), "b": "word"}, f), "'b' is no tensor but str"),
    "a view": (lambda f: torch.save({"a": torch.ones(2, 3).T}, f), "'a' is a view"),
    "sparse": (lambda f: torch.save({"a": torch.ones(2, 3).to_sparse()}, f), "a|cannot be loaded"),
    "complex": (lambda f: torch.save({"a": torch.ones(2, dtype=torch.complex128)}, f), "is of type torch.complex128"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_or_no_table_is_refused(fault: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(tables(), file)
    damage, message = FAULTS[fault]
    damage(file)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_torch_header(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_of_such_files_is_the_same_model(shards: int, models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "pickled"
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    files = {f"pytorch_model-{i}.bin" if shards > 1 else "pytorch_model.bin": names[i::shards] for i in range(shards)}
    for file, some in files.items():
        torch.save({n: state[n] for n in some}, out / file)
    if shards > 1:
        index = {"weight_map": {n: file for file, some in files.items() for n in some}}
        (out / INDEX).write_text(json.dumps(index))
    torch.save({"lr": 1}, out / "optimizer.pt")
    with arrondi.allow_torch_load():
        assert {r["verdict"] for r in diff_models(out, source)["tensors"]} == {"same codes"}
        arrondi.quantize(out, "w=int4/g32", out=tmp_path / "a")
    arrondi.quantize(source, "w=int4/g32", out=tmp_path / "b")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert not list((tmp_path / "a").glob("*.bin"))
