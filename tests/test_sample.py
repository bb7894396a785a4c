"""What the shipped sample model promises, and what the script that made it promises.

This file owns two claims: the files in ``src/arrondi/sample/`` are complete, load with plain ``transformers`` and
reproduce their own card; and ``samples/train.py`` gathers real text, the same way each time, with nothing held out
that was also trained on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "src" / "arrondi" / "sample"
FILES = (
    "LICENSE-CPython.txt",
    "card.json",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module; it lives outside any package, so it is imported from its path."""
    spec = importlib.util.spec_from_file_location("arrondi_sample_train", ROOT / "samples" / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(script: ModuleType) -> list[Any]:
    """Gathered once for the file: it parses the whole standard library, the slowest thing here."""
    return script.gather()


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((SAMPLE / "card.json").read_text(encoding="utf-8"))


def heldout_tokens() -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_files_are_present_and_small() -> None:
    assert [name for name in FILES if not (SAMPLE / name).is_file()] == []
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 12_000_000


def test_loads_with_plain_transformers_in_silence() -> None:
    """Tied weights stored once are easy to get wrong, and then show up as a 'missing key' nobody reads."""
    heard: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = heard.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(SAMPLE, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(SAMPLE)
    finally:
        logger.removeHandler(handler)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [record.getMessage() for record in heard] == []
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id


def test_every_linear_width_is_a_multiple_of_128() -> None:
    model = AutoModelForCausalLM.from_pretrained(SAMPLE)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(size % 128 == 0 for linear in linears for size in linear.weight.shape)


def test_heldout_text_is_long_enough_and_survives_the_tokenizer(card: dict[str, Any]) -> None:
    tokens = heldout_tokens()
    assert len(tokens) == card["heldout_tokens"] >= 20_000
    text = AutoTokenizer.from_pretrained(SAMPLE).decode(tokens)
    assert text == (SAMPLE / "heldout.txt").read_text(encoding="utf-8")


def test_model_knows_the_heldout_text(card: dict[str, Any]) -> None:
    """Recomputed here on its own, not with the script's code: the card should not be the only witness."""
    tokens = heldout_tokens()[: 20 * 255]
    rows = torch.tensor(tokens).view(20, 255)
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    start = torch.full((20, 1), model.config.bos_token_id)
    with torch.inference_mode():
        logits = model(input_ids=torch.cat([start, rows[:, :-1]], dim=1)).logits
    value = math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten()).item())
    assert value < card["unigram_perplexity"] / 5
    assert card["perplexity"] < card["unigram_perplexity"] / 5
    assert value == pytest.approx(card["perplexity"], rel=0.5)


def test_corpus_is_substantial(corpus: list[Any]) -> None:
    assert len(corpus) > 200
    assert sum(len(document.text) for document in corpus) > 1_000_000
    assert any(document.name.startswith("topic:") for document in corpus)


def test_gathering_is_deterministic(script: ModuleType, corpus: list[Any]) -> None:
    """A part of the library is enough to see it; the split repeats whatever order the documents come in."""
    package = Path(json.__file__).parent
    assert script.gather(package) == script.gather(package) != []
    train, held_out = script.split(corpus)
    again, held_out_again = script.split(corpus[::-1])
    assert (train, held_out) == (again[::-1], held_out_again[::-1])


def test_train_and_heldout_share_no_paragraph(script: ModuleType, corpus: list[Any]) -> None:
    train, held_out = script.split(corpus)
    assert len(train) + len(held_out) == len(corpus)
    trained = {script.fingerprint(part) for document in train for part in document.paragraphs}
    kept = {script.fingerprint(part) for document in held_out for part in document.paragraphs}
    assert trained and kept and not trained & kept
    assert sum(len(document.text) for document in held_out) >= script.HELD_OUT_CHARACTERS


def test_gathering_keeps_prose_and_drops_the_rest(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        '"""A module about nothing in particular.\n\n>>> 1 + 1\n2\n"""\n'
        "# Two lines of comment make a block\n# and a block is kept.\nx = 1  # a remark at the end of a line\n"
        "# alone, it is dropped\ny = '''\n# not a comment at all\n# but part of a string\n'''\n"
    )
    (tmp_path / "a.py").write_text('"""A module about nothing in particular."""\n')
    (tmp_path / "c.py").write_text(
        '"""Ours."""\n# Permission to use, copy, modify and\n# distribute this is granted.\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_text('"""Tests are not documentation."""\n')
    found = script.gather(tmp_path)
    assert [(document.name, document.paragraphs) for document in found] == [
        ("a.py", ("A module about nothing in particular.",)),
        ("b.py", ("Two lines of comment make a block\nand a block is kept.",)),
    ]
