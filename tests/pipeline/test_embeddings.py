"""Embeddings in few bits, from the recipe to the model that is run; heads that are tied to them share their codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import arrondi
from arrondi.calibration import SecondMoment
from arrondi.checkpoint import Checkpoint
from arrondi.errors import SchemeError
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.nn import QEmbedding, QLinear, factor_of
from arrondi.pipeline import Recipe, TextOptions, make_plan, preset_recipe, quantize_model
from arrondi.rounding import METHODS
from arrondi.runtime.modules import load_into
from arrondi.tensor.checks import layer_scheme_of
from tests.checkpoint.copies import distance, logits
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data

HELD = data(2, 24, 2)
TEXT = TextOptions(data(6, 24, 1), samples=6, eval_text=HELD)
INT8 = Recipe.simple("w=int4/g16", embeddings="int8/row")
WORDS = {
    "llama": "model.embed_tokens.weight",
    "llama-tied": "model.embed_tokens.weight",
    "gemma3": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "bert": "embeddings.word_embeddings.weight",
}


def plain_kl(source: Path, out: Path) -> float:
    """Mean divergence of every position, by transformers' own model with the stored numbers put into it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.as_tensor(HELD)
    with torch.no_grad():
        expected = model(ids).logits[:, :-1].double().log_softmax(-1)
        checkpoint, state = Checkpoint.open(out), dict(model.state_dict(keep_vars=True))
        for name in checkpoint.placed:
            state[name].copy_(checkpoint.layer(name).weight.dequantize().reshape(state[name].shape))
        found = model(ids).logits[:, :-1].double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "gptq"), ("llama-tied", "gptq"), ("llama-tied", "gptaq"), ("gemma3", "rtn")]
)
def test_report_evaluation_and_a_plain_loop_agree(
    models: Callable[..., Path], tmp_path: Path, name: str, method: str
) -> None:
    source, out = models(name), tmp_path / "out"
    report = quantize_model(source, out, Recipe.simple("w=int4/g16", method, embeddings="int4/g16"), TEXT)
    row = next(r for r in report["layers"] if r["name"] == WORDS[name])
    tied = name == "llama-tied"  # of what is only looked up there is nothing to calibrate on
    assert row["bits_per_weight"] == 4 + 32 / 16, "scales are float32, as the model is"
    assert (row["method"], row["calibration_tokens"]) == (("gptq", 6 * 24) if tied else ("rtn", None))
    kept = quantize_model(source, tmp_path / "kept", Recipe.simple("w=int4/g16", method), TEXT)
    assert WORDS[name] in {r["name"] for r in kept["kept"]} and kept["output_bytes"] > report["output_bytes"]
    kl = report["evaluation"]["kl_mean"]
    assert kl > 1.02 * kept["evaluation"]["kl_mean"], "it counts"
    assert compare_models(out, source, HELD, seq_len=24)["kl_mean"] == pytest.approx(kl, rel=1e-4)
    assert plain_kl(source, out) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8/row", "int4/g16/asym", "int8/tensor", "nf4/g32"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_rows_are_those_of_the_stored_weight(
    models: Callable[..., Path], tmp_path: Path, name: str, scheme: str, dtype: torch.dtype
) -> None:
    quantize_model(models(name), tmp_path / "out", Recipe.simple("w=int8", embeddings=scheme))
    model = arrondi.load(tmp_path / "out", dtype=dtype)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QEmbedding) and isinstance(head, QLinear)
    q = Checkpoint.open(tmp_path / "out").layer(WORDS[name]).weight
    for held in (table.unpack(), head.unpack()):  # one truth
        assert torch.equal(held.codes, q.codes) and torch.equal(held.scale, q.scale)
    reference = transformers.AutoModelForCausalLM.from_pretrained(models(name), dtype=dtype)
    own = reference.get_input_embeddings()
    with torch.no_grad():
        own.weight.copy_(q.dequantize())
        ids = torch.tensor([[0, 5, 2047], [7, 5, 1]])
        assert torch.equal(table(ids), own(ids)), "Gemma multiplies by √width"


def test_the_loaded_model_computes_what_transformers_does(models: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("llama-tied", "gemma3", "gpt2", "opt"):
        out = tmp_path / name
        quantize_model(models(name), out, INT8)
        reference = transformers.AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32).eval()
        state, checkpoint = dict(reference.state_dict(keep_vars=True)), Checkpoint.open(out)
        assert WORDS[name] in checkpoint.placed
        with torch.no_grad():
            for tensor, placed in checkpoint.placed.items():
                state[tensor].copy_(placed.restored(checkpoint.layer(tensor).weight.dequantize()))
        loaded = arrondi.load(out)
        assert distance(logits(loaded), logits(reference)) < 1e-5
        loaded.save_pretrained(tmp_path / f"{name}-again")
        assert torch.equal(logits(arrondi.load(tmp_path / f"{name}-again")), logits(loaded))


