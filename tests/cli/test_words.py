"""What the command line says: usage errors, Ctrl-C, tables on narrow terminals, layout and readers, JSON without NaN."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
import arrondi.pipeline
from arrondi.cli import main
from arrondi.measure import Comparison
from arrondi.report import sole_reader
from arrondi.report.readers import readers_lines
from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]
SOURCE = Path(arrondi.__file__).parent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quantise", "m"), ["No such command: quantise", "Did you mean quantize?"]),
        (
            ("xyz",),
            [
                "No such command: xyz",
                "bench, compare, convert, demo, dequantize, diff, eval, imatrix, inspect, methods, plan, quantize, run",
            ],
        ),
        (("quantize", "m"), ["--output", "arrondi quantize --help"]),
        (("quantize", "m", "-o", "x", "--bits", "4"), ["--bits", "--scheme W4A16"]),
        (("quantize", "m", "-o", "x", "--w_bits", "4"), ["--w_bits", "--scheme W4A16"]),
        (("quantize", "m", "--output-dir", "x"), ["--output-dir", "-o DIR"]),
        (("quantize", "m", "-o", "x", "--nsamples", "4"), ["--samples"]),
        (("quantize", "m", "-o", "x", "--dataset", "wikitext2"), ["--calibration FILE"]),
        (("plan", "m", "--group_size", "4"), ["Did you mean --group-size?"]),
        (("plan", "m", "--load_in_4bit"), ["--scheme"]),
        (("quantize", "m", "-o", "x", "--force"), ["--overwrite"]),
        (("quantize", "m", "-o", "x", "--resume"), ["the same command continues"]),
        (("quantize", "m", "-o", "x", "--exclude-layers", "lm_head"), ["--ignore"]),
        (("quantize", "m", "-o", "x", "--max_seq_length", "512"), ["--seq-len"]),
        (("quantize", "m", "-o", "x", "--threads", "2"), ["OMP_NUM_THREADS"]),
        (("run", "m", "--prompt", "hello"), ["arrondi run MODEL"]),
        (("run", "m", "hello", "--max-tokens", "3"), ["--max-new-tokens"]),
        (("plan", "m", "--dataset", "wikitext2"), ["No such option: --dataset", "arrondi plan --help"]),
        (("bench", "--ignor", "x"), ["No such option: --ignor", "arrondi bench --help"]),
        (("plan", "m", "--zzz"), ["No such option: --zzz", "arrondi plan --help"]),
        (("plan", "m", "--samples", "many"), ["--samples", "integer"]),
        (("run", "m"), ["prompt", "arrondi run --help"]),
        (("plan", "m", "--scheme", "Q4_K_XL"), ["'Q4_K_XL'", "GGUF", "Q4_K"]),
        (("plan", "m", "--scheme", "IQ3_M"), ["'IQ3_M'", "GGUF", "Q3_K"]),
        (("plan", "m", "--scheme", "int4"), ["'int4'", "W4A16"]),
        (("plan", "m", "--scheme", "4-bit"), ["'4-bit'", "W4A16"]),
        (("plan", "m", "--scheme", "gptq"), ["--method", "W4A16"]),
        (("plan", "m", "--scheme", "FP8_"), ["'FP8_BLOCK' or 'FP8_DYNAMIC'"]),
        (("quantize", "m", "-o", "x", "--device", "tpu"), ["device", "cuda:0", "'tpu'"]),
        (("quantize", "m", "-o", "x", "--device", "cuda:99"), ["cuda:99", "Use cpu"]),
        (("eval", "m", "--against", "m", "--text", "t", "--device", "meta"), ["device", "cuda:0", "'meta'"]),
        (("quantize", "m", "-o", "x", "--no-eval", "--eval-text", "t"), ["--no-eval", "--eval-text", "contradict"]),
        (("quantize", "m", "-o", "x", "--eval-text", "t", "--max-kl", "nan"), ["--max-kl", "nan"]),
        (("run", "m", "hello", "--temperature", "inf"), ["--temperature"]),
        (("quantize", "m", "-o"), ["'-o' requires", "arrondi quantize --help"]),
        (("quantize", "m", "-o", "x", "--output", "y"), ["--output is there twice"]),
        (("plan", "m", "--scheme", "W4A16", "--scheme", "W8A16"), ["--scheme is there twice"]),
        (("quantize", "m", "-o", ""), ["--output needs a value"]),
        (("quantize", "m", "--output="), ["--output needs a value"]),
        (("demo", "-o", ""), ["--output needs a value"]),
        (("plan", "m", "--targets", ""), ["--targets needs a value"]),
        (("plan", ""), ["name is empty"]),
        (("plan", "m", "--recipe", "nowhere.json"), ["nowhere.json: no such file"]),
        (("plan", "m", "--method", "hqq", "--scheme", "NF4"), ["hqq", "nf4", "rtn or gptq"]),
        (("plan", "m", "--method", "gptq", "--scheme", "W8A8", "--option", "order=dynamic"), ["order=static"]),
        (("plan", "m", "--method", "gptq", "--option", "damping=-1"), ["damping", "from 0 to", "-1"]),
        (("plan", "m", "--method", "gptq", "--option", "damping=1e999"), ["damping", "inf"]),
        (("plan", "m", "--method", "hqq", "--option", "iterations=-1"), ["iterations", "from 0 to"]),
        (("plan", "m", "--option", "power=0"), ["power", "from 0.1 to"]),
        (("eval", "m", "--against", "m", "--text", "t", "--max-kl", "-0.1"), ["--max-kl", "not negative"]),
        (
            ("eval", "m", "--against", "m", "--text", "t", "--max-ppl-increase", "-1"),
            ["--max-ppl-increase", "above -1"],
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_usage_is_one_sentence_with_a_way_out(arguments: tuple[str, ...], words: list[str], cli: Cli) -> None:
    refused(cli(*arguments), *words)


def test_an_advice_names_an_option_only_where_the_command_has_it(cli: Cli) -> None:
    help_text = {c: cli(c, "--help").out for c in ("plan", "quantize", "eval", "run", "inspect", "dequantize", "bench")}
    for command in help_text:
        for word in ("bits", "dataset", "nsamples", "max-length", "exclude", "force", "desc-act", "gpu", "torch-dtype"):
            said = cli(command, f"--{word}", "4").err.partition(f"--{word}. ")[2]
            for option in re.findall(r"--[a-z-]+", said.replace(f"arrondi {command} --help", "")):
                assert option in help_text[command], (command, word, said)


RECIPE = '{"rules": [{"scheme": "W8A16", "group_size": 32}]}'


@pytest.mark.parametrize(
    "option",
    [("--scheme", "W4A16"), ("--method", "rtn"), ("--group-size", "32"), ("--targets", "Linear"), ("--ignore", ""), ("--option", "range=search")],
    ids=lambda o: o[0],
)  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_a_recipe_and_an_option_that_it_would_overrule(
    command: str, option: tuple[str, str], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(RECIPE)
    out = ("-o", tmp_path / "x") if command == "quantize" else ()
    refused(
        cli(command, "m", *out, "--recipe", tmp_path / "recipe.json", *option), "--recipe", option[0], "recipe.json"
    )


def test_an_option_without_effect_is_said(cli: Cli, models: Models, tmp_path: Path) -> None:
    start = ("quantize", models("llama", num_hidden_layers=1), "--group-size", 32, "--json")
    done = cli(*start, "-o", tmp_path / "x", "--samples", 4, "--eval-samples", 2)
    assert done.code == 0 and done.document
    assert "--samples changes nothing here: there is no calibration text." in done.err
    assert "--eval-samples changes nothing here: there is no measurement." in done.err
    assert cli(*start, "-o", tmp_path / "y").err == ""


def test_a_dry_run_refuses_what_the_run_refuses(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model, dry = models("llama", num_hidden_layers=1), ("-o", tmp_path / "x", "--group-size", 32, "--dry-run")
    refused(cli("quantize", model, *dry, "--calibration", tmp_path / "nowhere"), "nowhere", "no such file")
    refused(cli("quantize", model, *dry, "--method", "gptq"), "gptq", "--calibration")
    refused(cli("quantize", model, "-o", tmp_path / "x", "--scheme", "FP8", "--dry-run"), "Static", "FP8_DYNAMIC")
    refused(cli("quantize", model, "-o", model / "x", "--dry-run"), "inside the model's directory")
    alone = cli("quantize", model, *dry, "--json").document
    measured = cli("quantize", model, *dry, "--eval-text", text, "--seq-len", 32, "--json").document
    assert measured["peak_moment"] != alone["peak_moment"], "the measurement takes memory, too"


def test_measuring_on_what_was_calibrated_on_is_said(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model = models("llama", num_hidden_layers=1)
    few = ("--group-size", 32, "--calibration", text, "--eval-text", text, "--seq-len", 16, "--samples", 10**6)
    said = "2 of 2 evaluation windows were calibrated on"
    notes = {m: cli("quantize", model, "-o", tmp_path / m, "--method", m, *few, "--eval-samples", 2, "--json").document["notes"] for m in ("gptq", "rtn")}  # fmt: skip
    assert [said in n for n in notes["gptq"]].count(True) == 1
    assert not any("calibrated on" in n for n in notes["rtn"]), "rtn learns nothing from the text"


@pytest.mark.parametrize(
    ("selector", "word"),
    [("q_proj", "did you mean 're:.*q_proj'"), ("Linear,Conv1d", "--targets Linear --targets Conv1d"), ("model.layers.0.mlp.up_prj", "up_proj")],
)  # fmt: skip
def test_a_selector_that_matches_nothing_is_answered_with_one_that_does(
    selector: str, word: str, cli: Cli, models: Models, tmp_path: Path
) -> None:
    model = models("llama", num_hidden_layers=1)
    refused(cli("quantize", model, "-o", tmp_path / "x", "--targets", selector), selector, word)


def test_windows_that_the_model_cannot_take_are_cut_and_said(
    cli: Cli, models: Models, text: Path, tmp_path: Path
) -> None:
    model = models("llama", num_hidden_layers=1)
    said = "Windows have 128 tokens, not 4096: the model has no more positions."
    start = ("quantize", model, "-o", tmp_path / "x", "--group-size", 32, "--calibration", text, "--samples", 2, "--seq-len", 4096)  # fmt: skip
    shown = cli(*start)
    assert shown.code == 0 and said in shown.out
    assert said in json.loads((tmp_path / "x" / "report.json").read_text())["notes"]
    measured = ("eval", tmp_path / "x", "--against", model, "--text", text, "--samples", 1, "--seq-len", 4096)
    assert said in cli(*measured).out
    assert cli(*measured, "--json").document["notes"] == [said]
    planned = cli("plan", model, "--group-size", 32, "--method", "gptq", "--seq-len", 4096, "--json").document
    assert said in planned["notes"]


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_tables_fit_the_terminal_and_break_no_name_and_no_number(
    columns: int, cli: Cli, models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)  # paths are words that nothing may break
    model, few = models("llama"), ("--calibration", text, "--samples", 4, "--seq-len", 32, "--eval-samples", 4)
    os.symlink(model, "m")
    report = cli("quantize", "m", "-o", "q", "--group-size", 32, "--method", "gptq", *few)
    kept = json.loads(Path("q/report.json").read_text())
    plan = cli("plan", "m", "--group-size", 32, "--ignore", "re:.*q_proj")
    planned = cli("plan", "m", "--group-size", 32, "--ignore", "re:.*q_proj", "--json").document
    measured = cli("eval", "q", "--against", "m", "--text", text, "--seq-len", 32, "--samples", 4)
    inspected = cli("inspect", "q")
    shown = {"report": report, "plan": plan, "eval": measured, "inspect": inspected}
    for name, result in shown.items():
        assert result.code == 0, result.err
        for line in result.out.splitlines():
            assert len(line) <= columns or " " not in line.strip(), (name, line)
    for row in kept["layers"]:
        for result in (report, plan, inspected):
            assert re.search(rf"^\s*{re.escape(row['name'])}\s", result.out, re.MULTILINE), row["name"]
        assert f"{row['output_error']:.2e}" in report.out and f"{row['sqnr_db']:.1f}" in report.out
    for row in planned["tensors"]:
        assert f"{row['bytes']:,}" in plan.out
    for key in ("kl mean", "top1 agreement"):
        assert re.search(rf"{key}\s+[\d.e-]+\s+[\d.e-]+ … [\d.e-]+", measured.out), measured.out


def test_a_pattern_in_a_note_is_printed_as_it_is(cli: Cli, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    shown = cli("plan", models("llama"), "--group-size", 32, "--ignore", r"re:.*[bold]\d_proj")
    assert "--ignore 're:.*[bold]" in shown.out


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--help"), ("inspect",)])
def test_a_reader_of_the_output_that_goes_away_is_no_error(arguments: tuple[str, ...], models: Models) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-m", "arrondi", *arguments]
    if arguments == ("inspect",):
        command.append(str(models("llama")))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 0 and said == ""


def test_output_without_the_letters_or_closed(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "modèle"
    os.symlink(models("llama", num_hidden_layers=1), model)

    def printed(*more: str, closed: bool = False) -> bytes:
        written = io.BytesIO()
        stream = None if closed else io.TextIOWrapper(written, encoding="ascii", write_through=True)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "argv", ["arrondi", "inspect", str(model), *more])
            try:
                main()
            finally:
                if closed:
                    sys.stdout.close()
        assert end.value.code == 0
        return written.getvalue()

    assert b"mod?le" in printed()
    document = json.loads(printed("--json").decode("ascii"))
    assert document["path"] == str(model), "nothing is replaced in a document"
    assert printed(closed=True) == b""


# ── layout and readers ────────────────────────────────────────────────────────────────────────────────────────────────


def test_layout_and_readers_are_said_at_the_end_and_before_where_only_arrondi_reads(
    cli: Cli, models: Models, tmp_path: Path
) -> None:
    model = models("llama", num_hidden_layers=1)
    wide = cli("quantize", model, "-o", tmp_path / "a", "--group-size", 32)
    assert re.search(r"Layout compressed-tensors, read by .*transformers", wide.out) and wide.err == ""
    alone = cli("quantize", model, "-o", tmp_path / "b", "--scheme", "w=nf4/g32")
    assert "Layout arrondi, read by arrondi." in alone.out
    assert "only arrondi will read the output" in alone.err
    assert "read by" in cli("plan", model, "--scheme", "w=nf4/g32").out


def test_readers_in_words() -> None:
    rows = [
        {"reader": "arrondi", "ok": True, "sentence": "arrondi reads it."},
        {"reader": "transformers", "ok": True, "sentence": "transformers loads it. It needs a GPU."},
        {"reader": "vLLM", "ok": False, "sentence": "vLLM refuses 3-bit weights."},
    ]
    document = {"layout": "compressed-tensors", "readers": rows}
    assert readers_lines(document) == [
        "Layout compressed-tensors, read by arrondi, transformers.",
        "transformers loads it. It needs a GPU.",
        "vLLM refuses 3-bit weights.",
    ]
    assert sole_reader(document) is None
    assert "only arrondi" in str(sole_reader({"layout": "x", "readers": [rows[0], rows[2]]}))


# ── numbers that are none ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_infinite_divergence_is_null_in_json_and_misses_every_limit(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, logits = torch.randint(9, (3, 6)), torch.randn(3, 6, 9)
    other = logits.clone()
    other[1, 2, (int(ids[1, 3]) + 1) % 9] = float("-inf")
    comparison = Comparison(resamples=100)
    comparison.add(logits, other, ids)
    result = {**comparison.summary().to_dict(), "text": "t", "protocol": "p", "notes": []}
    monkeypatch.setattr("arrondi.measure.compare.compare_models", lambda *arguments, **options: result)

    def strict(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    start = ("eval", "m", "--against", "m", "--text", "t")
    done = cli(*start, "--max-kl", 1e300, "--json")
    document = json.loads(done.out, parse_constant=strict)
    assert document["kl_mean"] is None and document["not_finite"]["kl_mean"] == "infinity"
    assert done.code == 3 and "--max-kl 1e+300 was missed: kl_mean is ∞" in done.err
    assert re.search(r"kl mean\s+∞\s", cli(*start).out)


def test_limits_are_refused_before_the_work(
    cli: Cli, models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("arrondi.pipeline.task.Journal", started)
    model = models("bert")
    for limit in ("--max-kl", "--max-ppl-increase"):
        done = cli("quantize", model, "-o", tmp_path / "x", "--group-size", 32, "--eval-text", text, limit, 1)
        refused(done, limit, "no language model", "cosine")
        refused(cli("eval", model, "--against", model, "--text", text, limit, 1), limit, "no language model")
    assert not (tmp_path / "x").exists()


# ── Ctrl-C ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("swallowed", [False, True], ids=["seen", "swallowed by a library"])
@pytest.mark.parametrize("command", ["quantize", "dequantize", "inspect"])
def test_ctrl_c_is_one_line_and_status_130(
    command: str, swallowed: bool, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*arguments: Any, **options: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            if not swallowed:
                raise
        raise ModuleNotFoundError("could not import")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(arrondi.pipeline, f"{command}_model", pressed)
    result = cli(command, "m", *(() if command == "inspect" else ("-o", "x")))
    assert result.code == 130
    resumes = f" Run the same command again: {command} continues where it stopped."
    assert result.err == f"arrondi: stopped.{'' if command == 'inspect' else resumes}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_that_is_stopped_ends_with_130_whatever_it_was_doing(tmp_path: Path) -> None:
    """CPython ends itself by the signal, not with a status, when an interrupt has once left an `exec` of a string."""
    program = tmp_path / "stop.py"
    program.write_text(
        "import os, signal, sys, arrondi.pipeline\n"
        "def pressed(*a, **k):\n"
        "    exec('os.kill(os.getpid(), signal.SIGINT)\\nfor i in range(10**9): pass')\n"
        "arrondi.pipeline.inspect_model = pressed\n"
        "sys.argv = ['arrondi', 'inspect', 'm']\n"
        "from arrondi.cli import main\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 130 and done.stderr == "arrondi: stopped.\n"


def test_ctrl_c_in_a_real_run_and_the_same_command_finishes_it(models: Models, text: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-m", "arrondi", "quantize", models("llama"), "-o", tmp_path / "x", "--group-size", 32, "--method", "gptq",
               "--calibration", text, "--samples", 64, "--seq-len", 32, "--json"]  # fmt: skip
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    while process.poll() is None and not (tmp_path / "x").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    if process.returncode != 0:  # 0: it was done before the signal came
        assert process.returncode == 130 and out == ""
        assert err == "arrondi: stopped. Run the same command again: quantize continues where it stopped.\n"
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 0 and json.loads(again.stdout)["counts"]["quantized"] == 21


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CALLS = re.compile(r"\b[A-Za-z_][A-Za-z_.]*[a-z_]\(|\b[a-z_]+=(?:True|False|None|'|\")|(?:^|\s)\.[a-z]+\(")
"""A call, or a keyword argument: advice that serves in Python alone."""

LIBRARY_ONLY = {
    "calibration",
    "distributed",
    "kernels",
    "nn",
    "optim",
    "training",
    "tensor/packing.py",
    "api.py",
    "model/backward.py",
}
"""Errors that no command line reaches: tensors, observers, loops and ranks that a program made itself."""

ALLOWED = {"save_pretrained(", "model.save_pretrained("}
"""There is no command for it: weights that were pickled must be saved again where they were made."""


def sentences() -> list[tuple[str, str]]:
    """(file:line, text) of every string of a `raise` that the command line can show."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if place in LIBRARY_ONLY or place.split("/")[0] in LIBRARY_ONLY:
            continue
        raised = [n.exc for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise) and n.exc]
        for error in raised:
            for part in ast.walk(error):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.append((f"{place}:{part.lineno}", part.value))
    return found


def test_no_sentence_gives_advice_in_python() -> None:
    bad = [(place, text) for place, text in sentences() if set(CALLS.findall(text)) - ALLOWED]
    assert not bad
