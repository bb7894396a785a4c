"""What the plan says a run will need, without running it; measured peaks are in `test_peak`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, Rule, make_plan
from arrondi.pipeline.estimate import BASE_BYTES, Estimate, estimate
from arrondi.pipeline.step import Step
from tests.pipeline.toys import toys_known


def told(model: Path, recipe: Recipe | None = None, *tokens: int, seq_len: int = 128) -> Estimate:
    return estimate(make_plan(OnDisk.open(model), recipe or Recipe.simple("W4A16")), *tokens, seq_len=seq_len)


def test_each_moment_can_be_the_fullest(models: Callable[..., Path]) -> None:
    words = models("llama", vocab_size=9000, hidden_size=256)
    gptq, head = Recipe.simple("W4A16", "gptq"), Recipe.simple("W4A16", "gptq", ignore=())
    cases = {
        "the model is looked at": told(words),
        "tensors are rounded one by one": told(models("llama", vocab_size=9000, hidden_size=256), Recipe.simple("w=int4/tensor", ignore=())),
        "outputs are compared": told(words, None, 0, 256),
        "the model's own end is compared": told(words, gptq, 128),
        "the head is rounded": told(words, head, 128),
        "blocks are run": told(models("llama"), gptq, 200_000, 0),
    }  # fmt: skip
    assert {name: e.moment for name, e in cases.items()} == {name: name for name in cases}
    assert all(e.bytes > BASE_BYTES and e.seconds > 0 for e in cases.values())


def test_more_needs_more(models: Callable[..., Path]) -> None:
    model, gptq = models("llama"), Recipe.simple("W4A16", "gptq")
    assert told(model, gptq, 100_000).bytes > told(model, gptq, 1000).bytes
    assert told(model, gptq, 10**9).bytes == told(model, gptq, 10**10).bytes, "what is too much goes to a file"
    assert told(model, gptq, 1000).seconds > told(model, None, 1000).seconds > told(model).seconds
    assert told(models("llama", num_hidden_layers=6)).bytes == told(model).bytes


def test_following_the_original_needs_its_weights_too(models: Callable[..., Path]) -> None:
    def nothing(work: Any, sites: Sequence[Any]) -> None:
        pass

    model, rounding = models("llama", hidden_size=256, intermediate_size=512), Recipe.simple("W4A16", "gptq").rules
    with toys_known(Step("pairs", "repair", apply=nothing, needs=frozenset({"cross moment"}))):
        more = told(model, Recipe((*rounding, Rule(None, "pairs"))), 128 * 64)
    one = told(model, Recipe(rounding), 128 * 64)
    block = 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert more.bytes - one.bytes > block
