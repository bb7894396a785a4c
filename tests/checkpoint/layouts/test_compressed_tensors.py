"""The compressed-tensors layout before its own package, and before plain transformers with it."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from transformers.utils.quantization_config import CompressedTensorsConfig

import arrondi
from arrondi.checkpoint import LAYOUTS, Placed
from arrondi.formats import parse_scheme
from arrondi.pipeline import Recipe, Rule
from arrondi.tensor.qtensor import fake_quantize, quantize_tensor

LAYOUT = LAYOUTS["compressed-tensors"]

SCHEMES = [
    *(f"W{b}A16" for b in range(2, 9)), "W4A16_ASYM", "W3A16_ASYM", "W8A8", "W4A8", "W4AFP8", "FP8_DYNAMIC", "FP8A16", "FP8_BLOCK", "NVFP4A16", "MXFP4A16",
    "MXFP8A16", "w=int4/tensor", "w=int4/channel/asym", "w=int4/b64x64", "w=int8/g64/asym,a=int8/token",
    "w=int8/channel,a=int8/tensor", "w=fp8/tensor,a=fp8/tensor",
]  # fmt: skip

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(3))

BFLOAT16 = 2.0**-8
"""Largest relative error of a number rounded to bfloat16."""


@pytest.fixture(autouse=True)
def the_arithmetic_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is the reading of files. A sum in another order would move rounded activations to the next code."""
    monkeypatch.setenv("ARRONDI_KERNEL", "reference")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS)
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


def theirs(folder: Path, dtype: Any) -> Any:
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns of group sizes that it does not like
        return cls.from_pretrained(folder, dtype=dtype).eval()


def packages_scheme(config: dict[str, Any], group: str = "group_0") -> QuantizationScheme:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "dequantize"})
    return known.config_groups[group]  # type: ignore[return-value]


# ── one tensor, through the package's own decompressor ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_decompresses_to_our_numbers(name: str, stored: str) -> None:
    scheme = parse_scheme(name).with_scale(stored)  # type: ignore[arg-type]
    placed = Placed("layer.weight", (128, 256), scheme)
    weight = torch.randn(placed.matrix_shape, generator=torch.Generator().manual_seed(0)) * 0.02
    q = quantize_tensor(weight, scheme.weights)
    config = LAYOUT.config([placed], [], {"layer": "Linear"})
    known = packages_scheme(config)
    compressor = BaseCompressor.get_value_from_registry(known.format)
    tensors = {n.removeprefix("layer."): t for n, t in LAYOUT.write(placed, q).items()}
    found = compressor.decompress(tensors, known)["weight"]
    if name == "NVFP4A16":
        # Theirs divides by the global scale where ours multiplies by its reciprocal: one last bit of float32 apart,
        # which at a tie shows in bfloat16.
        assert bool(((found.float() - q.dequantize()).abs() <= q.dequantize().abs() * BFLOAT16 * (1 + 1e-6)).all())
    else:
        assert torch.equal(found, q.dequantize(found.dtype))
    expected = {"NVFP4A16": "bfloat16", "MXFP4A16": "bfloat16", "MXFP8A16": "bfloat16"}.get(name, stored)
    assert found.dtype == STORED[expected]


