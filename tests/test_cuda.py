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
    assert cuda == pytest.approx(cpu, rel=0.4)  # in models this small a few codes weigh much
    assert cuda == pytest.approx(_measured(tmp_path / "cuda", models(model), text), rel=0.02), "eval on the CPU agrees"


def test_a_second_run_gives_the_same_bytes(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "ab"]
    for out in outs:
        arrondi.quantize(models("llama"), "w=int4/g16", out=out, method="gptaq", calibration=text, samples=8, seq_len=64, device="cuda")  # fmt: skip
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


LOADED = {
    "llama": "w=int4/g16", "gpt2": "W8A16", "qwen3-moe": "w=uint4/g16/asym", "opt": "NF4", "gemma3": "NVFP4A16", "qwen3": "W8A8",
}  # fmt: skip


@pytest.mark.parametrize("model", LOADED)
def test_a_loaded_model_computes_there_what_it_computes_here(
    models: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    out = tmp_path / "out"
    arrondi.quantize(models(model), LOADED[model], out=out, method="rtn")
    ids = torch.randint(0, 90, (1, 12))
    here, there = arrondi.load(out, fuse=False), arrondi.load(out, device="cuda")
    for tensor in (*there.parameters(), *there.buffers()):
        assert tensor.device.type == "cuda"
    with torch.no_grad():
        wanted = here(ids).logits
        torch.testing.assert_close(
            there(ids.cuda()).logits.cpu(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())
        )


def test_loading_holds_no_float_copy(models: Callable[..., Path], tmp_path: Path) -> None:
    model = models("llama", hidden_size=1024, intermediate_size=2048)
    arrondi.quantize(model, "w=int4/g128", out=tmp_path / "out", method="rtn")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = arrondi.load(tmp_path / "out", device="cuda")
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    largest = max(p.numel() for p in arrondi.load(model).parameters())
    assert peak < kept + 40 * largest, "more than the temporaries of packing one matrix"
    del loaded


def test_generating_there(models: Callable[..., Path], tmp_path: Path) -> None:
    from arrondi.runtime.decoding import tokens

    arrondi.quantize(models("llama"), "w=int4/g16", out=tmp_path / "out", method="rtn")
    here, there = arrondi.load(tmp_path / "out"), arrondi.load(tmp_path / "out", device="cuda")
    for kv in (None, "int8", "kivi2"):
        first, second = (list(tokens(m, [1, 5, 9, 2], 12, temperature=0, stop=set(), kv=kv)) for m in (here, there))
        assert first[:4] == second[:4], kv


def _measured(out: Path, against: Path, text: Path) -> float:
    report = arrondi.evaluate(out, reference=against, text=text, seq_len=64, samples=4)
    return float(report["kl_mean"])
