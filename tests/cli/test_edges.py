"""Where the command line meets the system: processes, disks, memory, and options at their limits."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arrondi.pipeline
from arrondi.pipeline import demo
from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]
W4 = ("--scheme", "W4A16", "--group-size", 32)


def test_a_real_process_prints_one_document_and_nothing_else(models: Models, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", models("llama", num_hidden_layers=1), "-o", tmp_path / "out", *W4, "--method", "gptq", "--calibration", text,
                 "--samples", 2, "--seq-len", 24, "--json"]  # fmt: skip
    command = [sys.executable, "-W", "error::DeprecationWarning:arrondi", "-m", "arrondi", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert result.stdout.count("\n") == 1
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_full_disk(cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ("quantize", models("llama", num_hidden_layers=1), "-o", tmp_path / "out", *W4, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        refused(cli(*arguments), str(tmp_path / "out"), "the disk is full", "run the same command again to continue")
    assert cli(*arguments).code == 0


@pytest.mark.parametrize("command", ["quantize", "dequantize"])
def test_a_directory_that_may_not_be_written(
    command: str, cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = models("llama", num_hidden_layers=1), tmp_path / "locked" / "out"
    if command == "dequantize":
        assert cli("quantize", model, "-o", tmp_path / "q", *W4).code == 0
        model = tmp_path / "q"

    def denied(self: Path, *arguments: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", denied)
        result = cli(command, model, "-o", out, *(W4 if command == "quantize" else ()))
    refused(result, str(out), "Permission denied")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")],
    ids=type,
)
def test_too_little_memory(
    error: Exception, cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(arrondi.pipeline, "quantize_model", hungry)
    refused(cli("quantize", models("llama"), "-o", tmp_path / "out", *W4), "out of memory", "--samples")


def test_a_defect_is_not_hidden(cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(arrondi.pipeline, "quantize_model", defective)
    result = cli("quantize", models("llama"), "-o", tmp_path / "out", *W4)
    assert result.code == 1 and result.out == ""
    assert "Traceback" in result.err and "defective" in result.err
    assert result.err.endswith("arrondi: this is a defect of arrondi, not of your input: RuntimeError: a defect\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--option", "damping"), ["NAME=VALUE", "'damping'"]),
        (("--method", "gptq", "--option", "damping=much"), ["damping", "a number", "'much'"]),
        (("--method", "gptq", "--option", "dampening=0.1"), ["'dampening'", "'damping'"]),
        (("--shard-size", "inf"), ["--shard-size", "'inf'"]),
        (("--shard-size", "nan"), ["--shard-size", "'nan'"]),
        (("--group-size", "0"), ["group_size=0"]),
        (("--scheme", "w=int8/channel,a=int8/tensor/static"), ["Static scales", "--calibration"]),
        (("--to", "ggfu"), ["'ggfu'", "arrondi", "compressed-tensors"]),
        (("--layout", "gptq"), ["--to"]),
        (("--recipe", "nowhere.json"), ["nowhere.json", "recipe"]),
    ],
    ids=lambda v: v[-1] if isinstance(v, tuple) else "",
)
def test_values_that_make_no_sense(
    arguments: tuple[str, ...], words: list[str], cli: Cli, models: Models, tmp_path: Path
) -> None:
    start = ("quantize", models("llama"), "-o", tmp_path / "out")
    more = () if {"--group-size", "--scheme"} & set(arguments) else W4
    refused(cli(*start, *more, *arguments), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["-1", str(2**63), "one"])
def test_a_seed_that_is_none(seed: str, cli: Cli, models: Models, tmp_path: Path) -> None:
    result = cli("quantize", models("llama"), "-o", tmp_path / "out", *W4, "--seed", seed)
    assert result.code == 2 and "--seed" in result.err and "Traceback" not in result.err


def test_ignore_nothing_quantizes_the_head(cli: Cli, models: Models) -> None:
    start = ("plan", models("llama"), *W4, "--json")
    assert cli(*start).document["counts"]["quantized"] == 21
    assert cli(*start, "--ignore", "").document["counts"]["quantized"] == 22
    assert cli(*start, "--ignore", "lm_head", "--ignore", "re:.*o_proj").document["counts"]["quantized"] == 18


def test_an_option_reaches_the_method(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    start = ("quantize", models("llama", num_hidden_layers=1), *W4, "--method", "gptq", "--calibration", text, "--samples", 2, "--seq-len", 24, "--no-eval", "--json")  # fmt: skip
    one = cli(*start, "-o", tmp_path / "one").document
    two = cli(*start, "-o", tmp_path / "two", "--option", "damping=0.5", "--option", "order=none").document
    assert two["recipe"]["rules"][0]["options"] == {"damping": 0.5, "order": "none"}
    assert one["evaluation"] is None
    assert [r["output_error"] for r in one["layers"]] != [r["output_error"] for r in two["layers"]]


def test_eval_text_is_what_is_measured(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[2000:8000])
    model, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    report = cli("quantize", model, "-o", out, *W4, "--eval-text", other, "--seq-len", 24, "--eval-samples", 3, "--max-kl", "1e9", "--json").document  # fmt: skip
    assert report["evaluation"]["text"] == "other.txt" and report["calibration"] is None
    again = cli("eval", out, "--against", model, "--text", other, "--seq-len", 24, "--samples", 3, "--json").document
    assert again["kl_mean"] == report["evaluation"]["kl_mean"]


def test_a_result_that_is_no_number_misses_every_limit(
    cli: Cli, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"evaluation": {"kl_mean": float("nan")}}
    monkeypatch.setattr(arrondi.pipeline, "quantize_model", lambda *arguments, **options: result)
    text = tmp_path / "text.txt"
    missed = cli(
        "quantize", models("llama"), "-o", tmp_path / "out", *W4, "--eval-text", text, "--max-kl", "1", "--json"
    )
    assert missed.code == 3 and "--max-kl 1 was missed" in missed.err


def test_the_demo_prints_its_table(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_RUNS", (("W8A16", "rtn"), ("W4A16", "gptq")))
    options = demo.TextOptions
    monkeypatch.setattr(demo, "TextOptions", lambda path, **more: options(path, samples=4, seq_len=64, eval_samples=4))
    result = cli("demo", "-o", tmp_path / "demo")
    assert result.code == 0, result.err
    for words in ("W8A16", "W4A16", "perplexity", "Return a list of"):
        assert words in result.out
    assert (tmp_path / "demo" / "w4a16-gptq" / "config.json").exists()
    document = cli("demo", "-o", tmp_path / "demo", "--json").document
    assert [(r["scheme"], r["method"]) for r in document["rows"]] == [("W8A16", "rtn"), ("W4A16", "gptq")]
    assert document["rows"][0]["kl_mean"] < document["rows"][1]["kl_mean"]
    assert document["rows"][1]["bytes"] < document["rows"][0]["bytes"] < document["original"]["bytes"]