@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_writes_the_names_and_types_that_we_write(name: str) -> None:
    """What its own code compresses has our names, types and shapes, and means our numbers: our grid is its grid."""
    scheme = parse_scheme(name)
    placed = Placed("layer.weight", (128, 256), scheme)
    q = quantize_tensor(torch.randn(placed.matrix_shape, generator=torch.Generator().manual_seed(0)), scheme.weights)
    ours = {n.removeprefix("layer."): t for n, t in LAYOUT.write(placed, q).items()}
    known = packages_scheme(LAYOUT.config([placed], [], {"layer": "Linear"}))
    compressor = BaseCompressor.get_value_from_registry(known.format)
    back = compressor.decompress(ours, known)
    again = compressor.compress({n: t for n, t in back.items() if n != "weight_shape"}, known)
    assert {n: (t.dtype, t.shape) for n, t in again.items()} == {n: (t.dtype, t.shape) for n, t in ours.items()}
    assert torch.equal(compressor.decompress(again, known)["weight"], back["weight"])  # zeros may have lost a sign


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_is_accepted_by_the_package_and_by_transformers(name: str) -> None:
    scheme = parse_scheme(name)
    placed = Placed("layer.weight", (128, 256), scheme)
    config = LAYOUT.config([placed], ["lm_head"], {"layer": "Linear"})
    known = packages_scheme(config)
    assert known.weights is not None
    assert known.weights.num_bits == scheme.weights.format.bits
    assert known.weights.symmetric == scheme.weights.symmetric
    assert (known.input_activations is None) == (scheme.inputs is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert CompressedTensorsConfig(**config).quantization_config.ignore == ["lm_head"]


@pytest.mark.parametrize(
    "text", ["int8/token", "int8/token/asym", "int8/tensor", "int8/g32", "fp8/token", "fp8/tensor", "fp8/g128"]
)
def test_activations_are_rounded_as_the_package_rounds_them(text: str) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as packages_fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    scheme = parse_scheme(f"w=int8/channel,a={text}")
    assert scheme.inputs is not None
    known = packages_scheme(LAYOUT.config([Placed("layer.weight", (8, 8), scheme)], [], {})).input_activations
    assert known is not None
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(1))
    x[0, 3] = 0
    x[1, 5, 7] = 40.0
    scale, zero = compute_dynamic_scales_and_zp(x, known, module=None)  # type: ignore[arg-type]
    found = packages_fake_quantize(x, scale, zero, known)
    # The package adds the zero point before it rounds, so a tie may fall to the other side: one code, seldom.
    apart = (fake_quantize(x, scheme.inputs.scheme) - found).abs() > 1e-5 * found.abs()
    assert float(apart.float().mean()) <= (0.005 if "asym" in text else 0)


# ── a whole model in plain transformers ───────────────────────────────────────────────────────────────────────────────

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Blocks of 128 × 128 fit."""


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_what_we_compute(
    name: str, stored: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = arrondi.quantize_model(models("llama", STORED[stored], **WIDE), out, Recipe.simple(name))
    assert report["layout"] == "compressed-tensors"
    assert report["notes"] == []
    ours32, theirs32 = logits(arrondi.load(out)), logits(theirs(out, torch.float32))
    # In float32 both add up the same products. Where transformers dequantizes while loading, it does so in the type of
    # the scales (or in bfloat16, for FP4), so that its weights are rounded once more.
    once_more = name == "NVFP4A16" or ("asym" in name.lower() and "a=" not in name and stored == "bfloat16")
    assert distance(ours32, theirs32) <= (2 * BFLOAT16 if once_more else 1e-6)

    own = theirs(out, "auto")
    assert own.dtype == STORED[stored], "transformers takes the type of the original by default"
    ours16, theirs16 = logits(arrondi.load(out, dtype=torch.bfloat16)), logits(theirs(out, torch.bfloat16))
    # In bfloat16 each is off by its own rounding errors, ours by no more than theirs.
    noise = distance(theirs16, ours32)
    assert distance(ours16, ours32) <= 1.25 * noise + BFLOAT16
    assert distance(ours16, theirs16) <= 2 * noise + BFLOAT16


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_mx_with_rounded_activations_runs_in_bfloat16_and_the_plan_says_so(
    name: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers makes bfloat16 weights of MX codes. Its exponent rule for activations is not OCP's floor, hence the
    wide bound: what both lose against the unrounded model is of one size."""
    source = models("llama", torch.bfloat16, **WIDE)
    report = arrondi.quantize_model(source, tmp_path / "out", Recipe.simple(name))
    assert [n for n in report["notes"] if "load with dtype=bfloat16" in n]
    original = logits(arrondi.load(source))
    ours, found = logits(arrondi.load(tmp_path / "out", dtype=torch.bfloat16)), logits(theirs(tmp_path / "out", "auto"))
    assert 0.5 < distance(ours, original) / distance(found, original) < 2


def test_several_schemes_load_in_transformers(models: Callable[..., Path], tmp_path: Path) -> None:
    rules = (
        Rule(parse_scheme("W4A16")),
        Rule(parse_scheme("W8A16"), targets=("re:.*down_proj",)),
        Rule(parse_scheme("FP8_DYNAMIC"), targets=("re:.*[qk]_proj",)),
        Rule(None, targets=("re:.*o_proj",)),
    )
    report = arrondi.quantize_model(models("llama", **WIDE), tmp_path / "out", Recipe(rules))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert len(config["config_groups"]) == 3
    assert report["notes"] == []
    assert distance(logits(arrondi.load(tmp_path / "out")), logits(theirs(tmp_path / "out", torch.float32))) <= 1e-6


