"""On a GPU every command gives what it gives on the CPU. Skipped where PyTorch has no CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA device here")

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn": ("llama", "w=int4/g16", {"method": "rtn"}),
    "gptq": ("llama", "w=int4/g16", {"method": "gptq"}),
    "gptq, asymmetric, act-order": ("qwen3", "w=uint3/g16", {"method": "gptq", "options": {"order": "dynamic"}}),
    "gptaq": ("gemma3", "w=int3/g16", {"method": "gptaq", "options": {"sweeps": 2, "refine": 1}}),
    "qronos": ("llama", "w=int3/g16", {"method": "qronos"}),
    "awq": ("llama", "w=int3/g16", {"method": "awq"}),
    "hqq": ("llama", "w=uint3/g16", {"method": "hqq"}),
    "gobo": ("gpt2", "W4A16", {"method": "gobo"}),
    "kmeans": ("llama", "W3A16", {"method": "kmeans"}),
    "any4": ("llama", "W4A16", {"method": "any4"}),
    "llm-int8": ("opt", "W8A8", {"method": "llm-int8"}),
    "autoround": ("llama", "w=int3/g16", {"method": "autoround", "options": {"signround.iterations": 20}}),
    "adaround": ("llama", "w=int3/g16", {"method": "adaround", "options": {"iterations": 50}}),
    "smoothquant": ("llama", "W8A8", {"rewrites": ("smoothquant",), "method": "rtn"}),
    "rotations": ("llama", "w=int4/g16, a=int8", {"rewrites": ("rotate",), "method": "gptq"}),
    "online rotations": ("llama", "w=int4/g16, a=int8", {"rewrites": ("rotate",), "method": "gptq", "options": {"rotate.online": True}}),
    "equalize": ("gpt2", "w=int4/g16", {"rewrites": ("equalize",), "method": "rtn"}),
    "NF4": ("llama", "NF4", {"method": "gptq"}),
    "NVFP4": ("llama", "NVFP4A16", {"method": "gptq"}),
    "bias-correction": ("gpt2", "w=int3/g16", {"method": "rtn", "repairs": ("bias-correction",)}),
    "repairs": ("llama", "w=int2/g16", {"method": "gptq", "repairs": ("tune", "e2e")}),
    "experts": ("qwen3-moe", "w=int4/g16", {"method": "gptq"}),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_the_divergence_is_that_of_the_cpu(models: Callable[..., Path], text: Path, tmp_path: Path, name: str) -> None:
    """Sums have another order there, so single codes may differ; what the model loses is the same."""
    model, scheme, asked = METHODS[name]
    kinds = {
        device: arrondi.quantize(
            models(model), scheme, out=tmp_path / device, calibration=text, evaluation=text, samples=8, seq_len=64, eval_samples=4,
            device=device, **asked,
        )
        for device in ("cpu", "cuda")
    }  # fmt: skip
    cpu, cuda = (float(kinds[device]["evaluation"]["kl_mean"]) for device in ("cpu", "cuda"))
    assert cuda == pytest.approx(cpu, rel=0.05)
    assert cuda == pytest.approx(_measured(tmp_path / "cuda", models(model), text), rel=0.001), "eval on the CPU agrees"


def _measured(out: Path, against: Path, text: Path) -> float:
    report = arrondi.evaluate(out, reference=against, text=text, seq_len=64, samples=4)
    return float(report["kl_mean"])
