"""Honest outputs pass in the consumers of this environment; one wrong tensor does not; and what cannot be asked is one sentence."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import read_graph, write_graph
from arrondi.verification.consumers import CONSUMERS
from arrondi.verification.interpreters import variable
from tests.cli.conftest import Cli, cli, refused
from tests.graph.nets import Residual, images, perturbed
from tests.verification.damage import halves, in_directory, in_gguf, in_onnx, q4_0_one_up

__all__ = ["cli"]

Models = Callable[..., Path]
Sees = Callable[[Path], None]
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CONSUMERS:
        monkeypatch.delenv(variable(name), raising=False)


@pytest.fixture(scope="module")
def packed(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "w4"
    arrondi.quantize(models("llama", **WIDE), "W4A16", out=out)
    return out


@pytest.fixture(scope="module")
def blocks(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("blocks") / "m.gguf"
    arrondi.quantize(models("llama", **WIDE), "Q4_0", out=out, to="gguf")
    return out


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("network")
    write_graph(read_graph(perturbed(Residual()), images(2)), folder / "float.onnx")
    arrondi.quantize(folder / "float.onnx", "W8A8", calibration=images(32), out=folder / "w8.onnx", evaluate=False)
    return folder / "w8.onnx"


def only(document: dict[str, Any]) -> dict[str, Any]:
    (row,) = document["consumers"]
    return dict(row)


def test_transformers_computes_what_a_directory_means(packed: Path) -> None:
    row = only(arrondi.verify(packed))
    assert row["consumer"] == "transformers" and row["version"]
    assert row["ok"] and row["relative_difference"] < 1e-5 < row["bound"] and row["agreement"] == 1.0


def test_one_wrong_tensor_of_a_directory_is_found(packed: Path, sees: Sees, tmp_path: Path) -> None:
    sees(in_directory(packed, tmp_path / "wrong", "layers.0.self_attn.k_proj.weight_packed", halves(2)))
    row = only(arrondi.verify(packed))
    assert not row["ok"] and row["relative_difference"] > 10 * row["bound"]
    assert "off what the files mean here" in row["failure"]


def test_onnx_runtime_computes_what_a_network_means_and_no_other(network: Path, sees: Sees, tmp_path: Path) -> None:
    """Its int32 biases are predicted, so that it is nearer than the roundings between."""
    row = only(arrondi.verify(network, data=None))
    assert row["ok"] and row["relative_difference"] < 0.1 * row["bound"]
    for constant, change in (
        ("two.weight_codes", lambda x: np.roll(x, 1, 0)),
        ("head.weight_codes", lambda x: np.minimum(x.astype(int) + 1, 127).astype(np.int8)),
    ):
        sees(in_onnx(network, tmp_path / "wrong.onnx", constant, change))
        assert not only(arrondi.verify(network))["ok"], constant


# ── on the command line ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_status_says_whether_it_is_the_same(cli: Cli, blocks: Path, sees: Sees, tmp_path: Path) -> None:
    result = cli("verify", blocks, "--with", "transformers", "--json")
    assert result.code == 0 and result.document["ok"] and result.document["layout"] == "gguf"
    row = only(result.document)
    assert row["consumer"] == "transformers" and row["relative_difference"] < 1e-5 and row["failure"] is None
    sees(in_gguf(blocks, tmp_path / "wrong.gguf", "blk.1.ffn_up.weight", q4_0_one_up))
    result = cli("verify", blocks)
    assert result.code == 1 and "MISMATCH" in result.out and not result.err
    assert "Not asked: llama.cpp needs llama-cpp-python" in result.out


def test_what_is_converted_is_verified(cli: Cli, packed: Path, tmp_path: Path) -> None:
    result = cli("convert", packed, "-o", tmp_path / "m.gguf", "--to", "gguf", "--verify", "--json")
    assert result.code == 0 and result.document["verification"]["ok"] and result.document["to"] == "gguf"


def test_quantize_verifies(cli: Cli, models: Models, tmp_path: Path) -> None:
    result = cli("quantize", models("llama", **WIDE), "-o", tmp_path / "q", "--scheme", "W8A16", "--verify", "--json")
    assert result.code == 0 and result.document["verification"]["consumers"][0]["ok"]


def test_a_network_is_quantized_and_verified(cli: Cli, network: Path, tmp_path: Path) -> None:
    given = network.with_name("float.onnx")
    result = cli("quantize", given, "-o", tmp_path / "q.onnx", "--scheme", "w=int8/channel", "--verify", "--json")
    assert result.code == 0 and result.document["verification"]["consumers"][0]["consumer"] == "onnxruntime"


def test_what_cannot_be_asked_is_one_sentence(cli: Cli, packed: Path, blocks: Path, network: Path, models: Models, tmp_path: Path) -> None:  # fmt: skip
    refused(cli("verify", blocks, "--with", "llama.cpp", "--json"), "pip install llama-cpp-python", "ARRONDI_LLAMA_CPP")
    refused(cli("verify", packed, "--with", "llama.cpp"), "llama.cpp does not read")
    refused(cli("verify", network, "--with", "transformers"), "does not read")
    refused(cli("verify", packed, "--with", "vllm"), "Unknown consumer 'vllm'")
    refused(cli("verify", packed, "--python", "transformers"), "CONSUMER=PATH")
    refused(cli("verify", packed, "--python", f"transformers={tmp_path / 'no'}"), "no Python interpreter")
    refused(cli("verify", packed, "--data", tmp_path / "x.npz"), "Samples are for networks")
    refused(cli("convert", packed, "-o", tmp_path / "x", "--to", "gptq", "--python", "a=b"), "--verify")
    arrondi.quantize(models("llama", **WIDE), "TERNARY", out=tmp_path / "ours")
    refused(cli("verify", tmp_path / "ours"), "Only arrondi reads this layout")


def test_a_refusal_after_the_work_leaves_the_report(cli: Cli, models: Models, tmp_path: Path) -> None:
    result = cli("quantize", models("llama", **WIDE), "-o", tmp_path / "q", "--scheme", "TERNARY", "--verify", "--json")
    assert (
        result.code == 2 and result.document["layout"] == "arrondi" and "Only arrondi reads this layout" in result.err
    )


# ── processes that do not answer ──────────────────────────────────────────────────────────────────────────────────────


def interpreter(folder: Path, body: str) -> Path:
    """An interpreter that has every package, and does this when it is asked."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\ncase "$1" in *probe.py) exec {sys.executable} - "$@" <<\'E\'\nimport json, sys\n'
                    'print(json.dumps({a.split("=")[0]: "1.0" for a in sys.argv[2:]}))\nE\n;; esac\n' + body)  # fmt: skip
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for an interpreter")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sleep 60 & sleep 60", "no answer within 2 s"), ("echo the model is of no use >&2; exit 3", "the model is of no use"),
        ("kill -SEGV $$", "signal 11"), ("exit 0", "without an answer"),
    ],
)  # fmt: skip
def test_a_consumer_that_fails_is_a_mismatch(body: str, said: str, blocks: Path, tmp_path: Path) -> None:
    python, began = interpreter(tmp_path, body), time.monotonic()
    found = arrondi.verify(blocks, ["llama.cpp"], pythons={"llama.cpp": str(python)}, timeout=2.0)
    assert not found["ok"] and said in only(found)["failure"] and only(found)["relative_difference"] is None
    assert time.monotonic() - began < 50