def status(source: Path, recipe: Recipe, layout: str | None = None) -> dict[str, tuple[str, str]]:
    return {t.name: (t.status, t.reason) for t in make_plan(OnDisk.open(source), recipe, layout=layout).tensors}


def test_only_the_table_of_words_is_meant_unless_another_is_named(models: Callable[..., Path]) -> None:
    for name in ("gpt2", "opt", "bert"):
        found = status(models(name), INT8)
        assert found[WORDS[name]][0] == "quantized"
        others = {n: why for n, why in found.items() if "wpe" in n or "position_emb" in n or "embed_positions" in n}
        assert others and all(s == "kept by rule" and "not of words" in why for s, why in others.values())
    named = Recipe.simple("w=int8", targets=["Linear", "transformer.wpe"])
    assert status(models("gpt2"), named)["transformer.wpe.weight"][0] == "quantized"
    assert status(models("gpt2"), named)["transformer.wte.weight"][0] == "kept by rule"
    by_name = status(models("opt"), Recipe.simple("w=int8", targets=["re:.*embed_positions"]))
    assert by_name["model.decoder.embed_positions.weight"] == (
        "kept because impossible",
        "an embedding that is looked up in a way of its own (OPTLearnedPositionalEmbedding)",
    )


def test_a_tied_table_stays_until_it_is_named(models: Callable[..., Path]) -> None:
    tied = models("llama-tied")
    words = WORDS["llama-tied"]
    assert status(tied, Recipe.simple("W8A8"))[words] == (
        "kept by rule",
        "ignored by 'lm_head', tied to lm_head.weight",
    )
    plan = make_plan(OnDisk.open(tied), Recipe.simple("W8A8", ignore=[]))
    assert any("name them in --targets" in note and words in note for note in plan.notes)
    assert words not in {t.name for t in plan.quantized} and plan.layout.name == "compressed-tensors"
    refused = Recipe.simple("W8A8", ignore=["lm_head"], embeddings="int8")
    assert status(tied, refused)[words][1] == "ignored by 'lm_head', tied to lm_head.weight"
    both = make_plan(OnDisk.open(tied), Recipe.simple("W8A8", "gptq", targets=["Linear", "Embedding"]))
    assert str(next(t for t in both.quantized if t.name == words).scheme) == "w=int8/channel", "ids are not rounded"
    assert any(f"{words} is quantized once and serves lm_head.weight too" in note for note in both.notes)
    assert any(note.startswith("Rounded by gptq on what the tied head is given") for note in both.notes)
    turned = make_plan(
        OnDisk.open(tied), Recipe.simple("W8A8", "gptq", targets=["Linear", "Embedding"], rewrites=["rotate"])
    )
    assert not turned.told_by_heads, "the head is stored apart"
    assert any(note.startswith("Rounded by rtn instead of gptq, for it is looked up") for note in turned.notes)


def test_a_tied_table_is_rounded_for_products_and_for_rows(models: Callable[..., Path], tmp_path: Path) -> None:
    """Its codes are those of gptq on the head's inputs in the original, found here by a hook, with their mean added to the diagonal."""
    source = models("llama-tied")
    recipe = Recipe.simple("w=int8/channel", "gptq", embeddings="int3/g16")
    quantize_model(source, tmp_path / "out", recipe, TEXT)
    module = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    moment = SecondMoment(64)
    hook = module.lm_head.register_forward_pre_hook(lambda head, args: moment.update(args[0].reshape(-1, 64)))
    with torch.no_grad():
        module(torch.as_tensor(data(6, 24, 1)))
    hook.remove()
    table = module.get_input_embeddings().weight.detach()
    expected = METHODS["gptq"].round(table, layer_scheme_of("w=int3/g16").weights, name="x", moment=moment, damping=1.0)
    found = Checkpoint.open(tmp_path / "out").layer(WORDS["llama-tied"]).weight
    assert float((found.codes != expected.q.codes).float().mean()) < 0.01, "sums differ in their last digits"
    arrondi.quantize(module, recipe=recipe, calibration=torch.as_tensor(data(6, 24, 1)))
    assert float((module.get_input_embeddings().unpack().codes != expected.q.codes).float().mean()) < 0.01


