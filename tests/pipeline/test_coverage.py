"""Every architecture, end to end: quantize, coverage, load in the real library and in ours, dequantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from tests.conftest import ARCHITECTURES

IDS = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(3))


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result.logits if hasattr(result, "logits") else result[0]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_files_load_in_transformers_and_here_with_the_same_outputs(
    name: str, method: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = models(name), tmp_path / "out"
    options = TextOptions(text, samples=8, seq_len=32, eval_samples=4) if method == "gptq" else None
    recipe = arrondi.Recipe.simple("W4A16", method, group_size=32)
    report = quantize_model(source, out, recipe, options)

    # Coverage: every stored tensor is in exactly one class, and every linear but the head is quantized.
    stored = Checkpoint.open(source).names
    layers, kept = [r["name"] for r in report["layers"]], {k["name"]: k for k in report["kept"]}
    assert sorted([*layers, *kept]) == sorted(stored)
    assert all(k["reason"] for k in kept.values())
    products = {
        n
        for n, shape in stored.items()
        if len(shape) >= 2 and not any(w in n for w in ("embed", "wte", "wpe", "lm_head", "gate.weight"))
    }
    assert set(layers) == products

    # The real library and ours agree.
    cls = getattr(transformers, ARCHITECTURES[name][0])
    theirs = outputs(cls.from_pretrained(out, dtype=torch.float32).eval())
    ours = outputs(arrondi.load(out))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))

    # Plain weights are those of QTensor.dequantize, bit for bit, and give the same outputs.
    plain = tmp_path / "plain"
    dequantize_model(out, plain, "float32")
    packed, restored = Checkpoint.open(out), Checkpoint.open(plain)
    assert not restored.quantized
    for tensor in layers:
        assert torch.equal(restored.read(tensor), packed.dense(tensor)), tensor
    torch.testing.assert_close(
        outputs(cls.from_pretrained(plain, dtype=torch.float32).eval()), theirs, rtol=1e-5, atol=1e-5
    )

    # It differs from the original by rounding, not by much.
    original = outputs(cls.from_pretrained(source, dtype=torch.float32).eval())
    relative = float((theirs - original).norm() / original.norm())
    assert 0 < relative < 0.6
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_an_expert_that_saw_no_token_is_reported(
    name: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models(name, num_hidden_layers=1, num_experts_per_tok=1)
    options = TextOptions(text, samples=1, seq_len=2, evaluate=False)
    report = quantize_model(source, tmp_path / "out", arrondi.Recipe.simple("W4A16", "gptq", group_size=32), options)
    tokens = {r["name"]: r["calibration_tokens"] for r in report["layers"]}
    experts = [n for n in tokens if ".experts." in n]
    assert any(tokens[n] == 0 for n in experts), "two tokens with one expert each cannot reach four"
    assert all(tokens[n] == 2 for n in tokens if "q_proj" in n)
