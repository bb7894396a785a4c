"""A model in memory and the same in a directory: one method, one result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import arrondi
from tests.pipeline.toys import data

IDS, HELD = data(16, 32, 1), data(4, 48, 2)


@torch.no_grad()
def divergence(original: torch.nn.Module, other: torch.nn.Module) -> float:
    p, q = original(HELD).logits.log_softmax(-1), other(HELD).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "method", "repairs"),
    [
        ("llama", "gptq", ()),
        ("llama", "gptaq", ("tune", "e2e")),
        ("llama", "yaqa", ()),
        ("gpt2", "gptq", ("bias-correction",)),
        ("qwen3-moe", "gptq", ()),
        ("gemma3", "awq", ()),
    ],
)
def test_both_have_the_same_divergence(models: Callable[..., Path], tmp_path: Path, name: str, method: str, repairs: tuple[str, ...]) -> None:  # fmt: skip
    path = models(name)
    original = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    module = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert module.config.use_cache
    order = torch.arange(16)
    batches = [IDS[order[0::2]], IDS[order[1::2]]]
    arrondi.quantize(module, "w=int3/g16", method=method, calibration=batches, repairs=repairs)
    assert module.config.use_cache, "the model is as it was"
    assert not any(p.grad is not None for p in module.parameters())
    arrondi.quantize(
        path, "w=int3/g16", method=method, calibration=IDS, samples=16, repairs=repairs, out=tmp_path / "out", evaluate=False
    )  # fmt: skip
    loaded = arrondi.load(tmp_path / "out")
    assert divergence(original, module) == pytest.approx(divergence(original, loaded), rel=0.02)
