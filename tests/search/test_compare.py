"""Comparisons of whole models: the numbers of each candidate are those of `quantize` and `evaluate`, and nothing is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arrondi
from arrondi.documents import number
from arrondi.errors import ArrondiError, OutputError
from arrondi.pipeline.task import Task
from arrondi.search.rows import FILE
from tests.cli.conftest import Cli, cli, refused

__all__ = ["cli"]

Models = Callable[..., Path]
FEW: dict[str, Any] = {"samples": 3, "seq_len": 32, "eval_samples": 4, "group_size": 32}
KEYS = {"scheme", "method", "status", "reason", "kl_mean", "kl_mean_interval", "perplexity", "top1_agreement", "bits_per_weight", "model_bits_per_weight", "output_bytes", "seconds", "ms_per_token", "pareto"}  # fmt: skip


@pytest.fixture
def model(models: Models) -> Path:
    return models("llama", num_hidden_layers=2)


@pytest.fixture
def other(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(text.read_text(encoding="utf-8")[8000:], encoding="utf-8")
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods whose runs begin, in order."""
    found: list[str] = []
    run = Task.run

    def noted(self: Task, *arguments: Any, **options: Any) -> Any:
        found.append(self.recipe.rules[0].method)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Task, "run", noted)
    return found


def test_rows_are_what_quantize_and_evaluate_say(model: Path, text: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    asked = {"schemes": ["W4A16", "W3A16"], "methods": ["rtn", "gptq", "gptaq"], "calibration": text, "text": other}
    found = arrondi.compare(model, **asked, **FEW, out=out)
    assert len(found["rows"]) == 6
    for row in found["rows"]:
        assert row.keys() >= KEYS and row["status"] == "done"
        alone = tmp_path / f"{row['scheme']} {row['method']}"
        few = {k: v for k, v in FEW.items() if k != "group_size"}
        report = arrondi.quantize(
            model, row["scheme"], method=row["method"], calibration=text, evaluation=other, out=alone, group_size=32, **few
        )  # fmt: skip
        # To the last bit: the original went its way once, and not beside the candidate.
        assert {k: row[k] for k in report["evaluation"].keys() - {"text", "windows", "protocol"}} == {
            k: v for k, v in report["evaluation"].items() if k not in ("text", "windows", "protocol")
        }
        assert row["bits_per_weight"] == report["bits_per_weight"]
        assert row["output_bytes"] == report["output_bytes"]
        assert row["run"] == json.loads((alone / "manifest.json").read_text())["run"]
        assert row["ms_per_token"] > 0
    apart = arrondi.evaluate(alone, model, other, seq_len=32, samples=4)
    assert apart["kl_mean"] == pytest.approx(found["rows"][-1]["kl_mean"], rel=1e-4)
    assert found["original"]["perplexity"] == pytest.approx(apart["reference_perplexity"], rel=1e-5)
    sizes = [(r["output_bytes"], r["kl_mean"]) for r in found["rows"]]
    assert sizes == sorted(sizes)
    assert found["rows"][0]["method"] in found["answer"]
    # Only numbers are left on the disk.
    assert [p.name for p in out.iterdir()] == [FILE]


def test_a_comparison_that_is_stopped_goes_on(
    model: Path, text: Path, other: Path, tmp_path: Path, started: list[str]
) -> None:
    asked = {"calibration": text, "text": other, **FEW}
    whole = arrondi.compare(model, methods=["rtn", "gptq", "hqq"], **asked, out=tmp_path / "whole")
    started.clear()

    class Stop(Exception): ...

    def stop(done: int, total: int, what: str) -> None:
        if "gptq: block 2" in what:
            raise Stop

    out = tmp_path / "comparison"
    with pytest.raises(Stop):
        arrondi.compare(model, methods=["rtn", "gptq", "hqq"], **asked, out=out, progress=stop)
    assert started == ["rtn", "gptq"]
    with (out / FILE).open("a") as file:
        file.write('{"step": "torn')  # as a kill leaves it
    left = next(p for p in out.iterdir() if p.is_dir())
    steps = (left / ".arrondi" / "journal.jsonl").read_text().splitlines()
    assert any('"unit 0"' in line for line in steps)

    started.clear()
    again = arrondi.compare(model, methods=["rtn", "gptq", "hqq"], **asked, out=out)
    assert started == ["gptq", "hqq"]
    numbers = [{k: v for k, v in r.items() if k not in ("seconds", "ms_per_token")} for r in again["rows"]]
    assert numbers == [{k: v for k, v in r.items() if k not in ("seconds", "ms_per_token")} for r in whole["rows"]]

    # What is there is taken over: by the same call whole, by a wider one in part.
    started.clear()
    assert arrondi.compare(model, methods=["rtn", "gptq", "hqq"], **asked, out=out) == again
    assert started == []
    wider = arrondi.compare(model, schemes=["W4A16", "W8A16"], methods=["gptq", "rtn"], **asked, out=out)
    assert started == ["gptq", "rtn"] and len(wider["rows"]) == 4
    # Another model, other windows: other rows.
    started.clear()
    arrondi.compare(model, methods=["rtn"], **{**asked, "eval_samples": 3}, out=out)
    assert started == ["rtn"]


def test_models_are_kept_where_that_is_asked_for(model: Path, text: Path, tmp_path: Path, started: list[str]) -> None:
    asked: dict[str, Any] = {"methods": ["rtn"], "calibration": text, **FEW, "out": tmp_path / "comparison"}
    gone = arrondi.compare(model, **asked)["rows"][0]
    assert gone["path"] is None
    kept = arrondi.compare(model, **asked, keep=True)["rows"][0]  # made again, because it is wanted
    assert started == ["rtn", "rtn"]
    assert arrondi.load(kept["path"]) is not None
    assert kept["kl_mean"] == gone["kl_mean"]
    assert arrondi.compare(model, **asked)["rows"][0]["path"] == kept["path"], "what was kept is not taken away"


def test_what_cannot_be_done_is_a_row_with_the_reason(
    cli: Cli, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--samples", 3, "--seq-len", 32, "--eval-samples", 4, "--calibration", text, "-o", tmp_path / "one")
    result = cli("compare", model, "--schemes", "NF4", "--methods", "rtn,hqq", *few, "--json")
    assert result.code == 0, result.err
    first, second = result.document["rows"]
    assert (first["method"], first["status"]) == ("rtn", "done")
    assert (second["method"], second["status"]) == ("hqq", "refused")
    assert "integer grids" in second["reason"] and second["kl_mean"] is None and second["pareto"] is None
    assert second.keys() >= KEYS
    shown = cli("compare", model, "--schemes", "NF4", "--methods", "rtn,hqq", *few)
    assert shown.code == 0 and "integer grids" in shown.out and "is the only one" in shown.out

    refused(cli("compare", model, "--schemes", "NF4", "--methods", "hqq", *few), "integer grids")

    def broken(self: Task, *arguments: Any, **options: Any) -> Any:
        raise arrondi.DataError("a.weight: the numbers went wrong. Use more damping.")

    monkeypatch.setattr(Task, "run", broken)
    refused(cli("compare", model, "--methods", "rtn", *few[:-1], tmp_path / "two"), "more damping")


def test_bad_input_is_refused_before_any_work(
    cli: Cli, model: Path, text: Path, tmp_path: Path, started: list[str]
) -> None:
    out = tmp_path / "out"
    few = ("--samples", 3, "--seq-len", 32, "--eval-samples", 4, "-o", out)
    given = ("--calibration", text, *few)
    refused(cli("compare", model, "--methods", "rtn,gptqq", *given), "Did you mean 'gptq'")
    refused(cli("compare", model, "--schemes", "W4A16,W5A99", "--methods", "rtn", *given), "W5A99")
    refused(cli("compare", model, "--methods", "rtn,rtn", *given), "twice")
    refused(cli("compare", model, "--methods", ",", *given), "--methods names nothing")
    refused(cli("compare", model, "--schemes", ";", *given), "--schemes names nothing")
    refused(cli("compare", model, "--methods", "rtn", *few), "--text")
    refused(cli("compare", model, "--methods", "rtn,gptq", "--text", text, *few), "'gptq' needs calibration text")
    refused(cli("compare", model, "--methods", "rtn", "--option", "damping=1", *given), "damping")
    refused(cli("compare", model, "--methods", "rtn", "--text", tmp_path / "no.txt", *few), "no.txt")
    assert not out.exists() and not started

    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(cli("compare", model, "--methods", "rtn", *given), "holds thesis.txt and no comparison")
    (out / FILE).write_text("somebody else's\n")
    refused(cli("compare", model, "--methods", "rtn", *given), "is not what a comparison writes")
    assert sorted(p.name for p in out.iterdir()) == [FILE, "thesis.txt"] and not started


def test_the_same_text_for_both_is_said(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    few = ("--samples", 200, "--seq-len", 32, "--eval-samples", 4, "-o", tmp_path / "out")
    found = cli("compare", model, "--methods", "gptq", "--calibration", text, "--text", text, *few, "--json").document
    assert any("calibrated on" in note for note in found["rows"][0]["notes"])


def test_two_at_a_time_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    def inside(done: int, total: int, what: str) -> None:
        with pytest.raises(OutputError, match="another comparison"):
            arrondi.compare(model, methods=["rtn"], calibration=text, **FEW, out=tmp_path / "out")
        raise ArrondiError("seen")

    with pytest.raises(ArrondiError, match="seen"):
        arrondi.compare(model, methods=["rtn"], calibration=text, **FEW, out=tmp_path / "out", progress=inside)


def test_an_encoder_is_compared_by_its_vectors(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    few = ("--samples", 3, "--seq-len", 32, "--eval-samples", 4, "--calibration", text, "-o", tmp_path / "out")
    arguments = ("compare", models("bert"), "--schemes", "W8A16,W2A16", "--methods", "rtn", "--group-size", 32, *few)
    rows = cli(*arguments, "--json").document["rows"]
    assert rows[0]["scheme"] == "W2A16" and rows[0]["relative_error"] > rows[1]["relative_error"]
    assert rows[0]["ms_per_token"] is None and number(rows[0], "token_cosine") is not None
    shown = cli(*arguments)
    assert "relative error" in shown.out and "W8A16 by rtn is the only one" in shown.out


def test_methods_lists_every_step(cli: Cli) -> None:
    steps = {step["name"]: step for step in cli("methods", "--json").document["steps"]}
    assert steps.keys() == arrondi.STEPS.keys()
    assert steps["gptq"]["needs"] == ["moment"] and steps["gptq"]["options"]["damping"] == 0.01
    assert steps["gptq"]["kind"] == "round" and "2210.17323" in steps["gptq"]["source"]
    shown = cli("methods").out
    assert all(name in shown for name in steps)
