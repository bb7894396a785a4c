"""Same inputs, seed and machine: the same bytes. And the random state of whoever calls stays theirs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.measure.compare import compare_models
from arrondi.measure.data import Windows
from arrondi.model import OnDisk
from arrondi.native import native
from arrondi.pipeline import dequantize_model, quantize_model
from arrondi.pipeline.texts import TextOptions, Texts, read_texts
from tests.pipeline.killer import digest

METHODS = {"rtn": "W4A16", "hqq": "w=int4/g32/offset", "gptq": "W4A16"}


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_write_the_same_bytes(method: str, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    recipe = arrondi.Recipe.simple(METHODS[method], method, group_size=32)
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)  # the state that the caller happens to be in does not matter
        options = TextOptions(text, samples=3, seq_len=24, eval_samples=2)
        quantize_model(models("llama", num_hidden_layers=2), tmp_path / name, recipe, options)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_another_seed_calibrates_on_other_windows(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    recipe = arrondi.Recipe.simple("W3A16", "gptq", group_size=32)
    source = models("llama", num_hidden_layers=1)
    reports = {}
    for seed in (0, 1):
        options = TextOptions(text, samples=3, seq_len=24, eval_samples=2, seed=seed)
        reports[seed] = quantize_model(source, tmp_path / str(seed), recipe, options)
    one, two = digest(tmp_path / "0"), digest(tmp_path / "1")
    assert one["model.safetensors"] != two["model.safetensors"]
    assert one["config.json"] == two["config.json"]
    assert reports[0]["calibration"]["seed"] == 0 and reports[1]["calibration"]["seed"] == 1
    assert reports[0]["evaluation"]["reference_perplexity"] == reports[1]["evaluation"]["reference_perplexity"]


def test_the_global_random_state_is_untouched(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    states = (torch.random.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    recipe = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)
    out = tmp_path / "out"
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    quantize_model(models("llama", num_hidden_layers=1), out, recipe, options)
    compare_models(out, models("llama", num_hidden_layers=1), text, seq_len=24, samples=2)
    arrondi.load(out)
    dequantize_model(out, tmp_path / "plain")
    from arrondi.runtime.generate import generate

    generate(out, "Return", max_new_tokens=3, temperature=1.0)
    after = (torch.random.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(states[1], after[1], strict=True))
    assert states[2] == after[2]


def test_nothing_of_torch_is_left_changed(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    recipe = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)
    options = TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    quantize_model(models("llama", torch.bfloat16, num_hidden_layers=1), tmp_path / "out", recipe, options)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before


# ── which windows a run uses ──────────────────────────────────────────────────────────────────────────────────────────


def texts_of(models: Callable[..., Path], options: TextOptions) -> Texts:
    source = OnDisk.open(models("llama", num_hidden_layers=1))
    return read_texts(source, options, arrondi.Recipe.simple("W4A16", "gptq", group_size=32))


def rows(windows: Windows | None) -> set[tuple[int, ...]]:
    assert windows is not None
    return {tuple(r.tolist()) for r in windows.ids}


def test_what_is_measured_is_not_calibrated_on(models: Callable[..., Path], text: Path) -> None:
    texts = texts_of(models, TextOptions(text, samples=10_000, seq_len=24))
    everything = texts_of(models, TextOptions(text, samples=10_000, seq_len=24, evaluate=False))
    assert texts.calibration is not None and everything.calibration is not None
    assert not rows(texts.calibration) & rows(texts.evaluation)
    total = len(everything.calibration)
    assert len(texts.calibration) == total - total // 10
    last = everything.calibration.ids[-(total // 10) :]
    assert rows(texts.evaluation) == {tuple(r.tolist()) for r in last[:32]}, "the last tenth, at most eval_samples"


def test_a_text_of_its_own_for_measuring_leaves_all_windows_to_calibration(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    texts = texts_of(models, TextOptions(text, samples=10_000, seq_len=24, eval_text=other))
    everything = texts_of(models, TextOptions(text, samples=10_000, seq_len=24, evaluate=False))
    assert rows(texts.calibration) == rows(everything.calibration)
    assert texts.evaluation_source == "other.txt"


def test_the_seed_chooses_and_samples_count(models: Callable[..., Path], text: Path) -> None:
    options = TextOptions(text, samples=5, seq_len=24)
    picks = [rows(texts_of(models, replace(options, seed=s)).calibration) for s in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]
    assert all(len(p) == 5 for p in picks)


def test_a_window_is_no_longer_than_the_model_takes(models: Callable[..., Path], text: Path) -> None:
    texts = texts_of(models, TextOptions(text, samples=2, seq_len=4096))
    assert texts.calibration is not None and texts.calibration.ids.shape == (2, 128)


def test_each_of_these_makes_another_run(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """The key of a run holds whatever its bytes depend on."""
    source, keys = models("llama", num_hidden_layers=1), []
    base = TextOptions(text, samples=2, seq_len=24, eval_samples=2)
    recipe = arrondi.Recipe.simple("W4A16", "gptq", group_size=32)
    shorter = tmp_path / "shorter.txt"
    shorter.write_text(text.read_text()[:-200])
    runs: list[tuple[arrondi.Recipe, TextOptions, dict[str, Any]]] = [
        (recipe, base, {}),
        (recipe, replace(base, seed=1), {}),
        (recipe, replace(base, samples=3), {}),
        (recipe, replace(base, seq_len=25), {}),
        (recipe, replace(base, calibration=shorter), {}),
        (recipe, base, {"shard_bytes": 100_000}),
        (recipe, base, {"layout": "arrondi"}),
        (arrondi.Recipe.simple("W4A16", "gptq", group_size=32, options={"damping": 0.02}), base, {}),
        (arrondi.Recipe.simple("W4A16", "gptq", group_size=16), base, {}),
        (arrondi.Recipe.simple("W4A16", "hqq", group_size=32), base, {}),
    ]
    for i, (changed, options, more) in enumerate(runs):
        keys.append(key_of(source, tmp_path / str(i), changed, options, **more))
    threads, path = torch.get_num_threads(), native and native.path()
    others = [other for other, missing in native.paths() if missing is None and other != path] if native else []
    try:
        torch.set_num_threads(threads + 1)
        keys.append(key_of(source, tmp_path / "threads", recipe, base))
        torch.set_num_threads(threads)
        for other in others:
            native.use_path(other)
            keys.append(key_of(source, tmp_path / other, recipe, base))
    finally:
        torch.set_num_threads(threads)
        if native is not None:
            native.use_path(path)
    assert len(set(keys)) == len(runs) + 1 + len(others)


class Known(Exception):
    """Ends a run as soon as its key is known."""


def key_of(source: Path, out: Path, *what: Any, **more: Any) -> str:
    """The key of a run."""
    keys: list[str] = []

    def known(out: Path, key: str, ledger: object) -> bool:
        keys.append(key)
        raise Known

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Known):
        patch.setattr("arrondi.pipeline.task.finished", known)
        quantize_model(source, out, *what, **more)
    return keys[0]
