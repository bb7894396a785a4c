"""Experts that few tokens reach, calibrated on all tokens of their block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.model import OnDisk
from arrondi.model.experts import every_token
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from arrondi.pipeline.statistics import Seen, Side, collect
from tests.pipeline.toys import data

IDS = data(2, 24, 7)


def statistics(path: Path, param: str, experts: list[int] | None) -> tuple[dict[Any, Seen], Any]:
    """What is seen of the inputs of a stack in a whole model, and what the model computes meanwhile."""
    instance = OnDisk.open(path).instance()
    instance.fill(list(instance.names.params))
    out: list[Any] = []
    side = Side(instance.parameter, [lambda: out.append(instance.model(IDS).logits)], instance.owner)
    with torch.no_grad():
        return collect([param], {}, side, {"moment", "absmax"}, experts={param: experts} if experts else None), out[0]


@pytest.mark.parametrize(("name", "owner"), [("mixtral", "block_sparse_moe"), ("gpt-oss", "mlp"), ("qwen3-moe", "mlp")])
def test_moments_are_those_of_all_tokens(name: str, owner: str, models: Callable[..., Path]) -> None:
    """Against a plain loop of transformers: what enters the experts of block 1, and what their first matrices make of all of it."""
    path = models(name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")
    module = model.model.layers[1].mlp.experts
    entered: list[torch.Tensor] = []
    module.register_forward_pre_hook(
        lambda m, args, kwargs: entered.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    with torch.no_grad():
        wanted = model(IDS).logits
    x = entered[0].reshape(-1, 64)
    first, second = (f"model.layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    seen, logits = statistics(path, first, [0, 2])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)  # the model itself went on with its own routing
    assert seen.keys() == {(first, 0), (first, 2)} and seen[first, 0] is seen[first, 2]
    moment = seen[first, 2].moment
    assert moment is not None and moment.tokens == 48
    torch.testing.assert_close(moment.matrix(), x.T @ x, rtol=1e-3, atol=1e-4)
    seen, _ = statistics(path, second, [2])
    if name != "gpt-oss":
        gate, up = (x @ module.gate_up_proj[2].T).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
    else:
        h = module._apply_gate(x @ module.gate_up_proj[2] + module.gate_up_proj_bias[2])
    moment = seen[second, 2].moment
    assert moment is not None
    torch.testing.assert_close(moment.matrix(), (h.T @ h).detach(), rtol=1e-3, atol=1e-4)


def test_a_module_that_takes_no_numbers_of_experts_is_left_alone() -> None:
    calls: list[int] = []

    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x

    module = Plain()
    with every_token([(module, [0, 1])], lambda: calls.append(2), lambda: None):
        module(torch.ones(3, 4))
    assert calls == [1]


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_a_run_says_who_was_calibrated_on_all_tokens(method: str, models: Callable[..., Path], tmp_path: Path) -> None:
    reports = {}
    for everywhere in (False, True):
        recipe = Recipe.simple("w=int3/g32", method, all_experts=everywhere)
        text = TextOptions(data(20, 24, 1), samples=20, eval_text=data(2, 24, 2))
        reports[everywhere] = quantize_model(models("mixtral"), tmp_path / str(everywhere), recipe, text)
    without, report = reports[False], reports[True]
    experts = report["calibration"]["experts"]
    assert without["calibration"]["experts"]["on_all_tokens"] == 0
    assert report["recipe"]["all_experts"] is True and "all_experts" not in without["recipe"]
    # Half of 480 tokens go to each of 4 experts, in the mean: about 4 × 64, and less than 4 × 96, which is what the last matrices want.
    # What is sent to whom in later blocks is not the same in both runs.
    assert (
        experts["on_all_tokens"] == pytest.approx(without["calibration"]["thin"]["weights"], abs=4)
        and experts["on_all_tokens"] > 12
    )
    assert any("fewer than 4 calibration tokens" in n for n in without["calibration"]["warnings"])
    assert report["calibration"]["thin"]["weights"] == 0
    assert report["evaluation"]["kl_mean"] != without["evaluation"]["kl_mean"] > 0
