"""Rewrites and repairs: from a recipe through plan, run, kill and file to plain transformers."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.errors import DataError, SchemeError
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, Rule, TextOptions, make_plan, quantize_model
from arrondi.pipeline.step import Step
from arrondi.pipeline.texts import check_needed
from arrondi.rounding.rtn import rtn
from tests.pipeline.toys import TOYS, biases_come, call, data, recipe, toys_known

REPOSITORY = Path(__file__).parents[2]
STAGES = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
FOLDED = {"input_layernorm": STAGES[0], "post_attention_layernorm": STAGES[2]}


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with toys_known():
        yield


@pytest.fixture
def llama(models: Callable[..., Path]) -> Path:
    """Norms that are not all ones, so that folding into them shows."""
    folder = models("llama", rms_norm_eps=1.25e-6)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs_of(model: Any, name: str, batches: list[torch.Tensor]) -> torch.Tensor:
    """Every row that a module of the whole model reads."""
    rows: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, -2)))
    for ids in batches:
        model(input_ids=ids, use_cache=False)
    hook.remove()
    return torch.cat(rows)


@torch.no_grad()
def plain_loop(folder: Path, batches: list[torch.Tensor], strength: float = 0.5) -> Any:
    """The same steps on a whole model, written out: fold, round what reads the same, give it the mean that it lost."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scheme = recipe().rules[1].scheme
    assert scheme is not None
    for i in range(model.config.num_hidden_layers):
        block = f"model.layers.{i}"
        for norm, names in FOLDED.items():
            linears = [model.get_submodule(f"{block}.{n}") for n in names]
            x = inputs_of(model, f"{block}.{names[0]}", batches).abs().amax(0)
            w = torch.cat([m.weight for m in linears]).abs().amax(0)
            scale = (x**strength / w ** (1 - strength)).log2().round().exp2()
            model.get_submodule(f"{block}.{norm}").weight.div_(scale)
            for linear in linears:
                linear.weight.mul_(scale)
        for names in STAGES:
            mean = inputs_of(model, f"{block}.{names[0]}", batches).mean(0)
            for linear in (model.get_submodule(f"{block}.{n}") for n in names):
                rounded = rtn(linear.weight, scheme.weights, range="absmax").dequantize()
                linear.bias = torch.nn.Parameter((linear.weight - rounded) @ mean)
                linear.weight.copy_(rounded)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_both_toys_give_what_a_plain_loop_gives_in_transformers_and_in_load(llama: Path, tmp_path: Path) -> None:
    out, ids = tmp_path / "out", data(2, 24, 3)
    report = call(llama, out, "rtn")
    expected = logits(plain_loop(llama, [data(3, 24, 1)]), ids)
    original = logits(transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), ids)
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), ids)
    assert close(theirs, expected), "transformers"
    assert close(logits(arrondi.load(out), ids), expected), "arrondi"
    assert close(logits(arrondi.load(out, fuse=False), ids), expected), "arrondi without fused blocks"
    assert not close(expected, original, 1e-2), "something was done"
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is config["mlp_bias"] is True
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["model.layers.1.self_attn.k_proj.weight"]["steps"] == ["fold", "means"]
    assert rows["model.layers.1.mlp.down_proj.weight"]["steps"] == ["means"]
    assert any("fold is not done, it reads no norm" in note and "o_proj" in note for note in report["notes"])
    measured = compare_models(out, llama, data(2, 24, 2))
    assert measured["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-4)


@torch.no_grad()
def test_a_repair_repairs(llama: Path, tmp_path: Path) -> None:
    """The mean of a layer's output on the calibration data is what it was before rounding."""
    texts = TextOptions(data(3, 24, 1), evaluate=False)
    rounding = Recipe.simple("w=int3/channel").rules
    quantize_model(llama, tmp_path / "out", Recipe((*rounding, Rule(None, "means"))), texts)
    before = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"  # what it reads is the same in both
    rows = inputs_of(before, name, [data(3, 24, 1)])
    logits(after, data(1, 4, 1))  # transformers unpacks weights at the first pass
    means = [model.get_submodule(name)(rows).mean(0) for model in (before, after)]
    assert close(means[1], means[0], 1e-5)


def test_a_rewrite_needs_no_rounding_and_no_data(llama: Path, tmp_path: Path) -> None:
    """Where a rewritten matrix is kept it is written in its stored type; the model computes what it did."""

    def halve(work: Any, sites: Any) -> None:
        norm = f"{sites[0].tensor.rsplit('.', 3)[0]}.input_layernorm.weight"
        work.change(norm, work.tensor(norm) * 0.5)
        for site in sites:
            work.weight(site).mul_(2)

    half = Step("halve", "rewrite", apply=halve, scope="reads", declare=lambda source, sites: TOYS["fold"].declare(source, sites))  # fmt: skip
    with toys_known(half):
        rules = (
            Rule(None, "halve", targets=("re:.*q_proj",)),
            *Recipe.simple("w=int8/channel", targets=["re:.*o_proj"]).rules,
        )
        quantize_model(llama, tmp_path / "out", Recipe(rules))
        plain = Recipe(rules[1:])
        quantize_model(llama, tmp_path / "plain", plain)
    ids = data(2, 24, 3)
    found, expected = (logits(arrondi.load(tmp_path / n), ids) for n in ("out", "plain"))
    assert close(found, expected, 1e-5)
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as file,
        safe_open(llama / "model.safetensors", "pt") as old,
    ):
        for name in ("q_proj", "k_proj", "v_proj"):  # all that read the same, though one was picked
            key = f"model.layers.1.self_attn.{name}.weight"
            assert torch.equal(file.get_tensor(key), old.get_tensor(key) * 2)
        assert torch.equal(file.get_tensor("model.layers.1.mlp.up_proj.weight"), old.get_tensor("model.layers.1.mlp.up_proj.weight"))  # fmt: skip