@pytest.mark.skipif(os.name != "posix", reason="processes are looked for by their ids")
def test_a_consumer_ends_with_whoever_asked_it(tmp_path: Path) -> None:
    """Also with one that is killed, and with all that it has started."""
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'ids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}.')\n"
        "time.sleep(60)\n"
    )
    asks = (
        "import sys; from arrondi.verification.interpreters import Interpreter; from arrondi.verification.process import ask; "
        f"ask(Interpreter(sys.executable, False), {str(script)!r}, {{}}, {{}}, 60)"
    )
    asking = subprocess.Popen([sys.executable, "-c", asks])
    _until(lambda: (tmp_path / "ids").exists() and (tmp_path / "ids").read_text().endswith("."))
    asking.kill()
    asking.wait()
    for each in map(int, (tmp_path / "ids").read_text().rstrip(".").split()):
        _until(lambda each=each: not _lives(each))


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it never came about")


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended and was not yet collected does not."""
    try:
        return " Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2][:2]
    except OSError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc/self").exists()


def test_an_interpreter_is_named_by_the_environment(
    blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARRONDI_LLAMA_CPP", str(interpreter(tmp_path, "echo here I am; exit 1")))
    assert "here I am" in only(arrondi.verify(blocks, ["llama.cpp"]))["failure"]


def test_tokens_that_differ_are_a_mismatch() -> None:
    from arrondi.verification.expected import LLAMA_CPP
    from arrondi.verification.judge import judged
    from arrondi.verification.predict import Predicted
    from arrondi.verification.process import Answer

    logits = {"logits": np.random.default_rng(0).standard_normal((1, 4, 8))}
    predicted = Predicted(logits, logits, logits)
    assert judged(Answer(logits, {"tokens": [1, 2]}), LLAMA_CPP, predicted, (1, 2))["ok"]
    row = judged(Answer(logits, {"tokens": [1, 3]}), LLAMA_CPP, predicted, (1, 2))
    assert not row["ok"] and "other tokens" in row["failure"]
    wrong = judged(Answer({"logits": np.full((1, 4, 8), np.nan)}), LLAMA_CPP, predicted, ())
    assert not wrong["ok"] and "NaN" in wrong["failure"]
    assert "shape" in judged(Answer({"logits": torch.zeros(1, 3, 8).numpy()}), LLAMA_CPP, predicted, ())["failure"]
