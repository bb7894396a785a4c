"""Moments of gradients: against a plain backward pass of transformers, and runs that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from arrondi.checkpoint import Checkpoint
from arrondi.model import Budget, OnDisk
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from arrondi.pipeline.fisher import LossKnown
from arrondi.pipeline.plan import make_plan
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data

IDS = data(4, 24, 5)


def known(path: Path, tmp_path: Path, recipe: Recipe) -> tuple[LossKnown, Any]:
    source = OnDisk(Checkpoint.open(path))
    plan = make_plan(source, recipe)
    loss = LossKnown(Budget(1 << 16), tmp_path)
    loss.learn(plan, source.units_of(source.instance()), list(IDS.split(2)), Budget(1 << 16), tmp_path)
    return loss, plan


def plain(path: Path, draws: int, rows: int) -> dict[str, torch.Tensor]:
    """Σ g gᵀ of every linear layer, by hooks on the model as transformers builds it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}
    for number, ids in enumerate([*IDS.split(rows)] * draws):
        kept: dict[str, torch.Tensor] = {}
        hooks: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):

                def keep(module: Any, args: Any, out: torch.Tensor, name: str = name, kept: Any = kept) -> None:
                    out.retain_grad()
                    kept[name] = out

                hooks.append(module.register_forward_hook(keep))
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(number))
        (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
        for name, out in kept.items():
            g = out.grad.flatten(0, -2)
            found[name] = found.get(name, 0) + g.T @ g
        for hook in hooks:
            hook.remove()
    return found


def test_they_are_those_of_a_plain_backward_pass(models: Callable[..., Path], tmp_path: Path) -> None:
    path = models("llama")
    loss, plan = known(path, tmp_path, Recipe.simple("w=int4/g16", "yaqa"))
    expected = plain(path, 2, 2)
    sites = [s for t in plan.quantized for s in t.sites if s.block is not None]
    with loss:
        assert len(sites) > 6 and not loss.why
        for site in sites:
            (found,) = loss.of([site])
            wanted = expected[site.modules[0]]
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())), site.name
        pair = loss.of(sites[:2])
        assert [len(p) for p in pair] == [s.shape[0] for s in sites[:2]]


@pytest.mark.parametrize(("steps", "why"), [({"rewrites": ("rotate",)}, "rewrites"), ({}, "")])
def test_rewrites_leave_them_out(models: Callable[..., Path], tmp_path: Path, steps: Any, why: str) -> None:
    loss, plan = known(models("llama"), tmp_path, Recipe.simple("w=int4/g16", "yaqa", **steps))
    with loss:
        assert loss.why.startswith(why) and bool(loss.why) is bool(why)
        sites = [s for t in plan.quantized for s in t.sites][:1]
        assert (loss.of(sites) is None) is bool(why)


def call(model: Path, out: Path) -> dict[str, Any]:
    texts = TextOptions(data(4, 24, 1), samples=4, eval_text=data(2, 24, 2))
    return quantize_model(model, out, Recipe.simple("w=int3/g16", "yaqa"), texts, shard_bytes=100_000)


def test_a_run_that_was_killed_ends_with_the_same_bytes(models: Callable[..., Path], tmp_path: Path) -> None:
    report = call(models("llama"), tmp_path / "whole")
    assert all(row["output_feedback"] for row in report["layers"])
    for step in ("unit 0", "unit 1"):
        with stopped_after(step):
            call(models("llama"), tmp_path / "stopped")
    call(models("llama"), tmp_path / "stopped")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3"])
def test_models_of_other_kinds(models: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """An encoder, one with transposed weights, one with norms after its layers: all follow gradients."""
    report = call(models(name), tmp_path / "out")
    inside = [row for row in report["layers"] if "why" not in row]
    assert inside and all(row["output_feedback"] for row in inside)
    assert all("nothing is known of its outputs" in row["why"] for row in report["layers"] if "why" in row)
