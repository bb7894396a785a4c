"""`e2e`: the whole model is learned after its last unit, and written a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.errors import DataError
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.pipeline.steps import e2e
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data

TEXT = TextOptions(data(24, 32, 1), samples=24, eval_text=data(2, 24, 2))
"""Two batches, one of which is held out."""


def call(model: Path, out: Path, recipe: Recipe, text: TextOptions = TEXT) -> dict[str, Any]:
    return quantize_model(model, out, recipe, text, shard_bytes=100_000)


def recipe(scheme: str = "w=int2/g16", method: str = "rtn", **options: Any) -> Recipe:
    return Recipe.simple(scheme, method, repairs=("e2e",), options={"e2e.rate": 0.02, **options})


@pytest.mark.parametrize(
    ("name", "scheme", "method"),
    [
        ("llama", "w=int2/g16", "rtn"),
        ("gpt2", "w=int2/g16,a=int8/token", "gptq"),
        ("qwen3-moe", "w=int3/g16", "rtn"),
        ("bert", "w=int3/g16", "rtn"),
    ],
)
def test_what_was_not_learned_on_comes_nearer(models: Callable[..., Path], tmp_path: Path, name: str, scheme: str, method: str) -> None:  # fmt: skip
    report = call(models(name), tmp_path / "out", recipe(scheme, method))
    losses = report["whole_model"]["e2e"]["held_out"]
    assert len(losses) == 5 and min(losses) < losses[0]
    plain = call(models(name), tmp_path / "plain", Recipe.simple(scheme, method))
    key = "kl_mean" if "kl_mean" in report["evaluation"] else "relative_error"
    assert report["evaluation"][key] < plain["evaluation"][key]
    measured = compare_models(str(tmp_path / "out"), str(models(name)), data(2, 24, 2))
    assert measured[key] == pytest.approx(report["evaluation"][key], rel=1e-3), "one model"
    assert all("e2e" in row["steps"] and row["sqnr_db"] is None for row in report["layers"])


def test_after_a_rotation_the_model_is_still_one(models: Callable[..., Path], tmp_path: Path) -> None:
    turned = Recipe.simple("w=int2/g16", "gptq", rewrites=("rotate",), repairs=("e2e",), options={"e2e.rate": 0.02})
    report = call(models("llama"), tmp_path / "out", turned)
    losses = report["whole_model"]["e2e"]["held_out"]
    assert min(losses) < losses[0]
    measured = compare_models(str(tmp_path / "out"), str(models("llama")), data(2, 24, 2))
    assert measured["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3)


def test_a_killed_run_ends_with_the_same_bytes(models: Callable[..., Path], tmp_path: Path) -> None:
    whole = call(models("llama"), tmp_path / "whole", recipe())
    for step in ("unit 1", "outside", "e2e: learned", "e2e"):
        with stopped_after(step):
            call(models("llama"), tmp_path / "stopped", recipe())
    assert call(models("llama"), tmp_path / "stopped", recipe())["evaluation"] == whole["evaluation"]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("after", ["e2e: learned", "e2e"])
def test_damage_to_what_was_replaced_or_kept_aside_is_found(models: Callable[..., Path], tmp_path: Path, after: str) -> None:  # fmt: skip
    whole = call(models("llama"), tmp_path / "whole", recipe())
    for damaged in ("*.safetensors.partial", "e2e/*.partial"):
        out = tmp_path / damaged.replace("/", "-").replace("*", "x")
        with stopped_after(after):
            call(models("llama"), out, recipe())
        path = min((out / ".arrondi").glob(damaged))
        content = bytearray(path.read_bytes())
        content[-len(content) // 4] ^= 1
        path.write_bytes(content)
        assert call(models("llama"), out, recipe())["evaluation"] == whole["evaluation"]


def test_one_batch_cannot_be_held_out_and_learned_from(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Give more --samples"):
        call(models("llama"), tmp_path / "out", recipe(), TextOptions(data(1, 24, 1), eval_text=data(2, 24, 2)))


def test_a_model_that_does_not_fit_in_memory_is_left_alone_and_that_is_said(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(e2e.os, "sysconf", lambda name: 16)
    plan = make_plan(OnDisk.open(models("llama")), recipe())
    assert any("e2e is not done, both models in memory need" in note for note in plan.notes)
    assert not plan.declared.changed


def test_gradients_are_those_of_the_divergence() -> None:
    """Against the formula, written out."""
    wanted, given = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    p, q = wanted.softmax(-1), given.softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1).mean()
    assert float(e2e._divergence(wanted, given)) == pytest.approx(float(by_hand), rel=1e-12)