def test_names_without_a_prefix(llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in llama.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tensors = {n.removeprefix("model."): t for n, t in load_file(llama / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    call(llama, tmp_path / "prefixed")
    report = call(bare, tmp_path / "out")
    ids = data(2, 24, 3)
    expected = logits(arrondi.load(tmp_path / "prefixed"), ids)
    assert close(logits(arrondi.load(tmp_path / "out"), ids), expected, 1e-6)
    assert close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), ids), expected)  # fmt: skip
    assert compare_models(tmp_path / "out", bare, data(2, 24, 2))["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-4)  # fmt: skip


def test_a_killed_run_ends_with_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipeline.toys", str(llama), str(tmp_path), "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found["once"]) == 6
    for run in (*found["once"], found["often"]):
        assert run["finished"] and run["same"], run
    assert all(run["kills"] == 1 for run in found["once"]) and found["often"]["kills"] > 1
    assert any(run["changes"] < found["total"] - 10 for run in found["once"]), "finished units are not done again"


@torch.no_grad()
def test_statistics_of_both_models_are_those_of_a_plain_loop(llama: Path, tmp_path: Path) -> None:
    """Σ x xᵀ, Σ f fᵀ, Σ x fᵀ and the rest, where x are inputs after everything before was rounded."""
    found: dict[str, Any] = {}

    def note(work: Any, sites: Any) -> None:
        found[sites[0].name] = copy.deepcopy(work.seen[sites[0].name])

    needs = frozenset({"moment", "mean", "range", "absmax", "sample", "float moment", "cross moment"})
    with toys_known(Step("note", "repair", apply=note, needs=needs)):
        rules = (*Recipe.simple("w=int3/channel").rules, Rule(None, "note", targets=("re:.*1.mlp.(up|down)_proj",)))
        batches = [data(100, 30, 1)[:70], data(100, 30, 1)[70:]]  # more than is sent through at once
        quantize_model(llama, tmp_path / "out", Recipe(rules), TextOptions(torch.cat(batches), evaluate=False))
    before = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for layer in ("up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{layer}"
        x, f = (inputs_of(m, name, [torch.cat(batches)]) for m in (after, before))
        seen = found[f"{name}.weight"]
        assert seen.tokens == len(x) == 3000
        assert close(seen.moment.matrix(), x.T @ x) and close(seen.float_moment.matrix(), f.T @ f)
        assert close(seen.cross_moment, x.T @ f) and not close(seen.cross_moment, x.T @ x, 1e-2)
        assert close(seen.mean, x.mean(0)) and close(seen.absmax, x.abs().amax(0))
        assert seen.low == pytest.approx(float(x.min()), rel=1e-4) and seen.high == pytest.approx(float(x.max()), rel=1e-4)  # fmt: skip
        assert len(seen.sample.rows()) == 512
        for row in seen.sample.rows()[::32]:
            assert close(x[(x - row).abs().amax(1).argmin()], row), "a row of the inputs"


def test_experts_that_the_original_does_not_choose_have_no_pairs(models: Callable[..., Path], tmp_path: Path) -> None:
    pairs: dict[str, bool] = {}

    def note(work: Any, sites: Any) -> None:
        for site in sites:
            seen = work.seen.get(site.name)
            if seen is not None:
                pairs[site.name] = seen.paired
                assert seen.paired is (seen.cross_moment is not None)

    with toys_known(Step("note", "repair", apply=note, needs=frozenset({"cross moment"}))):
        rules = (*Recipe.simple("w=int2/channel").rules, Rule(None, "note"))
        quantize_model(
            models("qwen3-moe"), tmp_path / "out", Recipe(rules), TextOptions(data(8, 24, 1), evaluate=False)
        )
    assert all(pairs[n] for n in pairs if "experts" not in n)
    assert not all(pairs[n] for n in pairs if "experts" in n), "at 2 bits some token goes elsewhere"


def test_a_rule_names_what_stands_in_for_its_method(models: Callable[..., Path], tmp_path: Path) -> None:
    """Experts that no token reaches."""
    model, texts = models("qwen3-moe", num_local_experts=48), TextOptions(data(2, 12, 1), evaluate=False)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"rules": [{"scheme": "w=int4/channel", "method": "gptq", "fallback": "hqq"}]}))
    for name, asked in {"rtn": Recipe.simple("w=int4/channel", "gptq"), "hqq": Recipe.read(path)}.items():
        report = quantize_model(model, tmp_path / name, asked, texts)
        blind = [row for row in report["layers"] if row["calibration_tokens"] == 0]
        assert blind and {row["method"] for row in blind} == {name}
        assert {row["why"] for row in blind} == {"no token reached it"}
        assert all(row["method"] == "gptq" for row in report["layers"] if row["calibration_tokens"])
    assert report["recipe"]["rules"][0]["fallback"] == "hqq"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"method": "rtn", "scheme": "W4A16", "fallback": "hqq"}, "rtn looks at no inputs, so it needs no fallback"),
        (
            {"method": "gptq", "scheme": "W4A16", "fallback": "gptq"},
            "Name one of these as the fallback: any4, autoround, easyquant, fima-q, gobo, hqq, kmeans, liu, llm-int8, ptq4vit, rtn",
        ),
        ({"method": "gptq", "scheme": "W4A16", "fallback": "means"}, "Name one of these as the fallback"),
        ({"method": "gptq", "scheme": "W4A16", "fallback": "awqq"}, "Unknown method 'awqq'"),
        ({"method": "fold", "scheme": "W4A16"}, "fold rounds nothing"),
        (
            {"method": "fold", "options": {"strenght": 1.0}},
            "Unknown option of fold 'strenght'. Did you mean 'strength'",
        ),
        ({"method": "fold", "options": {"strength": "much"}}, "takes a number such as 0.5, got 'much'"),
        ({"method": "fold", "targets": "re:.*down"}, "Nothing would be quantized"),
    ],
)
def test_a_wrong_rule_is_refused(rule: dict[str, Any], said: str, llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"rules": [rule]}))
    with pytest.raises(arrondi.ArrondiError) as raised:
        quantize_model(llama, tmp_path / "out", Recipe.read(path), TextOptions(data(3, 24, 1)))
    assert said in str(raised.value)