def test_a_mix_that_transformers_cannot_read_is_noted(models: Callable[..., Path], tmp_path: Path) -> None:
    rules = (Rule(parse_scheme("W4A16")), Rule(parse_scheme("W4A16_ASYM"), targets=("re:.*down_proj",)))
    report = arrondi.quantize_model(models("llama", **WIDE), tmp_path / "out", Recipe(rules))
    assert [n for n in report["notes"] if "cannot read this mix" in n]
    assert "dequantize" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    with pytest.raises(RuntimeError):  # it says so itself, rather than compute with wrong numbers
        theirs(tmp_path / "out", torch.float32)
    assert torch.isfinite(logits(arrondi.load(tmp_path / "out"))).all()


# ── experts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

READ_FUSED = {"W4A16", "W3A16", "W8A16", "w=int4/channel", "FP8A16", "FP8_DYNAMIC", "MXFP4A16"}


@pytest.mark.parametrize("name", [*sorted(READ_FUSED), "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16", "MXFP8A16"])
def test_experts_are_read_by_transformers_or_noted(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("mixtral", num_attention_heads=4, **WIDE)
    report = arrondi.quantize_model(source, tmp_path / "out", Recipe.simple(name))
    noted = [n for n in report["notes"] if "cannot read experts" in n]
    assert (not noted) == (name in READ_FUSED)
    ours = logits(arrondi.load(tmp_path / "out"))
    if name in READ_FUSED:  # it leaves experts in bfloat16 where it decodes to that
        bound = 2 * BFLOAT16 if name == "MXFP4A16" else 1e-6
        assert distance(ours, logits(theirs(tmp_path / "out", torch.float32))) <= bound
    else:  # the note is true: it refuses, or computes something else
        with contextlib.suppress(RuntimeError):
            assert distance(ours, logits(theirs(tmp_path / "out", torch.float32))) > 0.1


@pytest.mark.parametrize("schemes", [("W4A16", "W8A16"), ("W8A16", "W4A16"), ("MXFP4A16", "W4A16_ASYM")], ids="-".join)
def test_experts_and_the_rest_may_have_different_schemes(
    schemes: tuple[str, str], models: Callable[..., Path], tmp_path: Path
) -> None:
    experts, rest = (parse_scheme(s) for s in schemes)
    recipe = Recipe((Rule(rest), Rule(experts, targets=("re:.*experts.*",))))
    report = arrondi.quantize_model(models("mixtral", num_attention_heads=4, **WIDE), tmp_path / "out", recipe)
    assert report["notes"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = logits(theirs(tmp_path / "out", torch.float32))
    bound = 2 * BFLOAT16 if schemes[0] == "MXFP4A16" else 1e-6
    assert distance(logits(arrondi.load(tmp_path / "out")), found) <= bound


def test_experts_of_several_schemes_are_noted(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe((Rule(parse_scheme("W4A16")), Rule(parse_scheme("W8A16"), targets=("re:.*experts.*w2.*",))))
    report = arrondi.quantize_model(models("mixtral", num_attention_heads=4, **WIDE), tmp_path / "out", recipe)
    assert [n for n in report["notes"] if "all experts by one scheme" in n]


def test_rounded_inputs_of_conv1d_are_noted(models: Callable[..., Path], tmp_path: Path) -> None:
    report = arrondi.quantize_model(models("gpt2"), tmp_path / "out", Recipe.simple("W8A8"))
    assert [n for n in report["notes"] if "Conv1D" in n]
    ours, found = logits(arrondi.load(tmp_path / "out")), logits(theirs(tmp_path / "out", torch.float32))
    assert distance(ours, found) > 1e-4, "if transformers has learnt it, the note is out of date"
    for name, module in (model := arrondi.load(tmp_path / "out")).named_modules():
        if hasattr(module, "activations"):
            module.activations = None
            assert name
    assert distance(logits(model), found) <= 1e-6, "and nothing but the rounding of inputs is apart"
