"""Scales that move into what makes an activation: the model computes what it did, and rounding hurts it less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import arrondi
from arrondi.errors import SchemeError
from arrondi.measure.compare import compare_models
from arrondi.model import InMemory, Inputs, OnDisk, settle
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.pipeline.folding import fold
from arrondi.pipeline.module import quantize_module
from arrondi.pipeline.unit import rewrite
from arrondi.pipeline.work import Work
from arrondi.sample import sample_path
from tests.zoo import ARCHITECTURES, ZOO, make, of_transformers, outputs

REWRITES = ("smoothquant", "awq-scale", "equalize", "sinq")
OTHERS = sorted(set(ZOO) - {"t5", "whisper", "vit", "clip", "dinov2-swiglu"})
"""What is called with token ids alone."""


def data(count: int, length: int, seed: int) -> torch.Tensor:
    """Token ids (count, length)."""
    return torch.randint(0, 2048, (count, length), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.no_grad()
def rewritten(model: Any, names: list[str], scheme: str = "w=int4/g16", **options: Any) -> Work:
    """A model in memory, rewritten in place and not rounded."""
    source, batches = InMemory(model), [data(2, 11, 1), data(2, 24, 2)]
    source.learn(Inputs.of(batches[0]))
    settle(source, Inputs.of(batches[0]))
    plan = make_plan(source, Recipe.simple(scheme, "rtn", rewrites=names, options=options))
    work = Work(plan, source.instance(), plan.tensors, [lambda ids=ids: model(input_ids=ids) for ids in batches])
    rewrite(work)
    return work


# ── the function stays the same ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    [
        *("llama-tied", "gemma2", "gpt2", "opt", "phi3-fused-qkv", "qwen2-moe"),
        *(pytest.param(n, marks=pytest.mark.full) for n in OTHERS),
    ],
)
def test_a_rewritten_model_computes_what_it_did(name: str) -> None:
    """Grouped queries, 1 + γ, LayerNorms with biases, Conv1D, fused matrices, experts and their routers; all rewrites in turn."""
    model = make(name)
    probes = [data(2, 7, 5), data(1, 30, 6)]
    before = [outputs(model, ids) for ids in probes]
    kept = {n: p.clone() for n, p in model.named_parameters()}
    work = rewritten(model, list(REWRITES))
    joints = work.plan.selected[0].joints
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    assert {s.param for joint in joints for s in joint.readers} <= changed
    assert {joint.producer.param for joint in joints} <= changed
    for ids, expected in zip(probes, before, strict=True):
        # Of some unusual models the residual stream is so large that float32 itself has no more digits.
        assert close(outputs(model, ids), expected, 1e-5 if name in ARCHITECTURES else 5e-5), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norms_count_as_they_are_stored(dtype: torch.dtype, models: Callable[..., Path]) -> None:
    """What a 16-bit norm loses when it is divided, the readers' columns get."""
    source = OnDisk.open(models("gemma2", dtype))
    instance, ids = source.instance(), data(2, 20, 3)
    instance.fill(source.names.params)
    expected = outputs(instance.model, ids)
    plan = make_plan(source, Recipe.simple("w=int4/g16", "rtn", rewrites=["sinq"]))
    joints = [joint for joint in plan.selected[0].joints if joint.norm]
    work = Work(plan, instance, plan.tensors, ())
    before = work.tensor(joints[0].norm).clone()
    for joint in joints:
        fold(work, joint, torch.rand(joint.count, generator=torch.Generator().manual_seed(1)) * 3 + 0.2)
    norm = work.tensor(joints[0].norm)
    assert not torch.equal(norm, before) and torch.equal(norm, norm.to(dtype).float())
    assert set(work.changed) == {joint.norm for joint in joints} == set(plan.declared.changed)
    assert close(outputs(instance.model, ids), expected, 1e-5)


def test_a_channel_that_the_stored_type_cannot_hold_stays(models: Callable[..., Path]) -> None:
    source = OnDisk.open(models("llama", torch.float16))
    instance = source.instance()
    instance.fill(source.names.params)
    plan = make_plan(source, Recipe.simple("w=int4/g16", "rtn", rewrites=["sinq"]))
    joint = next(joint for joint in plan.selected[0].joints if joint.norm)
    work = Work(plan, instance, plan.tensors, ())
    norm, weight = work.tensor(joint.norm).clone(), work.weight(joint.readers[0]).clone()
    scale = torch.ones(joint.count)
    scale[:3] = torch.tensor([1e-9, 1e9, 2.0])
    fold(work, joint, scale)
    assert torch.equal(work.tensor(joint.norm)[:2], norm[:2]) and bool(torch.isfinite(work.tensor(joint.norm)).all())
    assert torch.equal(work.weight(joint.readers[0])[:, :2], weight[:, :2])
    assert close(work.weight(joint.readers[0])[:, 2], 2 * weight[:, 2], 1e-3)


