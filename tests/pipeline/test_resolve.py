"""What becomes of tensors that a scheme, a reader or the model's own class treats in an unusual way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import arrondi
from arrondi.formats import parse_scheme
from arrondi.model import OnDisk
from arrondi.nn import QLinear
from arrondi.pipeline import Recipe, Rule, make_plan, quantize_model

Models = Callable[..., Path]


def test_inputs_of_convolutions_have_no_tokens_and_are_not_planned_so(models: Models) -> None:
    source = OnDisk.open(models("zaya"))
    plan = make_plan(source, Recipe.simple("w=int8/channel,a=int8/token", targets=["Linear", "Conv1d"]))
    kept = [t for t in plan.tensors if t.status == "kept because impossible" and "conv" in t.name]
    assert kept and all("one scale for a tensor, not by int8/token" in t.reason for t in kept)
    whole = make_plan(source, Recipe.simple("w=int8/channel,a=int8/tensor", targets=["Linear", "Conv1d"]))
    assert {t.name for t in whole.quantized} >= {t.name for t in kept}


def test_parts_of_a_stored_tensor_that_is_kept_are_ignored_by_their_own_paths(models: Models) -> None:
    plan = make_plan(OnDisk.open(models("qianfan-ocr")), Recipe.simple("w=int8/channel,a=int8/token"))
    parts = {f"model.vision_tower.layers.{i}.attention.{n}_proj" for i in range(2) for n in "qkv"}
    assert parts <= set(plan.kept_modules)
    assert all(any(m == path for m, _ in plan.source.model.named_modules()) for path in parts)


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=int8/channel,a=int8/token", "w=int8/channel,a=int8/tensor"])
def test_stored_matrices_that_are_joined_are_one_packed_layer_whose_input_is_rounded(
    scheme: str, models: Models, tmp_path: Path
) -> None:
    quantize_model(models("minimax-m3"), tmp_path / "out", Recipe.simple(scheme))
    layer = arrondi.load(tmp_path / "out").model.language_model.layers[0].mlp.shared_experts.gate_up_proj
    assert isinstance(layer, QLinear) and (layer.inputs is not None) is ("a=" in scheme)
    source = OnDisk.open(tmp_path / "out")
    instance = source.instance()
    name = "model.language_model.layers.0.mlp.shared_experts.gate_up_proj.weight"
    instance.fill([name])
    assert torch.equal(layer.dequantize(), instance.parameter(name))


@pytest.mark.parametrize(
    "second", [[Rule(parse_scheme("w=int4/channel"), targets=("re:.*shared_experts.gate_proj",))], []]
)
def test_stored_matrices_that_are_joined_have_one_scheme(second: list[Rule], models: Models) -> None:
    """A config names the layer that they become, once."""
    ignore = None if second else ("re:.*shared_experts.gate_proj",)
    recipe = Recipe((Rule(parse_scheme("w=int8/channel")), *second), ignore)
    plan = make_plan(OnDisk.open(models("minimax-m3")), recipe)
    assert len(plan.problems) == 2 and "Select them by one rule" in plan.problems[0], "one for each layer"


def test_a_module_of_ours_that_initialises_itself_is_not_asked_to(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some modules have a method of this name that is not that of transformers' models."""
    monkeypatch.setattr(LlamaMLP, "_init_weights", lambda self: 1 / 0, raising=False)
    assert OnDisk.open(models("llama")).starts_without(["model.layers.0.mlp.up_proj"])
