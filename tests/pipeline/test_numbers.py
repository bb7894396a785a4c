"""Every number of a report against a plain loop: transformers' own model, weights by formula, inputs rounded by hooks written here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi.measure.compare as comparing
import arrondi.pipeline.texts as texts
from arrondi.checkpoint import Checkpoint
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, dequantize_model, quantize_model
from tests.zoo import of_transformers, outputs

Models = Callable[..., Path]


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven windows of 33 tokens are three batches, the last one smaller."""
    for module in (texts, comparing):
        monkeypatch.setattr(module, "BATCH_TOKENS", 100)


def options_of(text: Path, calibrated: bool = True) -> TextOptions:
    return TextOptions(text if calibrated else None, samples=7, seq_len=33, eval_text=text, eval_samples=7)


def windows_of(source: Path, text: Path, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of calibration and evaluation."""
    read = texts.read_texts(OnDisk.open(source), options_of(text), recipe)
    assert read.calibration is not None and read.evaluation is not None
    assert len(read.calibration_batches) == len(read.evaluation_batches) == 3
    return read.calibration.ids, read.evaluation.ids


@torch.no_grad()
def measured(original: Any, quantized: Any, ids: torch.Tensor) -> dict[str, float]:
    """Perplexities, mean KL divergence and agreement, window by window."""
    loss = torch.zeros(2, dtype=torch.float64)
    kl = agree = tokens = 0.0
    for window in ids.split(1):
        p, q = (outputs(m, window)[0, :-1].double().log_softmax(-1) for m in (original, quantized))
        target = window[0, 1:, None]
        loss += torch.stack([-p.gather(1, target).sum(), -q.gather(1, target).sum()])
        kl += float((p.exp() * (p - q)).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(target)
    reference, found = (loss / tokens).exp().tolist()
    return {
        "reference_perplexity": reference,
        "perplexity": found,
        "kl_mean": kl / tokens,
        "top1_agreement": agree / tokens,
    }


def agree(found: dict[str, Any], expected: dict[str, float], rel: float = 1e-4) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=rel, abs=1e-9), (key, found[key], value)


# ── the whole model ───────────────────────────────────────────────────────────────────────────────────────────────────

CASES = [
    (
        "gemma4",
        "w=int8/g32",
    ),  # inputs of blocks that depend on tokens, keys and values that blocks share, stored scalars
    ("deepseek-v3", "w=int4/g16"),  # a stored buffer that chooses experts
    ("gemma3-vlm", "w=int8/g16"),  # caches in a config inside the config, windows longer than what attention sees
    ("gemma3n", "w=int8/g16"),  # hidden states of four axes
    ("rwkv", "w=int8/g16"),  # run as a whole
    ("bert-masked", "w=int4/g16"),
    *(
        pytest.param(name, "w=int4/g16", marks=pytest.mark.full)
        for name in ("qwen2.5-vl", "jamba", "llama4", "mixtral")
    ),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_quantize_and_eval_measure_what_a_plain_loop_measures(
    name: str, scheme: str, models: Models, text: Path, tmp_path: Path
) -> None:
    source, out, plain = models(name), tmp_path / "out", tmp_path / "plain"
    recipe = Recipe.simple(scheme, "gptq")
    report = quantize_model(source, out, recipe, options_of(text))
    again = compare_models(out, source, text, seq_len=33, samples=7)
    ids = windows_of(source, text, recipe)[1]
    dequantize_model(out, plain, "float32")
    original, quantized = of_transformers(name, source), of_transformers(name, plain)
    if name == "bert-masked":
        a, b = outputs(original, ids), outputs(quantized, ids)
        error = float((a - b).square().sum() / a.square().sum())
        assert report["evaluation"]["relative_error"] == again["relative_error"] == pytest.approx(error, rel=1e-3)
        return
    expected = measured(original, quantized, ids)
    agree(report["evaluation"], expected)
    agree(again, expected)


def round_int(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric integers, one scale for each row: the larger end on half the range of codes."""
    half = (2**bits - 1) / 2
    scale = x.abs().amax(-1, keepdim=True) / half
    return (x / scale.clamp(min=1e-30)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def rounding_inputs(model: Any, modules: Sequence[str], bits: int) -> Any:
    """A model whose linears see rounded inputs."""
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: (round_int(args[0], bits), *args[1:]))
    return model


def bare(source: Path, folder: Path, prefix: str) -> Path:
    """The same model with names that lack the prefix."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n.removeprefix(prefix): t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "prefix", "method"), [("llama", "model.", "gptq"), ("llama", "", "rtn"), ("gpt2", "transformer.", "gptq")]
)
def test_rounded_inputs_are_those_of_the_modules_whatever_tensors_are_called(
    name: str, prefix: str, method: str, models: Models, text: Path, tmp_path: Path
) -> None:
    source = bare(models(name), tmp_path / "bare", prefix) if prefix else models(name)
    out, plain, recipe = tmp_path / "out", tmp_path / "plain", Recipe.simple("w=int8/channel,a=int3/token", method)
    report = quantize_model(source, out, recipe, options_of(text))
    again = compare_models(out, source, text, seq_len=33, samples=7)
    dequantize_model(out, plain, "float32")
    quantized = of_transformers(name, plain)
    modules = [n for n, m in quantized.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    assert len(modules) == len(report["layers"])
    calibration, ids = windows_of(source, text, recipe)
    expected = measured(of_transformers(name, models(name)), rounding_inputs(quantized, modules, 3), ids)
    assert expected["kl_mean"] > 0.003, "three bits cost something"
    assert report["evaluation"]["kl_mean"] == again["kl_mean"]
    # A number on the edge between two codes may fall to either side.
    agree(
        {k: v for k, v in again.items() if k != "top1_agreement"},
        {k: v for k, v in expected.items() if "top1" not in k},
        rel=0.01,
    )
    if method == "gptq":  # and calibration saw the rounded inputs
        rows = {r["name"]: r for r in report["layers"]}
        inputs = seen_by(quantized, modules, calibration)
        stored = {s.modules[0]: s.tensor for s in OnDisk.open(out).sites}
        for module in modules:
            weight = of_module(of_transformers(name, models(name)), module)
            error = output_error(inputs[module], weight, of_module(quantized, module))
            assert rows[stored[module]]["output_error"] == pytest.approx(error, rel=0.02), module


# ── layer by layer ────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def seen_by(model: Any, modules: Sequence[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What linears multiply, (rows, in), after whatever other hooks do to it."""
    found: dict[str, list[torch.Tensor]] = {n: [] for n in modules}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda module, args, output, n=n: found[n].append(args[0].flatten(0, -2))
        )
        for n in modules
    ]
    for window in ids.split(1):
        model(input_ids=window)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(xs) for n, xs in found.items()}


