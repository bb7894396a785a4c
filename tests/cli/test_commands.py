"""The commands that the project promises, with their keys and exit statuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from tests.cli.conftest import Cli

Models = Callable[..., Path]
FEW = ("--samples", 4, "--seq-len", 32, "--eval-samples", 4, "--group-size", 32)


def quantized(
    cli: Cli, model: Path, out: Path, text: Path, *more: object, scheme: str = "W4A16", method: str = "rtn"
) -> Path:
    result = cli(
        "quantize", model, "-o", out, "--scheme", scheme, "--method", method, "--calibration", text, *FEW, *more
    )
    assert result.code == 0, result.err
    return out


@pytest.mark.parametrize(
    "command",
    ["", "plan", "quantize", "compare", "methods", "eval", "inspect", "dequantize", "verify", "run", "demo", "bench"],
)
def test_help_of_every_command(command: str, cli: Cli) -> None:
    result = cli(*command.split(), "--help")
    assert result.code == 0
    assert "Usage" in result.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("arrondi 0.")


def test_plan_prints_everything_and_writes_nothing(cli: Cli, models: Models) -> None:
    model = models("llama")
    before = sorted(p.name for p in model.iterdir())
    plan = cli("plan", model, "--scheme", "W4A16", "--group-size", 32, "--json").document
    assert sorted(p.name for p in model.iterdir()) == before
    assert {"layout", "output_bytes", "peak_memory_bytes", "seconds", "problems", "tensors"} <= plan.keys()
    row = next(t for t in plan["tensors"] if t["name"].endswith("0.self_attn.q_proj.weight"))
    # 64 × 64 weights of 4 bits, 2 float32 scales a row, and the shape: two int64.
    assert row["bytes"] == 64 * 64 // 2 + 64 * 2 * 4 + 16
    assert plan["problems"] == []


def test_plan_says_which_groups_stand_in_for_those_that_do_not_fit(cli: Cli, models: Models) -> None:
    plan = cli("plan", models("llama"), "--scheme", "W4A16", "--json").document
    assert plan["problems"] == []
    for inputs in (64, 96):
        assert any(f"int4/g128 does not divide {inputs} inputs; int4/channel instead" in n for n in plan["notes"])


def test_dry_run_is_the_plan(cli: Cli, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("quantize", models("llama"), "-o", out, "--scheme", "W4A16", "--group-size", 32, "--dry-run", "--json")
    assert result.document["counts"]["quantized"] == 21
    assert not out.exists()


def test_quantize_eval_inspect_dequantize_run(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model, out, plain = models("llama"), tmp_path / "out", tmp_path / "plain"
    result = cli(
        "quantize", model, "-o", out, "--scheme", "W4A16", "--method", "gptq", "--calibration", text, *FEW, "--seed", 0, "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    report = result.document
    assert report["evaluation"]["text"].startswith("last tenth of")
    assert report["layers"][0]["output_error"] > 0
    assert json.loads((out / "report.json").read_text()) == report

    found = cli("eval", out, "--against", model, "--text", text, "--seq-len", 32, "--samples", 4, "--json").document
    assert {"perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement", "tokens"} <= found.keys()
    assert found["tokens"] == 4 * 31
    low, high = found["kl_mean_interval"]
    assert 0 < low <= found["kl_mean"] <= high

    inspected = cli("inspect", out, "--json").document
    assert inspected["bits_per_weight"] == pytest.approx(5.0, abs=0.05)  # 4 bits and a float32 scale for 32
    assert len(inspected["tensors"]) == report["counts"]["quantized"] + report["counts"]["kept by rule"]

    alone = cli("inspect", out / "model.safetensors", "--json").document
    stored = load_file(out / "model.safetensors")
    assert {t["name"]: tuple(t["shape"]) for t in alone["tensors"]} == {n: tuple(t.shape) for n, t in stored.items()}
    assert (alone["container"], alone["layout"]) == ("safetensors", inspected["layout"])
    assert alone["bytes"] == inspected["bytes"] and "weight_packed" in cli("inspect", out / "model.safetensors").out

    assert cli("dequantize", out, "-o", plain, "--dtype", "float32", "--json").code == 0
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(plain)

    words = cli("run", out, "Once upon a time", "--max-new-tokens", 5)
    assert words.code == 0
    assert words.out.startswith("Once upon a time")
    assert cli("run", out, "Once", "--max-new-tokens", 3, "--json").document["tokens"] == 3
    assert cli("run", out, "Once", "--activations", "int8/g32", "--max-new-tokens", 3, "--json").document["tokens"] == 3

    rounded = ("--activations", "int4/token", "--json")
    worse = cli("eval", out, "--against", model, "--text", text, "--seq-len", 32, "--samples", 4, *rounded).document
    assert worse["kl_mean"] > found["kl_mean"]


def test_a_graph_of_a_language_model_is_measured_on_text(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    """What lies beside the graph says which model it is; its numbers are those of the same weights in any other layout."""
    model, few = models("llama"), ("--text", text, "--seq-len", 32, "--samples", 4, "--json")
    out, graph = quantized(cli, model, tmp_path / "q", text), tmp_path / "graph"
    assert cli("convert", out, "-o", graph, "--to", "onnx", "--exact-only").code == 0
    found = [cli("eval", m, "--against", model, *few) for m in (out, graph, graph / "model.onnx")]
    assert [f.code for f in found] == [0, 0, 0], found[2].err
    assert found[0].document == found[1].document == found[2].document and found[0].document["kl_mean"] > 0
    (tmp_path / "alone").mkdir()
    shutil.copy(graph / "model.onnx", tmp_path / "alone")
    refused = cli("eval", tmp_path / "alone/model.onnx", "--against", model, *few)
    assert refused.code == 2 and "no config.json with a model_type" in refused.err and "--data" in refused.err


def test_tables_for_people(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model = models("llama")
    out = quantized(cli, model, tmp_path / "out", text)
    for arguments in (("plan", model, "--group-size", 32), ("inspect", out), ("eval", out, "--against", model, "--text", text, "--seq-len", 32, "--samples", 2)):  # fmt: skip
        result = cli(*arguments)
        assert result.code == 0
        assert result.out.strip()
    assert "model.layers.2.mlp.down_proj.weight" in cli("inspect", out).out


def test_eval_of_an_encoder_compares_outputs(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model = models("bert")
    out = quantized(cli, model, tmp_path / "out", text)
    found = cli("eval", out, "--against", model, "--text", text, "--seq-len", 32, "--samples", 4, "--json").document
    assert any("cosine" in key for key in found)
    assert "perplexity" not in found


@pytest.mark.parametrize("limit", ["--max-kl", "--max-ppl-increase"])
def test_a_missed_limit_is_status_3(limit: str, cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    model, out = models("llama"), tmp_path / "out"
    arguments = ("quantize", model, "-o", out, "--scheme", "W2A16", "--calibration", text, *FEW, "--json")
    missed = cli(*arguments, limit, "-0.9" if "ppl" in limit else "1e-9")
    assert missed.code == 3
    assert limit in missed.err
    assert (out / "config.json").exists()
    assert cli(*arguments, limit, 1e9).code == 0
    measured = ("eval", out, "--against", model, "--text", text, "--seq-len", 32, "--samples", 2, "--json")
    assert cli(*measured, limit, "-0.9" if "ppl" in limit else "1e-9").code == 3
    assert cli(*measured, limit, 1e9).code == 0


def test_the_same_command_again_answers_the_same(cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    arguments = ("quantize", models("llama"), "-o", tmp_path / "out", "--calibration", text, *FEW, "--json")
    first, second = cli(*arguments), cli(*arguments)
    assert first.code == second.code == 0
    assert first.document == second.document


def test_a_recipe_file(cli: Cli, models: Models, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    rules = [
        {"scheme": "W4A16", "group_size": 32},
        {"scheme": "W8A16", "targets": ["re:.*down_proj"], "group_size": 32},
    ]
    recipe.write_text(json.dumps({"rules": rules}))
    assert cli("quantize", models("llama"), "-o", tmp_path / "out", "--recipe", recipe).code == 0
    formats = {t["name"]: t["format"] for t in cli("inspect", tmp_path / "out", "--json").document["tensors"]}
    assert "int8" in formats["model.layers.0.mlp.down_proj.weight"]
    assert "int4" in formats["model.layers.0.mlp.up_proj.weight"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
