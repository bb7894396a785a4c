"""A run that ends in one GGUF file: what it reports is what the file holds, and what is in the way is refused before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import ArrondiError, OutputError


@pytest.mark.parametrize(("scheme", "method"), [("Q4_0", "rtn"), ("Q8_0", "gptq")])
def test_one_file_and_its_report(
    scheme: str, method: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    plain, out = models("llama"), tmp_path / "m.gguf"
    calibration = None if method == "rtn" else text
    report = arrondi.quantize(
        plain,
        scheme,
        out=out,
        to="gguf",
        method=method,
        calibration=calibration,
        samples=4,
        seq_len=32,
        evaluation=text,
        eval_samples=4,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.report.json"]
    assert report["file_bytes"] == out.stat().st_size
    assert {t.tensor_type.name for t in GGUFReader(out).tensors if "ffn" in t.name and "norm" not in t.name} == {scheme}
    found = arrondi.evaluate(out, plain, text, seq_len=32, samples=4)
    assert found["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-6)


def test_the_package_of_gguf_decodes_what_we_load(models: Callable[..., Path], tmp_path: Path) -> None:
    arrondi.quantize(models("llama"), "Q4_0", out=tmp_path / "m.gguf", to="gguf")
    checkpoint = Checkpoint.open(tmp_path / "m.gguf")
    theirs = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert torch.equal(checkpoint.dense("model.layers.1.mlp.down_proj.weight"), theirs["blk.1.ffn_down.weight"])
    q, stored = checkpoint.dense("model.layers.1.self_attn.q_proj.weight"), theirs["blk.1.attn_q.weight"]
    heads = (
        stored.reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    )  # pairs of neighbours in the file, halves in the model
    assert torch.equal(q, heads)


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [("llama", "m", "names no GGUF file"), ("mamba2", "m.gguf", "GGUF"), ("llama", "there.gguf", "is there already")],
)
def test_refused_before_the_work(name: str, out: str, words: str, models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(ArrondiError, match=words):
        arrondi.quantize(models(name), "Q4_0", out=tmp_path / out, to="gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["there.gguf"] and (tmp_path / "there.gguf").read_text() == "mine"


def test_a_killed_run_goes_on(models: Callable[..., Path], tmp_path: Path) -> None:
    plain, out = models("llama"), tmp_path / "m.gguf"
    arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
    whole = out.read_bytes()
    out.unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arrondi.quantize(plain, "Q4_0", out=out, to="gguf", progress=stop)
    assert not out.exists()
    arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
    assert out.read_bytes() == whole
    with pytest.raises(OutputError, match="is there already"):
        arrondi.quantize(plain, "Q4_0", out=out, to="gguf")
