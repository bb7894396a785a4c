"""What becomes of which weight: rules, selectors, and everything that a recipe may get wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.errors import ArrondiError, DataError, FileFormatError, SchemeError
from arrondi.formats import parse_scheme
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.pipeline import Plan, Recipe, Rule, TextOptions, check, dequantize_model, make_plan, quantize_model
from arrondi.pipeline.recipe import matches
from tests.zoo import of_transformers, outputs

W4 = Recipe.simple("W4A16", group_size=32)


def planned(folder: Path, recipe: Recipe, **options: Any) -> Plan:
    return make_plan(OnDisk.open(folder), recipe, **options)


def refusal(plan: Plan) -> str:
    with pytest.raises(SchemeError) as caught:
        check(plan)
    return str(caught.value)


# ── rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_later_rule_wins_and_none_leaves_alone(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    rules = (
        Rule(parse_scheme("W4A16").with_group_size(32), "gptq"),
        Rule(parse_scheme("W8A16").with_group_size(32), "rtn", ("re:.*down_proj",)),
        Rule(parse_scheme("W3A16_ASYM").with_group_size(16), "hqq", ("model.layers.1.self_attn.q_proj",)),
        Rule(None, targets=(r"re:model\.layers\.2\.",)),
    )
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    report = quantize_model(models("llama"), tmp_path / "out", Recipe(rules), options)
    found = {r["name"].removeprefix("model.layers."): (r["scheme"], r["method"]) for r in report["layers"]}
    assert found["0.mlp.up_proj.weight"] == ("w=int4/g32", "gptq")
    assert found["1.mlp.down_proj.weight"] == ("w=int8/g32", "rtn")
    assert found["1.self_attn.q_proj.weight"] == ("w=int3/g16/asym", "hqq")
    kept = {k["name"]: k["reason"] for k in report["kept"]}
    assert kept["model.layers.2.mlp.up_proj.weight"] == "left alone by a rule"
    assert len(found) == 14
    # And the file says the same as the report.
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert {n.removeprefix("model.layers."): str(p.scheme) for n, p in checkpoint.placed.items()} == {
        n: s for n, (s, _) in found.items()
    }
    plain = tmp_path / "plain"
    dequantize_model(tmp_path / "out", plain, "float32")
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(plain).eval()(input_ids=ids).logits
        torch.testing.assert_close(arrondi.load(tmp_path / "out")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


SELECTORS: dict[str, tuple[str, int]] = {
    "class": ("Linear", 21),
    "module": ("model.layers.0.mlp.up_proj", 1),
    "tensor": ("model.layers.0.mlp.up_proj.weight", 1),
    "pattern": (r"re:.*\.mlp\.(up|gate)_proj", 6),
    "pattern from the start": (r"re:mlp", 0),
    "parent class": ("LlamaMLP", 0),
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_a_selector_picks(kind: str, models: Callable[..., Path]) -> None:
    selector, count = SELECTORS[kind]
    plan = planned(models("llama"), Recipe.simple("W4A16", group_size=32, targets=[selector]))
    assert len(plan.quantized) == count
    assert bool(plan.problems) == (count == 0)


def test_ignore_wins_over_every_rule(models: Callable[..., Path]) -> None:
    plan = planned(models("llama"), Recipe.simple("W4A16", group_size=32, ignore=["re:.*o_proj", "lm_head"]))
    reasons = {t.name: t.reason for t in plan.tensors}
    assert reasons["model.layers.0.self_attn.o_proj.weight"] == "ignored by 're:.*o_proj'"
    assert reasons["lm_head.weight"] == "ignored by 'lm_head'"
    assert len(plan.quantized) == 18


@pytest.mark.parametrize("method", [pytest.param("rtn", marks=pytest.mark.full), "gptq"])
def test_the_head_is_quantized_when_asked(method: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    recipe = Recipe.simple("W4A16", method, group_size=32, ignore=[])
    options = TextOptions(text, samples=4, seq_len=24, eval_samples=2)
    report = quantize_model(source, out, recipe, options)
    row = next(r for r in report["layers"] if r["name"] == "lm_head.weight")
    assert row["calibration_tokens"] == 4 * 24
    if method == "gptq":  # calibrated on the rounded blocks' output
        assert 0 < row["output_error"] < 0.02
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(input_ids=ids).logits
        ours = arrondi.load(out)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    measured = compare_models(out, source, text, seq_len=24)
    assert measured["kl_mean"] > 0


def test_tied_embeddings_are_kept_unless_they_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize_model(models("llama-tied"), tmp_path / "out", Recipe.simple("W4A16", group_size=32, ignore=[]))
    kept = {k["name"]: (k["status"], k["reason"]) for k in report["kept"]}
    status, reason = kept["model.embed_tokens.weight"]
    assert status == "kept by rule"
    assert "looked up" in reason and "tied to" in reason
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "out").names
    model = arrondi.load(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# ── selectors that pick nothing ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe.simple("W4A16", targets=["model.layer.0.mlp.up_proj"]), ["--targets", "'model.layer.0.mlp.up_proj'", "Did you mean 'model.layers.0.mlp.up_proj'?"]),
        (Recipe.simple("W4A16", group_size=32, targets=["Linear", "Conv1D"]), ["--targets", "'Conv1D'"]),
        (Recipe.simple("W4A16", group_size=32, ignore=["lm_hed"]), ["--ignore", "'lm_hed'", "Did you mean 'lm_head'?"]),
        (Recipe.simple("W4A16", group_size=32, ignore=["re:.*gate$"]), ["--ignore", "'re:.*gate$'"]),
    ],
    ids=["target", "class", "ignore", "pattern"],
)  # fmt: skip
def test_a_selector_that_matches_nothing_is_an_error_with_the_nearest_name(
    recipe: Recipe, words: list[str], models: Callable[..., Path]
) -> None:
    message = refusal(planned(models("llama"), recipe))
    assert all(w in message for w in [*words, "matches nothing"]), message


def test_an_ignore_that_only_repeats_what_is_kept_anyway_is_no_error(models: Callable[..., Path]) -> None:
    check(
        planned(
            models("llama"), Recipe.simple("W4A16", group_size=32, ignore=["lm_head", "model.norm", "LlamaRMSNorm"])
        )
    )


def test_a_pattern_that_is_none_is_refused(models: Callable[..., Path]) -> None:
    with pytest.raises(SchemeError, match=r"'re:\(' is not a regular expression"):
        planned(models("llama"), Recipe.simple("W4A16", targets=["re:("]))


def test_matches_reads_selectors_as_compressed_tensors_does() -> None:
    from compressed_tensors.utils.match import match_name

    names = ["model.layers.0.mlp.up_proj", "lm_head"]
    for selector in ("lm_head", "re:lm_head", "re:.*proj", "re:mlp", "re:model", "lm", "Linear"):
        for name in names:
            assert matches(selector, [name], []) == match_name(name, selector), (selector, name)
    assert matches("Linear", [], ["Linear"]) and not matches("Linear", [], ["linear"])


# ── shapes that do not fit ────────────────────────────────────────────────────────────────────────────────────────────

ODD = {"hidden_size": 64, "intermediate_size": 172}
"""A width of a real model: 172 = 4 · 43."""


@pytest.mark.parametrize(
    ("scheme", "up", "down"),
    [
        (
            "W4A16",
            "w=int4/channel",
            "w=int4/channel",
        ),  # 128 divides neither 64 nor 172, whose divisors are 43, 86 and itself
        ("w=int4/g32", "w=int4/g32", "w=int4/channel"),
        ("w=int8/g86", "w=int8/channel", "w=int8/g86"),
        ("w=int8/g43/asym", "w=int8/g32/asym", "w=int8/g43/asym"),
        ("W8A8", "w=int8/channel,a=int8/token", "w=int8/channel,a=int8/token"),
    ],
)
def test_a_layer_that_does_not_fit_takes_the_nearest_group_that_does(
    scheme: str, up: str, down: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = models("llama", num_hidden_layers=2, **ODD), tmp_path / "out"
    options = TextOptions(text, samples=4, seq_len=33, eval_text=text, eval_samples=2)
    report = quantize_model(source, out, Recipe.simple(scheme, "gptq"), options)
    assert report["layout"] == "compressed-tensors" and report["counts"]["quantized"] == 14
    rows = {r["name"]: r["scheme"] for r in report["layers"]}
    assert {s for n, s in rows.items() if "down_proj" not in n} == {up}
    assert {s for n, s in rows.items() if "down_proj" in n} == {down}
    # The plan says it beforehand and the report afterwards, with the layers that it concerns.
    plan = planned(source, Recipe.simple(scheme, "gptq"))
    noted = {n for n, s in rows.items() if s != str(parse_scheme(scheme))}
    assert plan.notes == report["notes"] and bool(plan.notes) == bool(noted)
    assert all(("instead" in t.reason) == (t.name in noted) for t in plan.quantized)
    # And transformers, the file and the numbers of the report are one model.
    ids = torch.arange(40)[None]
    reader = next(r for r in report["readers"] if r["reader"].startswith("transformers"))
    if reader["ok"]:
        ours, theirs = outputs(arrondi.load(out), ids), outputs(of_transformers("llama", out), ids)
        error = 0.05 if "a=" in up else 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=error * float(theirs.abs().max()))
    else:
        assert scheme == "w=int8/g43/asym" and "cannot read this mix" in reader["sentence"]
        with pytest.raises(RuntimeError):
            of_transformers("llama", out)
    assert report["evaluation"]["kl_mean"] == compare_models(out, source, text, seq_len=33, samples=2)["kl_mean"]


def test_a_layer_whose_group_is_fixed_is_kept_with_the_reason(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("llama", num_hidden_layers=2, **ODD)
    report = quantize_model(source, tmp_path / "out", Recipe.simple("MXFP4A16"), layout="compressed-tensors")
    kept = {k["name"]: k["reason"] for k in report["kept"] if k["status"] == "kept because impossible"}
    assert kept and all("divide" in r and "172" in r for r in kept.values()), kept
    assert any("down_proj" in n for n in kept) and any("is kept" in n for n in report["notes"])


def test_misfits_are_kept_when_asked_and_named(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.simple("W4A16", group_size=64)  # fits 64 columns, not the 96 of down_proj
    report = quantize_model(models("llama"), tmp_path / "out", recipe, keep_misfits=True)
    kept = {k["name"]: k for k in report["kept"] if k["status"] == "kept because impossible"}
    assert set(kept) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert "64 does not divide" in kept["model.layers.0.mlp.down_proj.weight"]["reason"]
    assert report["counts"]["quantized"] == 18
    ids = torch.arange(9)[None]
    theirs = outputs(of_transformers("llama", tmp_path / "out"), ids)
    torch.testing.assert_close(outputs(arrondi.load(tmp_path / "out"), ids), theirs, rtol=1e-4, atol=1e-4)


def test_misfits_that_are_all_there_is_are_a_problem_with_its_reason(models: Callable[..., Path]) -> None:
    plan = planned(models("llama"), Recipe.simple("W4A16"), keep_misfits=True)
    assert re.search(
        r"Nothing would be quantized\. .*_proj\.weight: .*128 does not divide.*--keep-misfits", refusal(plan)
    )


# ── numbers that are none ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("method", ["rtn", "rtn with text", "hqq", "gptq"])
def test_weights_that_are_no_numbers_are_named(
    method: str, value: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = models("llama", num_hidden_layers=2)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float(value)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with_text = method in ("rtn with text", "gptq")
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=2) if with_text else None
    recipe = Recipe.simple("W4A16", method.partition(" ")[0], group_size=32)
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinity"):
        quantize_model(broken, tmp_path / "out", recipe, options)
    assert not (tmp_path / "out" / "config.json").exists()
    repaired = Recipe.simple("W4A16", group_size=32, ignore=["lm_head", "model.layers.1.mlp.up_proj"])
    report = quantize_model(broken, tmp_path / "out", repaired)
    assert report["counts"]["quantized"] == 13


# ── layouts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_most_widely_read_layout_that_holds_everything_is_taken(models: Callable[..., Path]) -> None:
    mixed = Recipe(
        (Rule(parse_scheme("W8A16").with_group_size(32)), Rule(parse_scheme("w=nf4/g32"), targets=("re:.*down_proj",)))
    )
    assert planned(models("llama"), W4).layout.name == "compressed-tensors"
    assert planned(models("llama"), mixed).layout.name == "arrondi"
    assert planned(models("llama"), W4, layout="arrondi").layout.name == "arrondi"


def test_a_layout_that_cannot_hold_the_scheme_says_so(models: Callable[..., Path]) -> None:
    message = refusal(planned(models("llama"), Recipe.simple("w=nf4/g32"), layout="compressed-tensors"))
    assert "compressed-tensors has no format for w=nf4/g32" in message and "--to arrondi" in message
    with pytest.raises(SchemeError, match="Unknown layout 'marlin'"):
        planned(models("llama"), W4, layout="marlin")


# ── what cannot start ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    message = refusal(planned(tmp_path / "resnet", Recipe.simple("W8A16")))
    assert "Nothing would be quantized" in message and "no linear layer" in message


def test_a_quantized_model_is_not_quantized_again(models: Callable[..., Path], tmp_path: Path) -> None:
    quantize_model(models("llama"), tmp_path / "out", W4)
    with pytest.raises(SchemeError, match=r"already quantized.*arrondi dequantize"):
        quantize_model(tmp_path / "out", tmp_path / "again", W4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recipe.simple("W4A61"), ["'W4A61'", "Did you mean 'W4A16'?"]),
        (lambda: Recipe.simple("W4A16", "gptqq"), ["'gptqq'", "'gptq'"]),
        (lambda: Recipe.simple("W4A16", "gptq", options={"dampening": 0.1}), ["'dampening'", "'damping'"]),
        (lambda: Recipe.simple("W4A16", "gptq", options={"damping": "lots"}), ["damping", "a number", "'lots'"]),
        (lambda: Recipe.simple("W4A16", "gptq", options={"block_size": 1.5}), ["block_size", "a whole number", "1.5"]),
        (lambda: Recipe.simple("W4A16", "gptq", options={"block_size": True}), ["block_size", "True"]),
        (lambda: Recipe.simple("W4A16", "gptq", options={"order": "random"}), ["order", "'random'", "static"]),
        (lambda: Recipe.simple("W4A16", "hqq", options={"normalize": 1}), ["normalize", "true or false", "1"]),
        (lambda: Recipe.simple("W4A16", group_size=0), ["group_size=0"]),
        (lambda: Recipe.simple("MXFP4A16", group_size=64), ["block size", "fixed", "--group-size"]),
    ],
    ids=["scheme", "method", "option", "number", "whole", "boolean", "word", "switch", "group", "fixed-group"],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused_when_it_is_made(make: Callable[[], Recipe], words: list[str]) -> None:
    with pytest.raises(ArrondiError) as caught:
        make()
    message = str(caught.value)
    assert all(w in message for w in words), message


def test_every_option_of_every_method_takes_its_own_default() -> None:
    for name, method in arrondi.METHODS.items():
        Recipe.simple("TCQ3" if name.startswith("trellis") else "W4A16", name, options=method.options)


def test_a_trellis_is_searched_where_no_method_is_named(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(
        json.dumps(
            {"rules": [{"scheme": "W4A16"}, {"scheme": "TCQ2", "targets": "re:.*down_proj"}, {"scheme": "TCQ3S"}]}
        )
    )
    assert [rule.method for rule in Recipe.read(path).rules] == ["rtn", "trellis", "trellis-yaqa"]
    assert Recipe.simple("TCQ2").rules[0].method == "trellis"
    assert Recipe.simple("TCQ2", "rtn").rules[0].method == Rule(parse_scheme("W4A16")).method == "rtn"
    scheme = "w=tcq2-l8-square/channel/float16/rht16"
    data = TextOptions(text, samples=4, seq_len=24, evaluate=False)
    for name, method in (("usual", None), ("plain", "trellis"), ("blind", "rtn")):
        quantize_model(models("llama"), tmp_path / name, Recipe.simple(scheme, method), data)
    codes = {
        name: {k: v for k, v in load_file(tmp_path / name / "model.safetensors").items() if "down_proj" in k}
        for name in ("usual", "plain", "blind")
    }
    for one, other in (("usual", "plain"), ("plain", "blind"), ("usual", "blind")):
        assert any(not torch.equal(codes[one][k], codes[other][k]) for k in codes[one]), (one, other)


# ── recipe files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    rules = [
        {"scheme": "W4A16", "method": "gptq", "group_size": 32, "options": {"damping": 0.02}},
        {"scheme": "W8A16", "targets": "re:.*down_proj"},
        {"scheme": None, "targets": ["lm_head"]},
    ]
    path.write_text(json.dumps({"rules": rules, "ignore": "model.norm"}))
    assert Recipe.read(path) == Recipe(
        (
            Rule(parse_scheme("W4A16").with_group_size(32), "gptq", options={"damping": 0.02}),
            Rule(parse_scheme("W8A16"), targets=("re:.*down_proj",)),
            Rule(None, targets=("lm_head",)),
        ),
        ("model.norm",),
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "recipe"),
        ("[]", "recipe"),
        ('{"rule": []}', "rule"),
        ('{"rules": [], "ignored": []}', "ignored"),
        ('{"rules": [{"method": "rtn"}]}', "scheme"),
        ('{"rules": [{"scheme": "W4A16", "bits": 4}]}', "bits"),
        ('{"rules": [{"scheme": "W4A16", "targets": [4]}]}', "4"),
        ('{"rules": [{"scheme": "W4A16", "group_size": "big"}]}', "recipe"),
        ('{"rules": ["W4A16"]}', "recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_an_example(content: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(FileFormatError) as caught:
        Recipe.read(path)
    message = str(caught.value)
    assert str(path) in message and word in message and '"rules"' in message


def test_a_recipe_file_that_is_missing_or_names_an_unknown_scheme(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="recipe"):
        Recipe.read(tmp_path / "nowhere.json")
    (tmp_path / "r.json").write_text('{"rules": [{"scheme": "W17Z"}]}')
    with pytest.raises(SchemeError, match="'W17Z'"):
        Recipe.read(tmp_path / "r.json")
