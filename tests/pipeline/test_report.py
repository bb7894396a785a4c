"""What a run says beforehand, while it runs, and leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import arrondi
import arrondi.measure.compare as comparing
import arrondi.pipeline.run as running
import arrondi.pipeline.texts as texts
from arrondi.checkpoint import Checkpoint
from arrondi.model import OnDisk
from arrondi.pipeline import TextOptions, inspect_model, make_plan, quantize_model
from tests.conftest import ARCHITECTURES
from tests.pipeline.killer import digest

W4 = arrondi.Recipe.simple("W4A16", group_size=32)
GPTQ = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)


def options(text: Path, **changes: Any) -> TextOptions:
    return TextOptions(text, **{"samples": 3, "seq_len": 24, "eval_samples": 2, **changes})


# ── the plan ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", ["compressed-tensors", "arrondi"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "mixtral", "qwen2-moe"])
def test_the_plan_is_what_happens(name: str, layout: str, models: Callable[..., Path], tmp_path: Path) -> None:
    plan = make_plan(OnDisk.open(models(name)), W4, layout=layout)
    planned = plan.to_dict()
    report = quantize_model(models(name), tmp_path / "out", W4, layout=layout)
    stored = Checkpoint.open(models(name)).names
    assert [t["name"] for t in planned["tensors"]] == list(stored)
    assert sum(planned["counts"].values()) == len(stored)
    assert {t["name"] for t in planned["tensors"] if t["status"] == "quantized"} == {
        r["name"] for r in report["layers"]
    }
    assert {t["name"]: t["reason"] for t in planned["tensors"] if t["status"] != "quantized"} == {
        k["name"]: k["reason"] for k in report["kept"]
    }
    assert all(t["reason"] for t in planned["tensors"])
    # Bytes are those of the file, its header aside.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert planned["output_bytes"] == report["output_bytes"] == sum(t.nbytes for t in tensors.values())
    assert planned["parameters"] == sum(math.prod(s) for s in stored.values())
    inspected = inspect_model(tmp_path / "out")
    for key in ("bits_per_weight", "model_bits_per_weight", "layout"):
        assert inspected[key] == planned[key] == report[key]
    assert {t["name"]: t["bytes"] for t in inspected["tensors"]} == {t["name"]: t["bytes"] for t in planned["tensors"]}


def test_reasons_are_told_apart(models: Callable[..., Path]) -> None:
    def reasons(name: str, recipe: arrondi.Recipe = W4) -> dict[str, tuple[str, str]]:
        tensors = make_plan(OnDisk.open(models(name)), recipe).tensors
        return {t.name: (t.status, t.reason) for t in tensors}

    llama = reasons("llama")
    assert llama["model.norm.weight"] == ("kept by rule", "one-dimensional (norm or bias)")
    assert llama["model.embed_tokens.weight"] == ("kept by rule", "not a target (Embedding)")
    assert llama["lm_head.weight"] == ("kept by rule", "ignored by 'lm_head'")
    assert llama["model.layers.0.mlp.up_proj.weight"] == ("quantized", "rule 1")
    asked = arrondi.Recipe.simple("W4A16", group_size=32, targets=["Linear", "re:.*embed_tokens"])
    assert reasons("llama", asked)["model.embed_tokens.weight"] == ("quantized", "rule 1")
    mixtral = reasons("mixtral")
    assert mixtral["model.layers.0.block_sparse_moe.gate.weight"][0] == "kept by rule"


# ── the report ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_on_disk_is_what_is_returned(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    report = quantize_model(source, out, GPTQ, options(text))
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert report["model"] == str(source)
    assert report["architecture"] == "LlamaForCausalLM"
    calibration = report["calibration"]
    assert calibration["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    expected = {"text": "text.txt", "windows": 3, "tokens": 72, "seed": 0, "window_tokens": 24, "documents": 1, "scripts": {"Latin": 1.0}}  # fmt: skip
    assert {key: calibration[key] for key in expected} == expected
    assert 0 < calibration["distinct_tokens"] <= 72 and calibration["experts"] is None
    assert 0 < calibration["moved"]["second_moments"]["median"] <= calibration["moved"]["second_moments"]["worst"] <= 2
    assert report["evaluation"]["text"] == "last tenth of text.txt, not calibrated on"
    assert report["evaluation"]["windows"] == 2
    assert report["evaluation"]["tokens"] == 2 * 23
    assert "windows of 23 tokens, BOS before each" in report["evaluation"]["protocol"]
    for key in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        low, high = report["evaluation"][f"{key}_interval"]
        assert low <= report["evaluation"][key] <= high
    assert report["seconds"] > 0
    for row in report["layers"]:
        assert row.keys() == {
            "name",
            "scheme",
            "method",
            "bits_per_weight",
            "sqnr_db",
            "output_error",
            "calibration_tokens",
            "moved",
        }
        assert row["calibration_tokens"] == 72
        assert 0 < row["output_error"] < 0.05
        assert 10 < row["sqnr_db"] < 30
        assert 5 <= row["bits_per_weight"] < 5.1


@pytest.mark.parametrize("layout", ["compressed-tensors", "arrondi"])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "w=int3/g40", "W8A8", "FP8_DYNAMIC", "w=int4/b32x32"])
def test_plan_report_and_inspect_say_the_size_that_is_in_the_file(
    scheme: str, layout: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Widths of 64 and 96, which no group of 40 or 128 divides: scales, zero points, padding and shapes are counted."""
    recipe, out = arrondi.Recipe.simple(scheme, options={"range": "absmax"}), tmp_path / "out"
    plan = make_plan(OnDisk.open(models("llama", num_hidden_layers=1)), recipe, layout=layout).to_dict()
    report = quantize_model(models("llama", num_hidden_layers=1), out, recipe, layout=layout)
    stored = load_file(out / "model.safetensors")
    rows = {
        "plan": {t["name"]: t for t in plan["tensors"] if t["status"] == "quantized"},
        "report": {t["name"]: t for t in report["layers"]},
        "inspect": {t["name"]: t for t in inspect_model(out)["tensors"] if t["quantized"]},
    }
    for name, row in rows["plan"].items():
        stem = name.removesuffix("weight")
        nbytes = sum(t.nbytes for n, t in stored.items() if n.startswith(stem))
        bits = round(8 * nbytes / math.prod(row["shape"]), 4)
        assert {where: table[name]["bits_per_weight"] for where, table in rows.items()} == dict.fromkeys(rows, bits)
    assert rows["plan"].keys() == rows["report"].keys() == rows["inspect"].keys()
    assert plan["output_bytes"] == report["output_bytes"] == sum(t.nbytes for t in stored.values())


