"""Two models on the same text, followed block by block: the numbers of the whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import arrondi
from arrondi.errors import DataError, FileFormatError
from arrondi.measure import Comparison
from arrondi.measure.compare import compare_models
from arrondi.measure.data import read_windows
from arrondi.measure.text import load_tokenizer
from arrondi.pipeline import quantize_model


def test_the_numbers_are_those_of_transformers(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source, out = models("llama"), tmp_path / "out"
    quantize_model(source, out, arrondi.Recipe.simple("W3A16", group_size=32))
    found = compare_models(out, source, text, seq_len=24, samples=5)
    original, quantized = (
        transformers.LlamaForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (source, out)
    )
    whole = Comparison()
    with torch.no_grad():
        for window in read_windows(text, load_tokenizer(source), 24).ids[:5].split(1):
            whole.add(original(window).logits, quantized(window).logits, window)
    expected = whole.summary().to_dict()
    for key in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    assert found["tokens"] == 5 * 23 and found["windows"] == 5


def test_a_model_equals_itself(models: Callable[..., Path], text: Path) -> None:
    for name in ("llama", "bert"):
        found = compare_models(models(name), models(name), text, seq_len=24, samples=3)
        if name == "llama":
            assert found["kl_mean"] == pytest.approx(0, abs=1e-7) and found["top1_agreement"] == 1
            assert found["perplexity"] == found["reference_perplexity"]
        else:
            assert found["relative_error"] == 0 and found["token_cosine"] == pytest.approx(1)


def test_all_windows_are_taken_unless_fewer_are_asked_for(models: Callable[..., Path], text: Path) -> None:
    total = len(read_windows(text, load_tokenizer(models("llama")), 100))
    found = compare_models(
        models("llama", num_hidden_layers=1), models("llama", num_hidden_layers=1), text, seq_len=100
    )
    assert found["windows"] == total and found["tokens"] == total * 99


def test_windows_are_no_longer_than_the_model_takes(models: Callable[..., Path], text: Path) -> None:
    found = compare_models(models("llama", num_hidden_layers=1), models("llama", num_hidden_layers=1), text, seq_len=4096, samples=2)  # fmt: skip
    assert found["tokens"] == 2 * 127 and "windows of 127 tokens" in found["protocol"]


def test_progress_counts_the_blocks(models: Callable[..., Path], text: Path) -> None:
    calls: list[tuple[int, int]] = []
    compare_models(
        models("llama"), models("llama"), text, seq_len=24, samples=1, progress=lambda done, total, what: calls.append((done, total))
    )  # fmt: skip
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4)]


STRANGERS = {
    "another class": ("gpt2", {}),
    "fewer layers": ("llama", {"num_hidden_layers": 1}),
    "more layers": ("llama", {"num_hidden_layers": 4}),
    "another width": ("llama", {"hidden_size": 32}),
    "another vocabulary": ("llama", {"vocab_size": 2050}),
    "another inner width": ("llama", {"intermediate_size": 128}),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_strangers_are_not_compared(kind: str, models: Callable[..., Path], text: Path) -> None:
    name, changes = STRANGERS[kind]
    with pytest.raises(FileFormatError, match=r"another model than .* Compare a model with its own original"):
        compare_models(models(name, **changes), models("llama"), text, seq_len=24, samples=1)


def test_a_short_text_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words")
    with pytest.raises(DataError, match=r"short\.txt: \d+ tokens of evaluation text"):
        compare_models(models("llama"), models("llama"), tmp_path / "short.txt", seq_len=24)