def test_a_step_names_only_what_calibration_collects() -> None:
    with pytest.raises(SchemeError, match="need of the step curvature: 'gradient'"):
        Step("curvature", "repair", apply=lambda work, sites: None, needs=frozenset({"gradient"}))
    with pytest.raises(SchemeError, match="`apply` of all others"):
        Step("nothing", "rewrite")


def test_the_plan_says_what_steps_do(llama: Path) -> None:
    plan = make_plan(OnDisk.open(llama), recipe())
    document = plan.to_dict()
    fold, means = document["steps"]
    assert fold["step"] == "fold" and len(fold["sites"]) == 15 and len(means["sites"]) == 21
    assert sorted(document["changed"]) == [f"model.layers.{i}.{n}.weight" for i in range(3) for n in FOLDED]
    biases = {a["name"]: a["shape"] for a in document["added"]}
    assert len(biases) == 21 and biases["model.layers.2.mlp.down_proj.bias"] == [64]
    written = [name for specs in plan.shards(1 << 30).files.values() for name, _, _ in specs]
    assert set(biases) <= set(written) and len(written) == len(set(written))


def test_what_could_not_be_loaded_again_is_a_problem(llama: Path) -> None:
    rounding = Recipe.simple("W4A16").rules
    few = make_plan(OnDisk.open(llama), Recipe((*rounding, Rule(None, "means", targets=("re:.*q_proj",)))))
    assert any("attention_bias, mlp_bias" in p and "k_proj.bias, which no step adds" in p for p in few.problems)
    silent = replace(TOYS["means"], name="silent", declare=lambda source, sites: replace(biases_come(source, sites), config={}))  # fmt: skip
    with toys_known(silent):
        unread = make_plan(OnDisk.open(llama), Recipe((*rounding, Rule(None, "silent"))))
    assert any("which the model does not read" in p for p in unread.problems)


