"""Every kind of scheme from a model to files and back: what is loaded computes with what the files mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.measure.compare import compare_models
from arrondi.nn import QLinear
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from arrondi.tensor.qtensor import QTensor
from tests.conftest import ARCHITECTURES

CASES = [
    ("W8A8", "rtn", "compressed-tensors"), ("NVFP4A16", "gptq", "compressed-tensors"), ("MXFP4A16", "rtn", "compressed-tensors"),
    ("MXFP4", "rtn", "compressed-tensors"), ("MXFP6", "rtn", "arrondi"), ("NF4", "gptq", "arrondi"), ("TERNARY", "rtn", "arrondi"),
    ("T158", "gptq", "arrondi"), ("w=binary/g32", "rtn", "arrondi"), ("w=int4/g32/offset", "hqq", "arrondi"),
    ("w=int3/g32/asym", "hqq", "compressed-tensors"), ("w=uint4/g32/asym", "rtn", "arrondi"),
    ("w=int4/tensor", "gptq", "compressed-tensors"), ("w=int5/channel1", "gptq", "arrondi"), ("w=fp8_e5m2/channel", "gptq", "arrondi"),
    ("w=int4/b32x32", "gptq", "compressed-tensors"), ("w=int4/g32/e8m0", "gptq", "arrondi"), ("FP8_DYNAMIC", "gptq", "compressed-tensors"),
    ("w=dynamic8/g32", "rtn", "arrondi"), ("w=int4/g32,a=nf4/g32", "rtn", "arrondi"),
    *(pytest.param(*case, marks=pytest.mark.full) for case in [
        ("W8A8", "gptq", "compressed-tensors"), ("NVFP4A16", "rtn", "compressed-tensors"), ("MXFP4A16", "gptq", "compressed-tensors"),
        ("NF4", "rtn", "arrondi"), ("TERNARY", "gptq", "arrondi"), ("T158", "rtn", "arrondi"), ("w=binary/g32", "gptq", "arrondi"),
        ("w=int2/g32/offset", "gptq", "arrondi"), ("w=int4/channel/asym", "gptq", "compressed-tensors"),
    ]),
]  # fmt: skip
IDS = torch.arange(24).reshape(2, 12) * 31 % 2048
GROUP = {"NF4": 32}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("scheme", "method", "layout"), CASES)
def test_what_is_loaded_computes_with_the_dequantized_weights(
    scheme: str, method: str, layout: str, models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch
) -> None:
    if "A8" in scheme or "FP8" in scheme:  # a sum in another order moves activations across a rounding edge
        monkeypatch.setenv("ARRONDI_KERNEL", "reference")
    source, out, plain = models("llama", num_hidden_layers=1), tmp_path / "out", tmp_path / "plain"
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=2) if method == "gptq" else None
    report = quantize_model(source, out, arrondi.Recipe.simple(scheme, method, group_size=GROUP.get(scheme)), options)
    assert report["layout"] == layout
    assert report["counts"] == {"quantized": 7, "kept by rule": 5, "kept because impossible": 0}

    model = arrondi.load(out)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    checkpoint = Checkpoint.open(out)
    assert {f"{n}.weight" for n in linears} == set(checkpoint.placed)
    assert all(m.inputs == checkpoint.inputs_of(f"{n}.weight") for n, m in linears.items())
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        q = checkpoint.read(f"{name}.weight")
        assert isinstance(q, QTensor)
        torch.testing.assert_close(linears[name].dequantize(), q.dequantize(), rtol=1e-6, atol=1e-7)

    dequantize_model(out, plain, "float32")
    restored = transformers.LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    for name, linear in linears.items():  # the restored model rounds its activations where ours does
        if linear.inputs is not None:
            hook = lambda module, args, a=linear.inputs.scheme: (arrondi.fake_quantize(args[0], a),)  # noqa: E731
            restored.get_submodule(name).register_forward_pre_hook(hook)
    expected = logits(restored)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    # More bits, less error: the weights are what they were, but for rounding.
    original = arrondi.load(source)
    rows = {r["name"]: r for r in report["layers"]}
    for name in linears:
        weight = original.get_submodule(name).weight
        noise = (linears[name].dequantize() - weight).square().sum() / weight.square().sum()
        assert rows[f"{name}.weight"]["sqnr_db"] == pytest.approx(-10 * torch.log10(noise).item(), abs=0.01)


def test_more_bits_mean_less_error(models: Callable[..., Path], tmp_path: Path) -> None:
    ratios = []
    for bits in range(2, 9):
        report = quantize_model(
            models("llama", num_hidden_layers=1),
            tmp_path / str(bits),
            arrondi.Recipe.simple(f"W{bits}A16", group_size=32),
        )
        weights = sum(p.shape[0] * p.shape[1] for p in Checkpoint.open(tmp_path / str(bits)).placed.values())
        # The codes, a float32 scale for 32 of them, and for each of 7 tensors the shape: two int64.
        assert report["bits_per_weight"] == pytest.approx(bits + 1 + 7 * 128 / weights, abs=5e-5)
        ratios.append(min(r["sqnr_db"] for r in report["layers"]))
    steps = [b - a for a, b in itertools.pairwise(ratios)]
    assert all(4.5 < s < 8.5 for s in steps), "a bit is worth some 6 dB"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "NF4"])
def test_scales_are_stored_in_the_type_of_the_model(
    scheme: str, dtype: torch.dtype, models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    group = 32 if scheme != "W8A8" else None
    quantize_model(models("llama", dtype, num_hidden_layers=1), out, arrondi.Recipe.simple(scheme, group_size=group))
    entries = Checkpoint.open(out).folder.entries
    scales = {e.torch_dtype for n, e in entries.items() if n.endswith("scale")}
    assert scales == {dtype}
    kept = {e.torch_dtype for n, e in entries.items() if "norm" in n or "embed" in n}
    assert kept == {dtype}
    loaded = arrondi.load(out, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize(
    "name", ["bert", "mixtral", *(pytest.param(n, marks=pytest.mark.full) for n in ("llama", "gpt2", "opt"))]
)
def test_int8_and_fp8_with_rounded_activations_on_every_kind_of_model(
    name: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """`quantize` measures the model that `load` gives and that `eval` measures: to the last digit."""
    source = models(name, **({"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}))
    for scheme in ("W8A8", "FP8_DYNAMIC"):
        out = tmp_path / scheme
        options = TextOptions(eval_text=text, seq_len=24, eval_samples=4)
        measured = quantize_model(source, out, arrondi.Recipe.simple(scheme), options)["evaluation"]
        again = compare_models(out, source, text, seq_len=24, samples=4)
        assert {k: v for k, v in measured.items() if isinstance(v, float)} == {
            k: v for k, v in again.items() if isinstance(v, float)
        }
        key = "kl_mean" if ARCHITECTURES[name][0].endswith(("LM", "HeadModel")) else "relative_error"
        assert measured[key] > 0, "something was rounded"


def test_the_original_is_measured_without_rounded_activations(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models("llama", num_hidden_layers=1)
    options = TextOptions(eval_text=text, seq_len=24, eval_samples=4)
    found = {
        scheme: quantize_model(source, tmp_path / scheme, arrondi.Recipe.simple(scheme), options)["evaluation"]
        for scheme in ("FP8A16", "FP8_DYNAMIC")
    }
    references = {f["reference_perplexity"] for f in found.values()}
    assert len(references) == 1
    assert found["FP8_DYNAMIC"]["kl_mean"] > 1.5 * found["FP8A16"]["kl_mean"]
