"""Learned tables and numbers kept apart, from the recipe to the packed model: stored, measured, loaded, restored, and every run alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import FileFormatError, SchemeError
from arrondi.measure.compare import compare_models
from arrondi.nn import QLinear
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from arrondi.tensor.qtensor import QTensor
from tests.pipeline.killer import digest
from tests.pipeline.stopping import stopped_after

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kmeans": ("W3A16", "kmeans", {}),
    "kmeans of eight rows": ("W2A16", "kmeans", {"rows": 8}),
    "any4": ("W4A16", "any4", {"rows": 0}),
    "gobo": ("W3A16", "gobo", {"zscore": 2.5}),
    "int8, dynamic": ("W8A8", "llm-int8", {"threshold": 2.0}),
    "int8, static": ("W8A8", "llm-int8", {"outliers": "static", "share": 0.05}),
    "int4, static": ("W4A16", "llm-int8", {"share": 0.05}),
}


def quantized(case: str, model: Path, out: Path, text: Path) -> dict[str, Any]:
    scheme, method, options = CASES[case]
    size = None if method in ("kmeans", "gobo") or scheme == "W8A8" else 32
    recipe = arrondi.Recipe.simple(scheme, method, group_size=size, options=options)
    return quantize_model(model, out, recipe, TextOptions(text, samples=3, seq_len=24, eval_samples=2))


QUICK = {"kmeans of eight rows", "gobo", "int8, dynamic"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.full) for c in CASES])
def test_what_is_measured_is_what_is_stored_and_what_runs(
    case: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model, out = models("llama", num_hidden_layers=1), tmp_path / "out"
    report = quantized(case, model, out, text)
    assert report["layout"] == "arrondi"
    stored = Checkpoint.open(str(out))
    stored.verify()
    layers = [q for name in stored.placed if isinstance(q := stored.read(name), QTensor)]
    bits = sum(q.stored_bits for q in layers) / sum(q.codes.numel() for q in layers)
    assert report["bits_per_weight"] == pytest.approx(bits, rel=0.01), "tables and what is kept apart are counted"
    assert compare_models(out, model, text, seq_len=24, samples=2)["kl_mean"] > 0
    # The packed model computes what evaluation computes.
    ids = torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    packed = arrondi.load(out, dtype=torch.float32)
    assert any(isinstance(m, QLinear) for m in packed.modules())
    dequantize_model(out, tmp_path / "plain", "float32")
    plain = arrondi.load(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        ours = packed(ids).logits
        if "8, " not in case:  # where inputs are rounded too, the plain weights alone say something else
            torch.testing.assert_close(ours, plain(ids).logits, rtol=1e-4, atol=1e-5)
        simulated = stored_logits(out, ids)
    # A sum that differs in its last bit may be rounded to another code.
    limit = 0.01 if "8, " in case else 1e-5
    assert float((ours - simulated).norm() / simulated.norm()) < limit
    assert digest(out) == digest(rerun(case, model, tmp_path / "again", text)), "two runs write the same bytes"


def stored_logits(out: Path, ids: torch.Tensor) -> torch.Tensor:
    """What evaluation makes of the files: plain weights, inputs rounded by hooks."""
    from arrondi.model import OnDisk

    source = OnDisk(Checkpoint.open(str(out)))
    instance = source.instance()
    instance.fill(list(instance.empty))
    instance.round_inputs(source.rounded_inputs())
    return instance.model(ids).logits


def rerun(case: str, model: Path, out: Path, text: Path) -> Path:
    quantized(case, model, out, text)
    return out


@pytest.mark.parametrize("case", ["kmeans of eight rows", "gobo", "int4, static"])
def test_experts_in_one_tensor(case: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model, out = models("mixtral", num_hidden_layers=1), tmp_path / "out"
    quantized(case, model, out, text)
    ids = torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            arrondi.load(out, dtype=torch.float32)(ids).logits, stored_logits(out, ids), rtol=1e-4, atol=2e-5
        )


def test_a_run_that_was_stopped_goes_on(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = models("llama", num_hidden_layers=2)
    whole = digest(rerun("int8, static", model, tmp_path / "whole", text))
    with stopped_after("unit 0"):
        quantized("int8, static", model, tmp_path / "out", text)
    assert digest(rerun("int8, static", model, tmp_path / "out", text)) == whole


def test_a_module_in_memory(models: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("llama", num_hidden_layers=1), dtype=torch.float32).eval()
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        arrondi.quantize(model, "W4A16", method="gobo", calibration=[ids])
        after = model(ids).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.5


@pytest.mark.parametrize(("part", "value"), [("table", 127), ("apart_index", -1), ("apart_values", torch.nan)])
def test_damaged_parts_are_found(
    part: str, value: float, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    quantized("gobo" if part != "table" else "kmeans", models("llama", num_hidden_layers=1), out, text)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(f".{part}"))
    tensors[name].flatten()[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match=name.removesuffix(f".{part}")):
        Checkpoint.open(str(out)).layer(name.removesuffix(f".{part}"))


def test_another_layout_and_another_scheme_say_so(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = models("llama", num_hidden_layers=1)
    recipe = arrondi.Recipe.simple("W3A16", "kmeans")
    with pytest.raises(SchemeError, match=r"compressed-tensors has no format for"):
        quantize_model(model, tmp_path / "out", recipe, TextOptions(text), layout="compressed-tensors")
    with pytest.raises(SchemeError, match=r"gobo learns one table .* got nf4/g64"):
        arrondi.Recipe.simple("NF4", "gobo")
    quantized("int8, dynamic", model, tmp_path / "int8", text)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    schemes = {facts["scheme"] for facts in config["tensors"].values()}
    assert schemes == {"w=int8/channel,a=int8/token/outliers:2"}


def test_static_outliers_are_the_columns_that_reach_the_threshold(models: Callable[..., Path], tmp_path: Path) -> None:
    """Counted on the original by transformers; a run that is killed keeps the same, and so does a module in memory."""
    model, out = models("llama"), tmp_path / "out"
    ids = torch.randint(0, 2048, (4, 24), generator=torch.Generator().manual_seed(3))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    layers = {n: m for n, m in plain.named_modules() if n.endswith("_proj")}
    largest: dict[str, torch.Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: largest.update({n: x[0].abs().amax((0, 1))})) for n, m in layers.items()]  # fmt: skip
    with torch.no_grad():
        plain(ids)
    for hook in hooks:
        hook.remove()
    threshold = float(torch.cat(list(largest.values())).quantile(0.93))
    wanted = {n: int((v >= threshold).sum()) for n, v in largest.items()}
    assert 0 in wanted.values() and len(set(wanted.values())) > 3

    def quantize(out: Path) -> dict[str, Any]:
        recipe = arrondi.Recipe.simple("W4A16", "llm-int8", group_size=32, options={"threshold": threshold})
        return quantize_model(model, out, recipe, TextOptions(ids, samples=4, eval_text=ids[:1]), shard_bytes=100_000)

    report = quantize(tmp_path / "whole")
    stored = Checkpoint.open(str(tmp_path / "whole"))
    kept = {n.removesuffix(".weight"): stored.read(n) for n in stored.placed}
    assert {n: q.apart.index.shape[-1] if q.apart else 0 for n, q in kept.items() if isinstance(q, QTensor)} == wanted
    assert report["evaluation"]["kl_mean"] > 0
    with stopped_after("unit 0"):
        quantize(out)
    quantize(out)
    assert digest(out) == digest(tmp_path / "whole")
    arrondi.quantize(
        plain, "W4A16", method="llm-int8", group_size=32, options={"threshold": threshold}, calibration=[ids]
    )
    packed = {n: m for n, m in plain.named_modules() if isinstance(m, QLinear)}
    found = {n: kept.index.shape[-1] if (kept := m.unpack().apart) else 0 for n, m in packed.items()}
    assert {n: c for n, c in found.items() if c} == {n: c for n, c in wanted.items() if c}
