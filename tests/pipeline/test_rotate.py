"""The step `rotate`: the function stays the same, files load everywhere, and outliers do no harm any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.errors import DataError, SchemeError
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, Rule, TextOptions, make_plan, quantize_model
from arrondi.pipeline.journal import Journal
from arrondi.pipeline.restore import dequantize_model
from arrondi.pipeline.unit import rewrite
from arrondi.pipeline.work import Work
from arrondi.runtime.fuse import is_fused
from arrondi.sample import sample_path
from tests.pipeline.test_steps import close, logits
from tests.pipeline.toys import data
from tests.zoo import TWO, make, of_transformers, outputs, perturb, save

MORE: dict[str, dict[str, Any]] = {
    "Mistral": {**TWO, "sliding_window": 8},
    "Phi": {**TWO, "partial_rotary_factor": 0.5, "qk_layernorm": True},  # LayerNorm, attention and MLP side by side
    "StableLm": TWO,  # LayerNorms with biases before layers without
    "Nemotron": {**TWO, "head_dim": 16},  # LayerNorms that multiply by 1 + γ
    "Granite": {**TWO, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "Gemma": {**TWO, "head_dim": 16},  # 1 + γ, a scale of the embedding
    "GPTNeoX": TWO,  # queries, keys and values of a head side by side
}


def rotation(scheme: str = "w=int8/channel", method: str = "rtn", **options: Any) -> Recipe:
    return Recipe((Rule(None, "rotate", options=options), *Recipe.simple(scheme, method).rules))


@torch.no_grad()
def lost(folder: Path, **options: Any) -> float:
    """How far the step alone moves the outputs, at several numbers of windows and lengths."""
    source = OnDisk.open(folder)
    plan = make_plan(source, rotation(**options))
    instance = source.instance()
    instance.fill(list(instance.empty))
    batches = [data(2, 19, 1), data(1, 5, 2), data(3, 33, 3)]
    before = [outputs(instance.model, b) for b in batches]
    weights = {n: p.clone() for n, p in instance.model.named_parameters()}
    rewrite(Work(plan, instance, plan.tensors, ()))
    after = [outputs(instance.model, b) for b in batches]
    assert any(not torch.equal(weights[n], p) for n, p in instance.model.named_parameters() if n in weights)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "opt-projected", "phi3-fused-qkv", "mixtral", "deepseek-v3", "qwen3-next", "gpt-oss", "gemma2", "bert"])  # fmt: skip
def test_outputs_stay_the_same(name: str, models: Callable[..., Path]) -> None:
    assert lost(models(name)) < 1e-5


@pytest.mark.parametrize("name", MORE)
def test_outputs_of_more_models_stay_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForCausalLM")
    assert lost(save(perturb(cls(cls.config_class(**MORE[name]))).eval(), tmp_path)) < 1e-5


def test_a_width_without_a_hadamard_matrix(models: Callable[..., Path]) -> None:
    folder = models("llama", hidden_size=60, num_attention_heads=3, num_key_value_heads=1, head_dim=22)
    plan = make_plan(OnDisk.open(folder), rotation())
    assert any("no Hadamard matrix of order 22" in note and "its factor 11" in note for note in plan.notes)
    assert lost(folder) < 1e-5


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_files_load_everywhere_and_give_the_same(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Tied heads are stored apart; calibration follows what is rotated from the embedding on."""
    texts = TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2))
    report = quantize_model(models(name), tmp_path / "out", rotation("w=int8/g16", "gptq"), texts)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = data(2, 19, 3)
    expected = outputs(of_transformers(name, models(name)), ids)
    for found in (logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), ids), logits(arrondi.load(tmp_path / "out"), ids)):  # fmt: skip
        assert close(found, expected, 2e-2), "8 bits"
    assert compare_models(tmp_path / "out", models(name), data(2, 24, 2))["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3)  # fmt: skip
    assert report["evaluation"]["kl_mean"] < 1e-3
    stored, kept = (load_file(f / "model.safetensors") for f in (tmp_path / "out", models(name)))
    norms = [n for n in stored if "norm.weight" in n or ("ln_" in n and n.endswith("weight"))]
    assert norms and all(torch.equal(stored[n], torch.ones_like(stored[n])) for n in norms), "folded"
    assert not any(torch.equal(stored[n], kept[n]) for n in kept if n in stored and stored[n].ndim > 1), "turned"
    assert stored["lm_head.weight"].shape == next(t.shape for n, t in kept.items() if "embed" in n or "wte" in n)


def test_without_data_the_same_is_written(models: Callable[..., Path], tmp_path: Path) -> None:
    texts = TextOptions(data(3, 24, 1), samples=3, evaluate=False)
    for name, asked in {"with": texts, "without": None}.items():
        quantize_model(models("llama-tied"), tmp_path / name, rotation(), asked)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("with", "without"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_names_without_a_prefix(models: Callable[..., Path], tmp_path: Path) -> None:
    bare = shutil.copytree(models("gpt2"), tmp_path / "bare")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(bare / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    quantize_model(bare, tmp_path / "out", rotation("w=int8/g16"))
    ids = data(2, 19, 3)
    assert close(logits(arrondi.load(tmp_path / "out"), ids), outputs(of_transformers("gpt2", models("gpt2")), ids), 2e-2)  # fmt: skip


def test_the_seed_makes_another_rotation_of_the_same_model(models: Callable[..., Path]) -> None:
    assert lost(models("llama"), seed=7) < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_inputs_are_spread_while_the_model_runs(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Ours, unfused, dequantized: the same model; nobody else is said to read it."""
    recipe = rotation("w=int8/g16,a=int8/token", "gptq", online=True)
    texts = TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2))
    report = quantize_model(models(name), tmp_path / "out", recipe, texts)
    assert report["layout"] == "arrondi" and "int8/token/h" in report["notes"][0]
    spread = {row["name"] for row in report["layers"] if "/h" in row["scheme"]}
    ends = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
    assert spread == {row["name"] for row in report["layers"] if row["name"].endswith(ends)}
    ids = data(2, 19, 3)
    expected = outputs(of_transformers(name, models(name)), ids)
    loaded = arrondi.load(tmp_path / "out")
    found = logits(loaded, ids)
    assert is_fused(loaded) is (name == "llama"), "transforms are done inside fused blocks"
    assert close(found, expected, 4e-2) and close(logits(arrondi.load(tmp_path / "out", fuse=False), ids), found, 2e-2)
    assert compare_models(tmp_path / "out", models(name), data(2, 24, 2))["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3)  # fmt: skip
    dequantize_model(tmp_path / "out", tmp_path / "plain", "float32")
    assert close(outputs(of_transformers(name, tmp_path / "plain"), ids), expected, 4e-2)
    with pytest.raises(SchemeError, match="cannot say that activations become int8/token/h"):
        quantize_model(models(name), tmp_path / "no", Recipe((recipe.rules[0], Rule(recipe.rules[1].scheme, targets=("re:.*(o_proj|fc2)",)))), layout="compressed-tensors")  # fmt: skip


def test_a_scheme_alone_spreads_inputs(models: Callable[..., Path], tmp_path: Path) -> None:
    """Also after scales were moved, beside the original that gptaq follows, and without data."""
    ids = data(2, 19, 3)
    expected = outputs(of_transformers("llama", models("llama")), ids)
    texts = TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2))
    scheme = "w=int8/g16,a=int8/token/h16"
    smoothed = Recipe((*rotation(scheme).rules[:1], Rule(None, "smoothquant"), *Recipe.simple(scheme).rules))
    for name, recipe, asked in (
        ("alone", Recipe.simple(scheme), None),
        ("paired", Recipe.simple(scheme, "gptaq"), texts),
        ("smoothed", smoothed, texts),
        ("online", rotation("w=int8/g16,a=int8/token", "gptaq", online=True), texts),
    ):
        quantize_model(models("llama"), tmp_path / name, recipe, asked)
        assert close(logits(arrondi.load(tmp_path / name), ids), expected, 8e-2), name
        facts = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["tensors"]
        assert "/h" in facts["model.layers.0.mlp.down_proj.weight"]["scheme"]
    with pytest.raises(SchemeError, match="64 channels cannot be spread in blocks of 48"):
        quantize_model(
            models("llama"), tmp_path / "no", Recipe.simple("w=int8/g16,a=int8/token/h48", targets=("re:.*q_proj",))
        )


def test_a_file_with_blocks_that_cannot_be_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(models("llama"), out, rotation("w=int8/channel,a=int8/token", online=True))
    config = json.loads((out / "config.json").read_text())
    for facts in config["quantization_config"]["tensors"].values():
        facts["scheme"] = facts["scheme"].replace("/h96", "/h92")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(arrondi.ArrondiError, match="96 channels cannot be spread in blocks of 92"):
        arrondi.load(out)


def with_outliers(folder: Path, out: Path) -> Path:
    """The same function with single channels 30 times as large: behind norms, in values, in front of down projections."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith("input_layernorm.weight")]:
        block = name.removesuffix("input_layernorm.weight")
        pairs = [(name, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], 3)]
        pairs += [(f"{block}post_attention_layernorm.weight", ["mlp.gate_proj", "mlp.up_proj"], 5)]
        pairs += [(f"{block}mlp.up_proj.weight", ["mlp.down_proj"], 11)]
        for maker, readers, channel in pairs:
            tensors[maker][channel] *= 30
            for reader in readers:
                tensors[f"{block}{reader}.weight"][:, channel] /= 30
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_outliers_do_no_harm_any_more(tmp_path: Path) -> None:
    """W4A4 of the sample model, whose outliers are made: rotated weights help, spread inputs more."""
    model = with_outliers(Path(sample_path()), tmp_path / "model")
    texts = TextOptions(sample_path() / "heldout.txt", samples=8, seq_len=64, eval_samples=8)
    scheme = "w=int4/channel,a=int4/token"
    found = []
    for name, recipe in {"naive": Recipe.simple(scheme), "folded": rotation(scheme), "spread": rotation(scheme, online=True)}.items():  # fmt: skip
        found.append(quantize_model(model, tmp_path / name, recipe, texts)["evaluation"]["kl_mean"])
    naive, folded, spread = found
    assert folded < 0.8 * naive and spread < 0.5 * naive, found


def test_a_killed_run_ends_with_the_same_bytes(models: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    def call(out: Path) -> None:
        texts = TextOptions(data(3, 24, 1), samples=3, eval_text=data(2, 24, 2))
        quantize_model(models("llama-tied"), out, rotation("w=int4/g16,a=int8/token", "gptq", online=True), texts)

    call(tmp_path / "whole")
    record, steps = Journal.record, []

    def then_stop(self: Journal, step: str, data: Any, **claims: Any) -> None:
        record(self, step, data, **claims)
        steps.append(step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", then_stop)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                call(tmp_path / "stopped")
    assert steps[0] == "front" and steps[3] == "unit 2"
    call(tmp_path / "stopped")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_model_in_memory(name: str) -> None:
    ids, expected = data(2, 19, 3), outputs(make(name), data(2, 19, 3))
    for scheme, online in (("w=int8/g16", False), ("w=int8/g16,a=int8/token", True)):
        found = arrondi.quantize(make(name), recipe=rotation(scheme, "gptq", online=online), calibration=data(3, 24, 1))
        assert close(outputs(found, ids), expected, 3e-2)
        assert found.config.tie_word_embeddings is False


def test_what_cannot_be_rotated_is_said(models: Callable[..., Path]) -> None:
    plan = make_plan(OnDisk.open(models("gemma2")), rotation())
    (note,) = [n for n in plan.notes if n.startswith("rotate is not done")]
    assert "the hidden states between blocks stay as they are" in note
    assert "post_feedforward_layernorm.weight scales its channels before a sum" in note
    assert {s.tensor.rsplit(".", 2)[1] for s in plan.selected[0].sites} == {"v_proj", "o_proj"}, "values are"


def test_a_norm_that_multiplies_by_zero(tmp_path: Path) -> None:
    """Its bias can go nowhere, where the layers behind it have none."""
    torch.manual_seed(0)
    model = perturb(transformers.StableLmForCausalLM(transformers.StableLmConfig(**{**TWO, "num_hidden_layers": 1})))
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    with pytest.raises(DataError, match=r"input_layernorm.weight has a zero, so .*input_layernorm.bias cannot"):
        quantize_model(save(model.eval(), tmp_path / "model"), tmp_path / "out", rotation())


def test_heads_of_an_order_over_a_field_of_25(models: Callable[..., Path]) -> None:
    assert lost(models("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=52)) < 1e-5
