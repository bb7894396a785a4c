"""Every sentence of `readers.py` that says "no" is true of at least one model, or it has to go."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from arrondi.checkpoint import readers
from arrondi.formats import parse_scheme
from arrondi.pipeline import Recipe, Rule, TextOptions, quantize_model
from tests.contract.cases import OTHER_INPUTS
from tests.contract.measures import IDS, SUMS, distance, loaded, loaded_by_transformers, products, quiet, wrong_product
from tests.contract.test_inputs import run as run_on_its_own
from tests.zoo import outputs


def rules(*schemes: str, second: str = "") -> Recipe:
    """One scheme, and another one for what a pattern matches."""
    first, *others = (parse_scheme(s) for s in schemes)
    return Recipe((Rule(first), *(Rule(s, targets=(second,)) for s in others)))


KEEPING = Recipe.simple("w=int4/g32", ignore=["lm_head", "re:.*experts"])
MIXED = rules("w=int4/g32", "w=int8/channel,a=int8/token", second=r"re:.*\.1\.")
REFUSALS: dict[str, tuple[str, Recipe, str]] = {
    "_unread_experts": ("qwen3-moe", rules("w=int4/g32/asym"), "cannot read experts stored as"),
    "_mixed_experts": ("mixtral", rules("w=int4/g32", "w=int8/g32", second=r"re:.*w2"), "all experts by one scheme"),
    "_mixed_dequantized": ("gpt2", MIXED, "cannot read this mix"),
    "_split_dequantized": ("dinov2-swiglu", rules("w=int8/g16"), "splits stored tensors"),
    "_joined_plain": ("mixtral", KEEPING, "takes all weights that it joins"),
    "_inputs_left": ("gpt2", rules("w=int8/channel,a=int8/token"), "leaves the inputs of Conv1D layers unrounded"),
    "_one_scale_for_several_rows": (
        "opt",
        rules("w=int8/channel,a=int8/token"),
        "does not pass them as (windows, tokens",
    ),
    "_mx_inputs": ("llama", rules("MXFP8"), "power-of-two scales"),
    "another layout": ("llama", rules("w=nf4/g32"), "do not read this layout"),
}
"""Rule of the table → a model and a recipe, and what is said of it."""


@pytest.mark.parametrize("rule", REFUSALS)
def test_what_is_refused_is_not_computed(rule: str, models: Callable[..., Path], tmp_path: Path) -> None:
    name, recipe, words = REFUSALS[rule]
    report = quantize_model(models(name), tmp_path / "out", recipe)
    said = [r for r in report["readers"] if r["reader"] == readers.TRANSFORMERS]
    assert [r["ok"] for r in said] == [False] and words in said[0]["sentence"]
    run = partial(run_on_its_own, name) if name in OTHER_INPUTS else partial(outputs, ids=IDS)
    computed, calls = products(loaded(tmp_path / "out", "reference", fuse=False), run)
    theirs = loaded_by_transformers(name, tmp_path / "out")
    if isinstance(theirs, Exception):
        return
    try:
        with quiet():
            found = run(theirs)
        wrong = wrong_product(theirs, calls)
    except (RuntimeError, AttributeError):
        return
    assert wrong or distance(found, computed) > 100 * SUMS


def test_heads_before_tokens_are_no_tokens_either(models: Callable[..., Path], tmp_path: Path) -> None:
    """compressed-tensors gives every index of the first two axes a scale, whatever they number."""
    report = quantize_model(models("minicpm3"), tmp_path / "out", rules("w=int8/channel,a=int8/token"))
    said = next(r for r in report["readers"] if r["reader"] == readers.TRANSFORMERS)
    assert not said["ok"] and "kv_b_proj" in said["sentence"]
    computed, calls = products(loaded(tmp_path / "out", "reference", fuse=False), partial(outputs, ids=IDS))
    theirs = loaded_by_transformers("minicpm3", tmp_path / "out")
    assert distance(outputs(theirs, IDS), computed) > 100 * SUMS and "kv_b_proj" in wrong_product(theirs, calls)


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=fp8_e4m3/channel"])
@pytest.mark.parametrize("kept", ["experts", "experts.1.", "self_attn"])
def test_experts_are_read_all_quantized_or_in_floats_of_eight_bits_not_at_all(
    kept: str, scheme: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """What is said of a model of which a part is kept is what happens."""
    recipe = Recipe.simple(scheme, ignore=["lm_head", f"re:.*{re.escape(kept)}"])
    report = quantize_model(models("qwen3-moe"), tmp_path / "out", recipe)
    ok = next(r["ok"] for r in report["readers"] if r["reader"] == readers.TRANSFORMERS)
    assert ok == (kept == "self_attn" or (kept == "experts" and "fp8" in scheme))
    theirs = loaded_by_transformers("qwen3-moe", tmp_path / "out")
    computed = outputs(loaded(tmp_path / "out", "reference", fuse=False), IDS)
    read = not isinstance(theirs, Exception) and distance(outputs(theirs, IDS), computed) <= 100 * SUMS
    assert read == ok


def test_every_refusal_has_its_case() -> None:
    assert {rule.__name__ for rule in readers._REFUSALS} == REFUSALS.keys() - {"another layout"}


def test_a_rule_that_splits_hinders_models_that_do_not_need_it_too(models: Callable[..., Path], tmp_path: Path) -> None:
    report = quantize_model(models("dinov2-swiglu", use_swiglu_ffn=False), tmp_path / "out", rules("w=int8/g16"))
    said = next(r for r in report["readers"] if r["reader"] == readers.TRANSFORMERS)
    assert not said["ok"] and "splits stored tensors" in said["sentence"]
    assert isinstance(loaded_by_transformers("dinov2-swiglu", tmp_path / "out"), Exception)


@pytest.mark.parametrize("name", ["nomic-bert", "gte", "jina-v3"])
def test_models_whose_other_tensors_are_split_are_read_when_they_are_turned_back(
    name: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    report = quantize_model(models(name), tmp_path / "out", rules("w=int4/g32/asym"))
    assert next(r for r in report["readers"] if r["reader"] == readers.TRANSFORMERS)["ok"]
    computed = outputs(loaded(tmp_path / "out", "reference", fuse=False), IDS)
    theirs = loaded_by_transformers(name, tmp_path / "out")
    assert distance(outputs(theirs, IDS), computed) <= SUMS


def test_text_is_no_part_of_a_verdict(models: Callable[..., Path], tmp_path: Path) -> None:
    """What a run of the whole model shows is what the made-up run has shown."""
    recipe = rules("w=int8/channel,a=int8/token")
    for name in ("opt", "bert", "qwen2-moe"):
        blind = quantize_model(models(name), tmp_path / f"{name} blind", recipe)
        seen = quantize_model(models(name), tmp_path / name, recipe, TextOptions(eval_text=IDS, eval_samples=1))
        assert blind["readers"] == seen["readers"]
        assert torch.is_tensor(outputs(loaded(tmp_path / name), IDS))