def test_a_last_group_that_is_shorter_is_said(models: Callable[..., Path]) -> None:
    plan = make_plan(OnDisk.open(models("llama", num_hidden_layers=1)), arrondi.Recipe.simple("w=nf4/g40"))
    assert any("does not divide 64 inputs; the last group of a row has 24" in n for n in plan.notes)
    blocks = make_plan(OnDisk.open(models("llama", num_hidden_layers=1)), arrondi.Recipe.simple("w=nf4/b48x48"))
    assert any("the last blocks are smaller than 48 × 48" in n for n in blocks.notes)


def test_without_text_there_is_nothing_to_measure_and_the_report_says_null(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    report = quantize_model(models("llama"), tmp_path / "out", W4)
    assert report["calibration"] is None and report["evaluation"] is None
    assert all(r["output_error"] is None and r["calibration_tokens"] is None for r in report["layers"])
    report = quantize_model(models("llama"), tmp_path / "gptq", GPTQ, options(text, evaluate=False))
    assert report["evaluation"] is None and report["calibration"]["windows"] == 3


def test_round_to_nearest_reports_its_output_error_when_it_gets_text(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The codes are the same with and without, unless ranges are searched: then they are searched for these inputs."""
    found = {}
    for way in ("absmax", "search"):
        recipe = arrondi.Recipe.simple("W4A16", group_size=32, options={"range": way})
        report = quantize_model(models("llama"), tmp_path / way, recipe, options(text))
        plain = quantize_model(models("llama"), tmp_path / f"{way} blind", recipe)
        assert all(0 < r["output_error"] < 0.1 for r in report["layers"])
        same = digest(tmp_path / way)["model.safetensors"] == digest(tmp_path / f"{way} blind")["model.safetensors"]
        assert same == (way == "absmax")
        if same:
            assert [r["sqnr_db"] for r in report["layers"]] == pytest.approx(
                [r["sqnr_db"] for r in plain["layers"]], abs=0.002
            )
        found[way] = report["layers"]
    assert all(s["output_error"] < a["output_error"] for s, a in zip(found["search"], found["absmax"], strict=True))


def test_the_manifest_names_contents(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    report = quantize_model(source, out, GPTQ, options(text))
    manifest = json.loads((out / "manifest.json").read_text())
    files = {n: hashlib.sha256((source / n).read_bytes()).hexdigest() for n in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")}  # fmt: skip
    assert manifest["model"]["files"] == files
    # Every tensor is small here, so its digest is the SHA-256 of the SHA-256 of its bytes.
    tensors = {
        n: hashlib.sha256(t.numpy().tobytes()).digest() for n, t in load_file(source / "model.safetensors").items()
    }
    assert manifest["model"]["tensors"] == {n: hashlib.sha256(d).hexdigest()[:32] for n, d in tensors.items()}
    for key in ("recipe", "layout", "evaluation_text_sha256", "versions"):
        assert manifest[key] == report[key]
    assert manifest["calibration"].items() <= report["calibration"].items()
    assert manifest["versions"] == {"arrondi": arrondi.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": manifest["versions"]["python"]}  # fmt: skip
    assert manifest["recipe"]["rules"] == [
        {"scheme": "w=int4/g32", "method": "gptq", "targets": ["Linear"], "options": {}}
    ]


# ── progress ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("with_text", [False, True], ids=["blind", "calibrated"])
def test_progress_goes_from_nothing_to_almost_all(
    with_text: bool, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    calls: list[tuple[int, int, str]] = []
    quantize_model(
        models("llama"), tmp_path / "out", GPTQ if with_text else W4, options(text) if with_text else None,
        progress=lambda done, total, what: calls.append((done, total, what)),
    )  # fmt: skip
    done = [d for d, _, _ in calls]
    assert done == sorted(done) and done[0] == 0
    assert {t for _, t, _ in calls} == {5 if with_text else 1}
    assert all(d < t for d, t, _ in calls)
    if with_text:
        assert [w for _, _, w in calls] == ["reading data", "block 1 of 3", "block 2 of 3", "block 3 of 3", "outside the blocks", "measuring"]  # fmt: skip


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_with_an_index_load_everywhere(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out, whole = models("llama"), tmp_path / "out", tmp_path / "whole"
    quantize_model(source, out, W4, shard_bytes=100_000)
    quantize_model(source, whole, W4)
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {n for s in shards for n in load_file(out / s)} == set(index["weight_map"])
    assert all(n in load_file(out / s) for n, s in list(index["weight_map"].items())[::7])
    together = {n: t for s in shards for n, t in load_file(out / s).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    assert all(torch.equal(together[n], t) for n, t in load_file(whole / "model.safetensors").items())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids).logits
        torch.testing.assert_close(arrondi.load(out)(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)


def test_a_sharded_model_is_read(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, sharded = models("llama"), tmp_path / "sharded"
    transformers.LlamaForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((source / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder, out in ((source, "one"), (sharded, "two")):
        quantize_model(folder, tmp_path / out, GPTQ, options(text))
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_tokenizer_and_generation_config_come_along(models: Callable[..., Path], tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    quantize_model(source, out, W4)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (
        tokenizer("def f(x)")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(source)("def f(x)")["input_ids"]
    )
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())


# ── sizes at the edge ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_model_of_one_block(name: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = models(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1})
    report = quantize_model(source, tmp_path / "out", GPTQ, options(text))
    assert report["counts"]["quantized"] == {"llama": 7, "gpt2": 4, "bert": 7}[name]
    assert all(r["calibration_tokens"] for r in report["layers"] if "pooler" not in r["name"])


def test_an_encoder_is_measured_by_its_vectors(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Against the hidden states of transformers' own models on the same windows."""
    source, out = models("bert"), tmp_path / "out"
    found = quantize_model(source, out, GPTQ, options(text))["evaluation"]
    assert "perplexity" not in found
    windows = texts.read_texts(OnDisk.open(source), options(text), GPTQ).evaluation
    assert windows is not None
    with torch.no_grad():
        wanted, ours = (
            transformers.AutoModel.from_pretrained(m, dtype=torch.float32)
            .eval()(windows.ids)
            .last_hidden_state.double()
            for m in (source, out)
        )
    error = float((ours - wanted).square().sum() / wanted.square().sum())
    assert found["relative_error"] == pytest.approx(error, rel=1e-3)
    tokens = torch.nn.functional.cosine_similarity(ours, wanted, dim=-1).mean()
    sentences = torch.nn.functional.cosine_similarity(ours.mean(1), wanted.mean(1), dim=-1).mean()
    assert found["token_cosine"] == pytest.approx(float(tokens), abs=1e-5)
    assert found["sentence_cosine"] == pytest.approx(float(sentences), abs=1e-5)


def test_hidden_states_in_a_file_change_nothing(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (texts, comparing):
        monkeypatch.setattr(module, "BATCH_TOKENS", 24)  # one window at a time
    for name, limit in (("memory", 1 << 30), ("file", 3000), ("all in the file", 0)):
        monkeypatch.setattr(running, "HIDDEN_LIMIT", limit)
        quantize_model(models("llama"), tmp_path / name, GPTQ, options(text))
    assert digest(tmp_path / "memory") == digest(tmp_path / "file") == digest(tmp_path / "all in the file")


def test_many_small_steps_write_the_same_as_one(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_model(models("llama"), tmp_path / "one", W4)
    monkeypatch.setattr(running, "_GROUP_BYTES", 10_000)
    calls: list[int] = []
    quantize_model(models("llama"), tmp_path / "many", W4, progress=lambda done, total, what: calls.append(total))
    assert calls[0] > 10
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_class_of_tensor_is_named_for_every_architecture(name: str, models: Callable[..., Path]) -> None:
    plan = make_plan(OnDisk.open(models(name)), W4)
    assert plan.problems == [] and plan.notes == []
    assert [t.name for t in plan.tensors] == list(Checkpoint.open(models(name)).names)
    for t in plan.tensors:
        assert t.status in ("quantized", "kept by rule", "kept because impossible")
        assert t.reason
        assert (t.scheme is not None and t.rule is not None) or t.status != "quantized"
