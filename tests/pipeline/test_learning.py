"""Steps that learn from the original's units, presets, and the original that is followed rewritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, preset_recipe, quantize_model
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data

TEXT = TextOptions(data(6, 24, 1), samples=6, eval_text=data(2, 24, 2))


def call(model: Path, out: Path, recipe: Recipe) -> dict[str, Any]:
    return quantize_model(model, out, recipe, TEXT, shard_bytes=100_000)


@pytest.mark.parametrize(
    ("method", "repairs", "step"),
    [
        ("gptq", ("tune",), "tune"),
        ("gptaq", ("tune",), "tune"),
        ("autoround", (), "signround"),
        ("rtn", ("lkd",), "lkd"),
    ],
)
def test_units_come_nearer_to_the_original(models: Callable[..., Path], tmp_path: Path, method: str, repairs: tuple[str, ...], step: str) -> None:  # fmt: skip
    options = {f"{step}.iterations": 24} if step != "tune" else {"tune.rate": 0.01}
    recipe = Recipe.simple("w=int3/g16", method, repairs=repairs, options=options)
    report = call(models("llama"), tmp_path / "out", recipe)
    learned = [row["unit_error"] for row in report["layers"] if "unit_error" in row]
    assert learned, "something was learned"
    assert all(after < before for before, after in learned)
    assert all(step in row["steps"] for row in report["layers"])
    measured = compare_models(str(tmp_path / "out"), str(models("llama")), data(2, 24, 2))
    assert measured["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3), "one model"


def test_autoround_as_published_begins_with_nearest_codes(models: Callable[..., Path], tmp_path: Path) -> None:
    options = {"start": "nearest", "signround.iterations": 24}
    report = call(models("llama"), tmp_path / "out", Recipe.simple("w=int3/g16", "autoround", options=options))
    assert all("correction" not in row for row in report["layers"]), "GPTAQ says how far it corrects"
    learned = [row["unit_error"] for row in report["layers"] if "unit_error" in row]
    assert learned
    assert all(after < before for before, after in learned)
    faster = call(models("llama"), tmp_path / "faster", Recipe.simple("w=int3/g16", "autoround"))
    assert any("correction" in row for row in faster["layers"])


def test_a_run_that_was_killed_rewrites_the_original_again(models: Callable[..., Path], tmp_path: Path) -> None:
    """GPTAQ and `tune` look at the original as rewrites left it, which no file holds."""
    recipe = Recipe.simple("w=int3/g16", "gptaq", rewrites=("awq-scale", "rotate"), repairs=("tune",))
    whole = call(models("llama"), tmp_path / "whole", recipe)
    steps = ["front", "unit 0", "unit 1"]
    for step in steps:
        with stopped_after(step):
            call(models("llama"), tmp_path / "stopped", recipe)
    assert call(models("llama"), tmp_path / "stopped", recipe)["evaluation"] == whole["evaluation"]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


def test_rewrites_and_gptaq_go_together(models: Callable[..., Path], tmp_path: Path) -> None:
    """In another basis the original's inputs are others; taken from the wrong one, the correction would ruin the model."""
    plain = call(models("llama"), tmp_path / "plain", Recipe.simple("w=int4/g16", "gptaq"))
    rotated = call(models("llama"), tmp_path / "rotated", Recipe.simple("w=int4/g16", "gptaq", rewrites=("rotate",)))
    assert rotated["evaluation"]["kl_mean"] < 2 * plain["evaluation"]["kl_mean"]


def test_what_cannot_be_learned_is_refused_or_named(models: Callable[..., Path]) -> None:
    with pytest.raises(SchemeError, match="AutoRound learns integer codes with plain scales"):
        Recipe.simple("NF4", "autoround")
    plan = make_plan(OnDisk.open(models("llama")), Recipe.simple("NF4", "rtn", repairs=("lkd",), group_size=16))
    assert any("lkd is not done, its rounding is not learned" in note for note in plan.notes)


def test_presets_are_recipes(models: Callable[..., Path]) -> None:
    best = [rule.method for rule in preset_recipe("best", "W3A16").rules]
    assert best == ["yaqa", "e2e"]
    assert [rule.method for rule in preset_recipe("best", "NVFP4").rules] == ["gptaq", "tune", "e2e"], (
        "rows share a scale"
    )
    assert preset_recipe("best", "w=int4/g32,a=int4/token").rules[0].method == "rotate"
    q8bert = make_plan(OnDisk.open(models("bert")), preset_recipe("q8bert"))
    assert {t.name: str(t.scheme) for t in q8bert.quantized if not t.scheme or not t.scheme.inputs} == {
        "embeddings.word_embeddings.weight": "w=int8/tensor"
    }
    assert [rule.method for rule in preset_recipe("zeroquant").rules] == ["rtn", "lkd"]
    with pytest.raises(SchemeError, match=r"Unknown preset 'bets'. Did you mean 'best'\?"):
        preset_recipe("bets")
    with pytest.raises(SchemeError, match="which is not part of this recipe"):
        preset_recipe("best", options={"signround.rate": 0.1})


def test_the_recipe_of_a_preset_is_in_the_report(models: Callable[..., Path], tmp_path: Path) -> None:
    call(
        models("llama"),
        tmp_path / "out",
        preset_recipe("best", "w=int3/g16", options={"e2e.passes": 1}),
    )
    rules = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]["rules"]
    assert [(r["method"], r["options"]) for r in rules] == [
        ("yaqa", {"refine": 2}),
        ("e2e", {"passes": 1}),
    ]


def test_the_global_random_state_is_left_alone(models: Callable[..., Path], tmp_path: Path) -> None:
    state = torch.get_rng_state()
    call(models("llama"), tmp_path / "out", Recipe.simple("w=int3/g16", "gptaq", repairs=("tune",)))
    assert torch.equal(torch.get_rng_state(), state)
