"""Rounding the inputs of a weight-only model at run time: loading, measuring, refusing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import SchemeError
from arrondi.formats import parse_activations
from arrondi.measure.compare import compare_models
from arrondi.native import native
from arrondi.nn import QLinear
from arrondi.pipeline import quantize_model
from arrondi.runtime.fuse import is_fused
from arrondi.tensor.nearest import fake_quantize


@pytest.fixture(scope="module")
def four(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "out"
    quantize_model(models("llama"), out, arrondi.Recipe.simple("W4A16", group_size=32))
    return out


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.double()


@pytest.mark.parametrize("text", ["int8/g32", "int8/token", "int8/token/asym", "uint4/g64/asym", "fp8_e4m3/token"])
def test_every_layer_rounds_its_input(text: str, four: Path) -> None:
    scheme = parse_activations(text).scheme
    checkpoint = Checkpoint.open(four)
    layers = {n: m for n, m in arrondi.load(four, activations=text).named_modules() if isinstance(m, QLinear)}
    assert {f"{name}.weight" for name in layers} == set(checkpoint.placed)
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        wanted = fake_quantize(x, scheme) @ checkpoint.dense(f"{name}.weight").T
        assert torch.allclose(layer(x), wanted, rtol=1e-4, atol=1e-5), name


# Symmetric grids put the largest number on the edge between two codes, where the last bit of a norm decides.
@pytest.mark.parametrize("text", ["int8/token/asym", "uint4/g64/asym", "fp8_e4m3/token"])
def test_the_model_is_the_one_with_rounded_inputs(text: str, four: Path) -> None:
    """The other side is transformers' own model, with a hook before every linear that was quantized."""
    mine = arrondi.load(four, activations=text)
    plain = AutoModelForCausalLM.from_pretrained(four)
    untouched = logits(plain)
    scheme = parse_activations(text).scheme
    for name in Checkpoint.open(four).placed:
        plain.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, x: (fake_quantize(x[0], scheme), *x[1:])
        )
    wanted = logits(plain)
    # A value near the edge of two codes may fall to either, and moves what comes after it.
    cost = (wanted - untouched).norm()
    assert (logits(mine) - wanted).norm() < 0.2 * cost
    if native is not None and text != "fp8_e4m3/token":
        assert is_fused(mine)


def test_its_cost_is_measured(four: Path, models: Callable[..., Path], text: Path) -> None:
    cost = [
        compare_models(four, models("llama"), text, seq_len=64, samples=8, activations=a)["kl_mean"]
        for a in (None, "int8/g32", "int4/g32")
    ]
    assert cost[0] < cost[2]
    assert abs(cost[1] - cost[0]) < 0.1 * (cost[2] - cost[0])


def test_its_cost_is_measured_where_names_lack_a_prefix(
    four: Path, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """As in checkpoints that were saved without the head's model around them."""
    bare = shutil.copytree(models("llama"), tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file(
        {name.removeprefix("model."): t for name, t in tensors.items()},
        bare / "model.safetensors",
        metadata={"format": "pt"},
    )
    quantize_model(bare, tmp_path / "out", arrondi.Recipe.simple("W4A16", group_size=32))
    found = [
        compare_models(where, models("llama"), text, seq_len=64, samples=8, activations="int4/token")
        for where in (four, tmp_path / "out")
    ]
    assert found[0]["kl_mean"] == pytest.approx(found[1]["kl_mean"], rel=1e-6)
    assert found[1]["activations"] == "int4/token"


def test_a_scheme_of_its_own_stays(models: Callable[..., Path], tmp_path: Path) -> None:
    quantize_model(models("llama"), tmp_path / "out", arrondi.Recipe.simple("W8A8"))
    with pytest.raises(SchemeError, match="its own schemes round them"):
        arrondi.load(tmp_path / "out", activations="int8/g32")


def test_a_plain_model_is_refused(models: Callable[..., Path]) -> None:
    with pytest.raises(SchemeError, match="it is not quantized"):
        arrondi.load(models("llama"), activations="int8/g32")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9/token", "int9"),
        ("int8/static", "Drop 'static'"),
        ("int8,g32", "Example: int8/g128"),
        ("a=int8", "Example: int8/g128"),
        ("", "Example: int8/g128"),
        ("int8/groups", "groups"),
    ],
)
def test_what_is_no_scheme_of_activations_is_refused(text: str, words: str, four: Path) -> None:
    with pytest.raises(SchemeError, match=words):
        arrondi.load(four, activations=text)
