"""`bias-correction`: the mean of every layer's output against the same layer of the original, run by transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from arrondi.errors import ArrondiError, SchemeError, ShapeError
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.repair.bias import mean_shift
from arrondi.runtime.load import load as load_model
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data

IDS = data(6, 24, 1)
TEXT = TextOptions(IDS, samples=6, eval_text=data(2, 24, 2))


def call(model: Path, out: Path, repairs: tuple[str, ...] = ("bias-correction",), **how: Any) -> dict[str, Any]:
    recipe = Recipe.simple("w=int3/g16", how.pop("method", "rtn"), repairs=repairs, **how)
    return quantize_model(model, out, recipe, TEXT, shard_bytes=100_000)


def means(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The mean output of every layer of the blocks over the calibration tokens."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        m.register_forward_hook(lambda _, __, y, n=n: found.update({n: y.double().flatten(0, -2).mean(0)}))
        for n, m in model.named_modules()
        if re.search(r"\.\d+\..*(proj|fc1|fc2|c_attn|c_fc)$", n)
    ]
    with torch.no_grad():
        model(torch.as_tensor(IDS))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_layers_give_on_average_what_they_gave(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    report = call(models(name), tmp_path / "out")
    plain = call(models(name), tmp_path / "plain", ())
    wanted = means(transformers.AutoModelForCausalLM.from_pretrained(models(name)).eval())
    found, before = means(load_model(tmp_path / "out")), means(load_model(tmp_path / "plain"))
    assert len(wanted) > 8 and wanted.keys() == found.keys()
    for layer, mean in wanted.items():
        assert float((found[layer] - mean).norm()) < 1e-3 * float((before[layer] - mean).norm()) + 1e-6, layer
    assert all(row["steps"] == ["bias-correction"] and row["bias_shift"] > 0 for row in report["layers"])
    assert report["evaluation"]["kl_mean"] < plain["evaluation"]["kl_mean"]


def test_layers_without_a_bias_stay_and_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    plan = make_plan(
        OnDisk.open(models("llama-tied")), Recipe.simple("w=int4/g16", "rtn", repairs=("bias-correction",))
    )
    (note,) = [n for n in plan.notes if n.startswith("bias-correction is not done, there is no bias for its outputs")]
    assert "mlp.up_proj.weight" in note and "q_proj" not in note
    call(models("llama-tied"), tmp_path / "out")
    names = {k for file in (tmp_path / "out").glob("*.safetensors") for k in load_file(file)}
    assert not any(n.endswith("up_proj.bias") for n in names), "no parameter is invented"
    assert any(n.endswith("q_proj.bias") for n in names)


def test_a_run_that_was_killed_ends_with_the_same_bytes(models: Callable[..., Path], tmp_path: Path) -> None:
    call(models("opt"), tmp_path / "whole", method="gptaq")
    for step in ("unit 0", "unit 1"):
        with stopped_after(step):
            call(models("opt"), tmp_path / "stopped", method="gptaq")
    call(models("opt"), tmp_path / "stopped", method="gptaq")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


def test_it_needs_text_and_takes_no_options(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.simple("w=int3/g16", "rtn", repairs=("bias-correction",))
    with pytest.raises(ArrondiError, match="calibration"):
        quantize_model(models("opt"), tmp_path / "out", recipe)
    with pytest.raises(SchemeError, match="strength"):
        Recipe.simple("w=int3/g16", "rtn", repairs=("bias-correction",), options={"bias-correction.strength": 1.0})


def test_the_shift_is_the_difference_of_two_means() -> None:
    generator = torch.Generator().manual_seed(0)
    w, q = torch.randn(2, 5, 7, generator=generator)
    x, f = torch.randn(2, 100, 7, generator=generator)
    assert torch.allclose(mean_shift(w, q, x.mean(0), f.mean(0)), (x @ q.T).mean(0) - (f @ w.T).mean(0), atol=1e-5)
    assert torch.allclose(mean_shift(w, q, x.mean(0)), ((q - w) @ x.T).mean(1), atol=1e-5)
    with pytest.raises(ShapeError, match=r"two means \(n,\)"):
        mean_shift(w, q, x.mean(0)[:3])
