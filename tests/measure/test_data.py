"""Data of every kind → windows: token ids as they are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from arrondi.errors import DataError
from arrondi.measure import read_windows
from arrondi.measure.compare import compare_models
from arrondi.measure.data import check_windows, reads_text
from arrondi.measure.text import load_tokenizer
from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, quantize_model

IDS = torch.arange(24).reshape(6, 4)


def rows(*indices: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS[i], "labels": IDS[i]} for i in indices]


KINDS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: IDS,
    "int32": lambda: IDS.int(),
    "an array": lambda: IDS.numpy().astype(np.uint16),
    "lists": IDS.tolist,
    "one batch of a tokenizer": lambda: {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "a DataLoader of tensors": lambda: DataLoader(TensorDataset(IDS), batch_size=4),
    "a DataLoader of dicts": lambda: DataLoader(rows(*range(6)), batch_size=4),
    "a generator": lambda: (row for row in IDS),
    "batches of several sizes": lambda: [IDS[:1], IDS[1:5], IDS[5:]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_taken_as_they_are(kind: str) -> None:
    assert not reads_text(KINDS[kind]())
    windows = read_windows(KINDS[kind](), None, 512)
    assert torch.equal(windows.ids, IDS) and windows.ids.dtype == torch.int64
    assert windows.text_hash == read_windows(IDS, None, 4).text_hash


def test_the_hash_is_that_of_the_ids_and_their_shape() -> None:
    hashes = {read_windows(ids, None, 4).text_hash for ids in (IDS, IDS + 1, IDS.reshape(4, 6), IDS[:5])}
    assert len(hashes) == 4


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: IDS.float(), "torch.float32 where token ids are integers"),
    "three axes": (lambda: IDS.reshape(2, 3, 4), r"shape \(2, 3, 4\)"),
    "several lengths": (lambda: [IDS, IDS[:, :3]], "windows of 3 and of 4 tokens"),
    "padding": (lambda: {"input_ids": IDS, "attention_mask": (IDS > 3).long()}, "padded: its attention_mask has zeros"),
    "other dicts": (lambda: [{"pixels": IDS}], "without 'input_ids': it has 'pixels'"),
    "inputs and labels": (lambda: DataLoader(TensorDataset(IDS, IDS)), "has 2 parts"),
    "negative": (lambda: IDS - 3, "token id -3"),
    "one token": (lambda: IDS[:, :1], "at least 2"),
    "nothing": (list, "holds no batch"),
    "no rows": (lambda: IDS[:0], "holds no batch"),
    "a number": (lambda: 3, "of the type int"),
    "objects": (lambda: [object()], "of the type object"),
    "texts and ids": (lambda: ["abc", IDS[0]], "Put texts, and nothing else, into a list"),
    "one long string": (lambda: "Once upon a time.\nThe end.", "Put texts into a list"),
    "text without a tokenizer": (lambda: ["Once upon a time."], "no tokenizer to read it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_data_is_refused_with_what_it_is(kind: str) -> None:
    data, words = REFUSED[kind]
    with pytest.raises(DataError, match=words):
        read_windows(data(), None, 8, "calibration text")


def test_ids_and_lengths_that_the_model_does_not_have(models: Callable[..., Path]) -> None:
    model = OnDisk.open(models("llama")).model
    check_windows(read_windows(torch.full((1, 128), 2047), None, 512), model)
    with pytest.raises(DataError, match=r"token 2048, but the model knows 2048"):
        check_windows(read_windows(torch.full((1, 128), 2048), None, 512), model)
    with pytest.raises(DataError, match=r"windows of 129 tokens, but the model has 128 positions"):
        check_windows(read_windows(torch.full((1, 129), 7), None, 512), model)


def test_a_run_on_token_ids_is_the_run_on_their_text(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Calibration and measurement from a file, and from the ids that its tokenizer gives: the same bytes and numbers."""
    source = models("llama", num_hidden_layers=1)
    ids = read_windows(text, load_tokenizer(source), 32).ids
    reports, files = [], []
    for name, data in (("text", text), ("ids", DataLoader(TensorDataset(ids), batch_size=5))):
        options = TextOptions(data, samples=4, seq_len=32, eval_samples=3)
        recipe = Recipe.simple("W4A16", "gptq", group_size=32)
        reports.append(quantize_model(source, tmp_path / name, recipe, options)["evaluation"])
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert reports[0]["kl_mean"] == reports[1]["kl_mean"] > 0
    assert "as they were given" in reports[1]["protocol"]
    measured = [compare_models(tmp_path / "ids", source, d, seq_len=32, samples=3) for d in (text, ids)]
    assert measured[0]["kl_mean"] == measured[1]["kl_mean"]