# ── from the command to the file ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "scheme", "rewrites"),
    [
        ("llama", "w=int4/g16", ["awq-scale"]),
        ("qwen3-moe", "w=int8/channel,a=int8/token", ["smoothquant", "equalize"]),
        ("gpt2", "w=int8/channel,a=int8/tensor/static", ["smoothquant"]),
        (
            "gpt2",
            "w=lut3/channel",
            ["awq-scale"],
        ),  # learned values, by which no scale can be judged, of a weight stored (in, out)
    ],
)
def test_files_load_as_what_was_measured(
    name: str, scheme: str, rewrites: list[str], models: Callable[..., Path], tmp_path: Path
) -> None:
    folder, ids = models(name), data(2, 24, 3)
    method = "any4" if "lut" in scheme else "rtn"
    recipe = Recipe.simple(scheme, method, rewrites=rewrites, options={"smoothquant.search": True} if "smoothquant" in rewrites else {})  # fmt: skip
    report = quantize_model(folder, tmp_path / "out", recipe, TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2)))  # fmt: skip
    measured = compare_models(tmp_path / "out", folder, data(2, 24, 2))
    assert measured["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3)
    assert any(row.get("steps") == rewrites for row in report["layers"])
    if name == "llama":
        theirs = outputs(of_transformers(name, tmp_path / "out"), ids)
        assert close(outputs(arrondi.load(tmp_path / "out"), ids), theirs, 1e-4)
        norm = "model.layers.0.input_layernorm.weight"
        kept, new = (load_file(f / "model.safetensors")[norm] for f in (folder, tmp_path / "out"))
        assert not torch.equal(kept, new)


def test_data_is_not_needed_where_weights_alone_say_it(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.simple("w=int8/channel", "rtn", rewrites=["equalize", "sinq"])
    quantize_model(models("opt"), tmp_path / "out", recipe)
    ids = data(2, 24, 3)
    found, expected = outputs(arrondi.load(tmp_path / "out"), ids), outputs(of_transformers("opt", models("opt")), ids)
    assert close(found, expected, 0.03)


class Net(nn.Module):
    """norm → linear → ReLU → linear, with a path of its own for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return found


@torch.no_grad()
def test_a_module_in_memory() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = Net(), torch.randn(64, 32)
        net.norm.weight[:3] *= 15
        net.norm.bias.add_(torch.randn(32))
    expected, errors = net(x), []
    for rewrites in ([], ["awq-scale"]):
        copied = Net()
        copied.load_state_dict(net.state_dict())
        recipe = Recipe.simple("w=uint4/channel/asym", "rtn", rewrites=rewrites)
        quantize_module(copied, recipe, [x])
        errors.append(float((copied(x) - expected).norm() / expected.norm()))
        assert torch.equal(copied.norm.weight, net.norm.weight) is not bool(rewrites)
    assert errors[1] < 0.95 * errors[0] < 0.1


# ── what cannot be done ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("smoothquant", {"alpha": 1.5}, "alpha of smoothquant takes a number from 0 to 1"),
        ("awq-scale", {"grid": 1}, "grid of awq-scale takes a whole number from 2"),
        ("awq-scale", {"alpha": 0.5}, "option of awq-scale"),
        ("sinq", {"sweeps": 0}, "sweeps of sinq takes a whole number from 1"),
    ],
)
def test_bad_options_are_one_sentence(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        Recipe.simple("W4A16", rewrites=[name], options={f"{name}.{k}": v for k, v in options.items()})


def test_sites_without_a_fold_are_named_with_the_reason(models: Callable[..., Path]) -> None:
    plan = make_plan(OnDisk.open(models("gpt2")), Recipe.simple("w=int4/g16", "awq"))
    (note,) = [n for n in plan.notes if "layers" in n or "transformer.h.0.mlp.c_proj" in n]
    assert note.startswith("awq-scale is not done") and "c_proj.weight" in note
    kept = make_plan(OnDisk.open(models("llama")), Recipe.simple("w=int4/g16", "awq", targets=["re:.*o_proj"]))
    assert [s.name for s in kept.selected[0].sites][:2] == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    ]


# ── and what it is good for ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with four channels of every norm forty times as large, and the same function."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("hot")
    model = AutoModelForCausalLM.from_pretrained(sample_path(), dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[5, 50, 77, 100]] *= 40
                for reader in readers:
                    reader.weight[:, [5, 50, 77, 100]] /= 40
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(sample_path()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("scheme", "rewrite_", "gain"), [("W8A8", "smoothquant", 4), ("W4A16", "awq-scale", 2)])
def test_outliers_are_moved_away(scheme: str, rewrite_: str, gain: float, hot: Path, tmp_path: Path) -> None:
    text, found = sample_path() / "heldout.txt", []
    for rewrites in ([], [rewrite_]):
        recipe = Recipe.simple(scheme, "rtn", rewrites=rewrites)
        options = TextOptions(text, samples=4, seq_len=64, eval_samples=8)
        report = quantize_model(hot, tmp_path / f"{len(rewrites)}", recipe, options)
        found.append(report["evaluation"]["kl_mean"])
    assert found[1] * gain < found[0], found