def of_module(model: Any, name: str) -> torch.Tensor:
    """A linear's weight, (out, in)."""
    module = model.get_submodule(name)
    weight: torch.Tensor = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def squares(x: torch.Tensor, weight: torch.Tensor) -> float:
    return float((x.double() @ weight.double().T).square().sum())


def output_error(x: torch.Tensor, weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²."""
    return squares(x, weight - rounded) / squares(x, weight)


def decibels(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return -10 * math.log10(float((weight - rounded).double().square().sum() / weight.double().square().sum()))


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "w=int3/g16"), ("gpt2", "w=int4/channel"), ("phi3-fused-qkv", "W4A16_ASYM")]
)
def test_each_linear_has_its_own_error(name: str, scheme: str, models: Models, text: Path, tmp_path: Path) -> None:
    """What is rounded later sees what earlier weights give: the inputs are those of the quantized model."""
    source, out, plain = models(name), tmp_path / "out", tmp_path / "plain"
    recipe = Recipe.simple(scheme, "gptq", group_size=32 if scheme == "W4A16_ASYM" else None)
    report = quantize_model(source, out, recipe, options_of(text))
    dequantize_model(out, plain, "float32")
    original, quantized = of_transformers(name, source), of_transformers(name, plain)
    rows = {r["name"].removesuffix(".weight"): r for r in report["layers"]}
    inputs = seen_by(quantized, list(rows), windows_of(source, text, recipe)[0])
    found = set()
    for module, row in rows.items():
        weight, rounded = of_module(original, module), of_module(quantized, module)
        assert row["output_error"] == pytest.approx(output_error(inputs[module], weight, rounded), rel=2e-3), module
        assert row["sqnr_db"] == pytest.approx(decibels(weight, rounded), abs=2e-3), module
        assert row["calibration_tokens"] == len(inputs[module]) == 7 * 33
        found.add(round(row["output_error"], 9))
    assert len(found) == len(rows), "no two layers carry one number"


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_methods_without_needs_see_the_inputs_before_their_block_is_rounded(
    method: str, models: Models, text: Path, tmp_path: Path
) -> None:
    source, out, plain, recipe = (
        models("llama"),
        tmp_path / "out",
        tmp_path / "plain",
        Recipe.simple("w=int4/g16/asym", method),
    )
    report = quantize_model(source, out, recipe, options_of(text))
    dequantize_model(out, plain, "float32")
    original, quantized, mixed = (of_transformers("llama", p) for p in (source, plain, source))
    ids = windows_of(source, text, recipe)[0]
    rows = {r["name"].removesuffix(".weight"): r for r in report["layers"]}
    for i in range(3):
        modules = [n for n in rows if f"layers.{i}." in n]
        inputs = seen_by(mixed, modules, ids)  # blocks before this one are rounded
        for module in modules:
            error = output_error(inputs[module], of_module(original, module), of_module(quantized, module))
            assert rows[module]["output_error"] == pytest.approx(error, rel=2e-3), module
        mixed.model.layers[i].load_state_dict(quantized.model.layers[i].state_dict())


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_have_the_errors_of_the_tokens_that_reach_them(
    name: str, models: Models, text: Path, tmp_path: Path
) -> None:
    """Stored one by one each has its own; stored as one tensor the sums are over all of it, never means of ratios."""
    source, out, plain, recipe = models(name), tmp_path / "out", tmp_path / "plain", Recipe.simple("w=int3/g16", "gptq")
    report = quantize_model(source, out, recipe, options_of(text))
    dequantize_model(out, plain, "float32")
    original, quantized = of_transformers(name, source), of_transformers(name, plain)
    rows = {r["name"]: r for r in report["layers"]}
    for i, (block, before) in enumerate(zip(quantized.model.layers, original.model.layers, strict=True)):
        experts, plain_experts = block.mlp.experts, before.mlp.experts
        reached: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = experts.register_forward_pre_hook(
            lambda module, args, reached=reached: reached.append((args[0].flatten(0, -2), args[1]))
        )
        with torch.no_grad():
            for window in windows_of(source, text, recipe)[0].split(1):
                quantized(input_ids=window)
        handle.remove()
        x, chosen = torch.cat([r[0] for r in reached]), torch.cat([r[1] for r in reached])
        sums = torch.zeros(2, dtype=torch.float64)
        counts = []
        for e in range(4):
            own = x[(chosen == e).any(-1)]
            counts.append(len(own))
            weight, rounded = plain_experts.gate_up_proj[e].detach(), experts.gate_up_proj[e].detach()
            if name == "gpt-oss":  # (in, out)
                sums += torch.tensor([squares(own, (weight - rounded).T), squares(own, weight.T)], dtype=torch.float64)
                continue
            stem = f"model.layers.{i}.block_sparse_moe.experts.{e}"
            w1, w3 = weight.chunk(2)
            q1, q3 = rounded.chunk(2)
            inner = torch.nn.functional.silu(own @ q1.T) * (own @ q3.T)
            parts = {"w1": (own, w1, q1), "w3": (own, w3, q3), "w2": (inner, plain_experts.down_proj[e].detach(), experts.down_proj[e].detach())}  # fmt: skip
            for leaf, (seen, w, q) in parts.items():
                row = rows[f"{stem}.{leaf}.weight"]
                assert row["calibration_tokens"] == len(own)
                assert row["sqnr_db"] == pytest.approx(decibels(w, q), abs=2e-3)
                assert row["output_error"] == pytest.approx(output_error(seen, w, q), rel=2e-3), (stem, leaf)
        if name == "gpt-oss":
            row = rows[f"model.layers.{i}.mlp.experts.gate_up_proj"]
            assert row["output_error"] == pytest.approx(float(sums[0] / sums[1]), rel=2e-3)
            assert row["calibration_tokens"] == min(counts)
            assert row["sqnr_db"] == pytest.approx(
                decibels(plain_experts.gate_up_proj.detach(), experts.gate_up_proj.detach()), abs=2e-3
            )


def test_a_stored_buffer_chooses_the_experts_that_are_calibrated(models: Models, text: Path, tmp_path: Path) -> None:
    """With the initial values of the buffer other tokens would reach the experts."""
    source, recipe = models("deepseek-v3"), Recipe.simple("w=int8/g16", "gptq")
    report = quantize_model(source, tmp_path / "out", recipe, options_of(text))
    dequantize_model(tmp_path / "out", tmp_path / "plain", "float32")
    model = of_transformers("deepseek-v3", tmp_path / "plain")
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert float(bias.abs().max()) > 0.1

    def counts() -> list[int]:
        chosen: list[torch.Tensor] = []
        handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(
            lambda module, args: chosen.append(args[1])
        )
        outputs(model, windows_of(source, text, recipe)[0])
        handle.remove()
        return torch.cat(chosen).flatten().bincount(minlength=8).tolist()

    found = {r["name"]: r["calibration_tokens"] for r in report["layers"]}
    assert [found[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)] == counts()
    bias.zero_()
    assert counts() != [found[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)]


def test_the_report_says_what_was_done_to_what_no_text_reaches(models: Models, text: Path, tmp_path: Path) -> None:
    """A tower of images is kept unless it is named; named, it is rounded without calibration, and the report says so."""
    source = models("gemma3-vlm")
    report = quantize_model(source, tmp_path / "kept", Recipe.simple("w=int8/g16", "gptq"), options_of(text))
    assert all(
        "text does not reach it" in k["reason"]
        for k in report["kept"]
        if "vision" in k["name"] and "q_proj.weight" in k["name"]
    )
    assert not any("vision" in r["name"] for r in report["layers"])
    recipe = Recipe.simple("w=int8/g16", "gptq", targets=["Linear", "re:.*vision_tower.*(q|k|v)_proj"])
    report = quantize_model(source, tmp_path / "named", recipe, options_of(text))
    vision = [r for r in report["layers"] if "vision" in r["name"]]
    assert len(vision) == 6
    assert all(
        r["method"] == "rtn" and r["why"] and r["output_error"] is None and not r["calibration_tokens"] for r in vision
    )
    assert json.loads((tmp_path / "named" / "report.json").read_text())["layers"] == report["layers"]
    assert len(Checkpoint.open(tmp_path / "named").placed) == len(report["layers"])