@pytest.mark.parametrize("scope", ["site", "reads", "unit", "model"])
def test_what_belongs_together_is_refused_together(scope: Any, llama: Path) -> None:
    refuse = lambda site, scheme: "of a whim" if site.tensor.endswith("1.self_attn.v_proj.weight") else None  # noqa: E731
    with toys_known(Step("moody", "rewrite", apply=lambda work, sites: None, scope=scope, refuse=refuse)):
        rules = (*Recipe.simple("W4A16").rules, Rule(None, "moody", targets=("re:.*self_attn",)))
        (one,) = make_plan(OnDisk.open(llama), Recipe(rules)).selected
    left = {"site": 11, "reads": 9, "unit": 8, "model": 0}[scope]
    assert len(one.sites) == left and sum(len(names) for names in one.refusals.values()) == 12 - left


@torch.no_grad()
def test_steps_work_on_a_module_in_memory() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(24, 32, bias=False), torch.nn.GELU(), torch.nn.Linear(32, 8, bias=False)
    )
    batches = [torch.randn(40, 24) + 1 for _ in range(2)]
    before = [module(b) for b in batches]
    rules = (*Recipe.simple("w=int3/channel").rules, Rule(None, "means"))
    quantized = arrondi.quantize(module, recipe=Recipe(rules), calibration=batches)
    means = [torch.cat(outputs).mean(0) for outputs in (before, [quantized(b) for b in batches])]
    assert all(quantized[i].bias is not None for i in (0, 2))
    # The first layer's mean is kept, the second one's is that of its own inputs, which rounding has moved.
    for i in (0, 2):
        quantized[i].bias = None
    without = torch.cat([quantized(b) for b in batches]).mean(0)
    assert float((means[1] - means[0]).norm()) < 0.5 * float((without - means[0]).norm())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rewrites": ["gptq"]}, "Unknown rewrite 'gptq'. It is a method."),
        ({"repairs": ["smoothquant"]}, "Unknown repair 'smoothquant'. It is a rewrite."),
        ({"rewrites": ["rotate", "rotate"]}, "The rewrite rotate is named twice."),
        ({"method": "tune"}, "tune is a repair and rounds nothing"),
        (
            {"rewrites": ["smoothquant"], "options": {"alpha": 0.7}},
            "Another step has it: smoothquant.alpha or scale-search.alpha or hessian-search.alpha or similarity-search.alpha.",
        ),
    ],
)
def test_a_step_in_the_wrong_place_is_told_where_it_belongs(words: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(said)):
        Recipe.simple("W4A16", **words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "awq"}, "Method 'awq' needs calibration text"),
        ({"rewrites": ["smoothquant"]}, "The rewrite 'smoothquant' needs calibration text"),
    ],
)
def test_what_needs_text_is_called_by_the_name_that_was_given(words: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        check_needed(TextOptions(None), Recipe.simple("W4A16", **words))