def test_a_layout_that_cannot_hold_a_table_says_so(models: Callable[..., Path]) -> None:
    assert make_plan(OnDisk.open(models("llama")), INT8).layout.name == "arrondi"
    kept = status(models("llama"), INT8, layout="compressed-tensors")[WORDS["llama"]]
    assert kept[0] == "kept because impossible" and "a table that is looked up" in kept[1]
    for scheme, words in (("w=int4/b16x16", "one by one"), ("w=int4/g16/s:(uint8/tensor)", "scales of their own")):
        found = status(models("llama"), Recipe.simple("W8A16", embeddings=scheme))
        assert found[WORDS["llama"]][0] == "kept because impossible" and words in found[WORDS["llama"]][1]
    with pytest.raises(SchemeError, match="int9"):
        Recipe.simple("W4A16", embeddings="int9")


def test_rotations_come_before_the_table_is_rounded(models: Callable[..., Path], tmp_path: Path) -> None:
    """The head is stored apart then, and as it is."""
    source, out = models("llama-tied"), tmp_path / "out"
    recipe = Recipe.simple("w=int4/g16", rewrites=("rotate",), embeddings="int8/row")
    report = quantize_model(source, out, recipe, TEXT)
    assert not any("serves lm_head" in note for note in report["notes"])
    again = compare_models(out, source, HELD, seq_len=24)
    assert again["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-4)
    model = arrondi.load(out)
    assert isinstance(model.get_input_embeddings(), QEmbedding) and isinstance(model.get_output_embeddings(), nn.Linear)


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(models: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.simple("w=int4/g16", "gptq", embeddings="int8/row")
    quantize_model(models("llama-tied"), tmp_path / "whole", recipe, TEXT)
    for name in ("front", "unit 0"):
        with stopped_after(name):
            quantize_model(models("llama-tied"), tmp_path / name, recipe, TEXT)
        quantize_model(models("llama-tied"), tmp_path / name, recipe, TEXT)
        one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", name))
        assert one == two


# ── modules in memory, and what a class computes ──────────────────────────────────────────────────────────────────────


class Two(nn.Module):
    """Two tables, one with a row for padding, and a head that is tied to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.users = nn.Embedding(40, 32, padding_idx=3), nn.Embedding(20, 32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 40)
        self.head.weight = self.items.weight

    def forward(self, items: torch.Tensor, users: torch.Tensor) -> Any:
        return self.head(self.mix(self.items(items) + self.users(users)))


@torch.no_grad()
def test_a_module_in_memory_is_changed_saved_and_filled(tmp_path: Path) -> None:
    model, batch = Two(), (torch.arange(16).reshape(2, 8), torch.arange(16).reshape(2, 8) % 20)
    before = model(*batch)
    arrondi.quantize(model, "w=int8", embeddings="int8/row", calibration=[batch])
    assert all(isinstance(m, QEmbedding) for m in (model.items, model.users))
    assert torch.equal(model.items(torch.tensor([3])), torch.zeros(1, 32)), "the row for padding"
    after = model(*batch)
    assert 0 < distance(after, before) < 0.03
    weight = model.items.unpack().dequantize()
    assert torch.equal(model.items(batch[0]), weight[batch[0]])
    assert torch.equal(model.head.unpack().dequantize(), weight)
    arrondi.save(model, tmp_path / "out")
    assert torch.equal(load_into(Two(), tmp_path / "out")(*batch), after)


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


class Biased(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 0.5


def test_the_factor_of_a_class_is_found_or_it_is_none() -> None:
    assert factor_of(nn.Embedding(9, 4, padding_idx=8)) == 1.0
    assert factor_of(nn.Embedding(9, 4, max_norm=1.0)) is None
    assert factor_of(Shifted(9, 4)) is None and factor_of(Biased(9, 4)) is None and factor_of(nn.Linear(4, 4)) is None
    bart = transformers.models.bart.modeling_bart
    assert factor_of(bart.BartScaledWordEmbedding(9, 4, 1, embed_scale=8.5)) == 8.5
    assert factor_of(bart.BartLearnedPositionalEmbedding(9, 4)) is None
    gemma = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=11.3)
    assert factor_of(gemma) == pytest.approx(11.3) and factor_of(gemma, torch.bfloat16) == 11.3125


def test_the_preset_for_bert_runs(models: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize_model(models("bert"), tmp_path / "out", preset_recipe("q8bert"), TEXT)
    assert WORDS["bert"] in {row["name"] for row in report["layers"]}
    assert isinstance(arrondi.load(tmp_path / "out").get_input_embeddings(), QEmbedding)
