"""Mixtures of experts: stored one by one or as one stack, they are quantized like any other weight."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.measure.compare import compare_models
from arrondi.model import Facts
from arrondi.nn import QStack
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from tests.zoo import of_transformers

FUSED = ["gpt-oss", "llama4"]
"""Models whose checkpoints hold all experts of a layer in one 3-D tensor, (expert, in, out)."""

IDS = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def fused(models: Callable[..., Path]) -> dict[str, Path]:
    return {name: models(name) for name in FUSED}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


CHOSEN = [
    ("gpt-oss", "W4A16", "gptq", True),
    ("llama4", "NVFP4A16", "gptq", True),  # one scale covers all experts of a tensor
    ("llama4", "w=int4/b32x32", "gptq", True),
    ("gpt-oss", "w=int4/channel1", "rtn", False),
    ("llama4", "T158", "rtn", True),
]
SCHEMES = ["W4A16", "w=int4/channel/asym", "NF4", "NVFP4A16", "MXFP4A16", "T158", "w=int4/b32x32", "w=int4/channel1"]
RUNS = [
    *CHOSEN,
    *(
        pytest.param(*run, marks=pytest.mark.full)
        for run in itertools.product(FUSED, SCHEMES, ("rtn", "gptq"), (True, False))
        if run not in CHOSEN and run[2:] != ("gptq", False)
    ),
]


@pytest.mark.parametrize(("name", "scheme", "method", "with_text"), RUNS)
def test_a_stack_on_disk_is_quantized_and_loads_here(
    name: str, scheme: str, method: str, with_text: bool, fused: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    source, out = fused[name], tmp_path / "out"
    options = TextOptions(text if method == "gptq" else None, samples=4, seq_len=32, eval_text=text, eval_samples=2)
    recipe = arrondi.Recipe.simple(scheme, method, group_size=32 if scheme in ("W4A16", "NF4") else None)
    report = quantize_model(source, out, recipe, options if with_text else None)
    assert report["layout"] == "arrondi", "compressed-tensors has no stacks"
    experts = {r["name"]: r for r in report["layers"] if ".experts." in r["name"]}
    assert len(experts) == 4
    assert all(0 < r["sqnr_db"] < 60 for r in experts.values())
    reasons = {k["reason"] for k in report["kept"] if k["name"].endswith("router.weight")}
    assert reasons and not any(".router." in r["name"] for r in report["layers"])

    model = arrondi.load(out)
    assert sum(isinstance(m, QStack) for m in model.modules()) == 4
    dequantize_model(out, tmp_path / "plain", "float32")
    plain = of_transformers(name, tmp_path / "plain")
    expected = logits(plain)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    if with_text:  # `quantize` followed the same weights that it wrote
        again = compare_models(out, source, text, seq_len=32, samples=2)
        assert report["evaluation"]["kl_mean"] == again["kl_mean"] > 0


@pytest.mark.parametrize(("name", "stripped"), [("gpt-oss", False), ("gpt-oss", True), ("llama4", False)])
def test_the_file_says_how_a_stack_lies(
    name: str, stripped: bool, fused: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that could not run the model once loads the same matrices, square ones too, whatever they are called."""
    source = fused[name]
    if stripped:
        source = Path(shutil.copytree(source, tmp_path / "bare"))
        tensors = load_file(source / "model.safetensors")
        bare = {n.removeprefix("model."): t for n, t in tensors.items()}
        save_file(bare, source / "model.safetensors", {"format": "pt"})
    quantize_model(source, tmp_path / "out", arrondi.Recipe.simple("w=int4/g16"))
    expected = logits(arrondi.load(tmp_path / "out"))
    monkeypatch.setattr("arrondi.model.source.probe", lambda source, lists: (lists[0], Facts()))
    assert torch.equal(logits(arrondi.load(tmp_path / "out")), expected)


def test_calibration_lowers_the_error_of_stacked_experts(fused: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for name in FUSED:
        errors = {}
        for method in ("rtn", "gptq"):
            options = TextOptions(text, samples=32, seq_len=32, evaluate=False)
            recipe = arrondi.Recipe.simple("W3A16", method, group_size=32)
            report = quantize_model(fused[name], tmp_path / f"{name} {method}", recipe, options)
            errors[method] = {
                r["name"]: r["output_error"]
                for r in report["layers"]
                if ".layers.0." in r["name"] and "experts" in r["name"]
            }
        assert all(errors["gptq"][n] < 0.9 * errors["rtn"][n] for n in errors["rtn"]), errors


def test_scales_that_cover_a_whole_stack_are_not_calibrated_and_the_report_says_so(
    fused: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    options = TextOptions(text, samples=4, seq_len=32, eval_samples=2)
    report = quantize_model(fused["llama4"], tmp_path / "out", arrondi.Recipe.simple("NVFP4A16", "gptq"), options)
    for row in report["layers"]:
        if ".experts." in row["name"]:
            assert row["output_error"] is None
        else:
            assert row["output_error"] is not None and row["calibration_tokens"] == 128


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_one_shape_in_both_directions_are_not_confused(
    name: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Square experts look alike when transposed; their numbers say which way they lie."""
    width = {"intermediate_size": 64} if name == "mixtral" else {"moe_intermediate_size": 64}
    source = models(name, num_hidden_layers=1, **width)
    options = TextOptions(text, samples=4, seq_len=32, eval_samples=2)
    report = quantize_model(source, tmp_path / "out", arrondi.Recipe.simple("W8A16", "gptq", group_size=32), options)
    assert all(r["sqnr_db"] > 35 for r in report["layers"])
    original, quantized = arrondi.load(source), arrondi.load(tmp_path / "out")
    assert float((logits(original) - logits(quantized)).norm() / logits(original).norm()) < 0.05
    checkpoint = Checkpoint.open(tmp_path / "out")
    for tensor in checkpoint.placed:
        weight = Checkpoint.open(source).dense(tensor)
        assert float((checkpoint.dense(tensor) - weight).norm() / weight.norm()) < 0.02, tensor


def test_a_stack_answers_products_with_all_experts_at_once() -> None:
    weights = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    stack = QStack([[arrondi.quantize_tensor(w, arrondi.parse_scheme("w=int8/channel").weights)] for w in weights])
    dense = torch.stack([stack[e] for e in range(3)])
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    for found in (torch.bmm(x, stack), torch.matmul(x, stack), x @ stack, x.bmm(stack)):
        torch.testing.assert_close(found, torch.bmm(x, dense))
    with pytest.raises(arrondi.SchemeError, match="add does not take packed experts"):
        torch.add(x, stack)
