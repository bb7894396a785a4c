"""A checkpoint that lacks weights is refused by every command that would compute with it, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import arrondi
from arrondi.errors import FileFormatError
from arrondi.measure.compare import compare_models
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from arrondi.runtime.generate import generate
from tests.cli.conftest import Cli, cli, refused

__all__ = ["cli"]
Models = Callable[..., Path]
W4 = Recipe.simple("W4A16", group_size=32)


def without(folder: Path, out: Path, word: str) -> Path:
    shutil.copytree(folder, out)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if word not in n}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def one_layer_more(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    return out


LACKING: dict[str, tuple[str, Callable[[Path, Path], Path], str]] = {
    "head": ("llama", lambda f, o: without(f, o, "lm_head"), "lm_head.weight"),
    "layer": ("llama", lambda f, o: without(f, o, "layers.1."), "model.layers.1."),
    "layers in config": ("llama", one_layer_more, "model.layers.3."),
    "expert": ("mixtral", lambda f, o: without(f, o, "layers.0.block_sparse_moe.experts.3."), "layers.0"),
}


@pytest.mark.parametrize("what", LACKING)
def test_every_command_refuses_it_with_names(what: str, cli: Cli, models: Models, text: Path, tmp_path: Path) -> None:
    name, change, word = LACKING[what]
    whole, lacking, out = models(name), change(models(name), tmp_path / "lacking"), tmp_path / "out"
    options = TextOptions(eval_text=text, seq_len=24, eval_samples=2)
    calls: list[Callable[[], Any]] = [
        lambda: quantize_model(lacking, out, W4),
        lambda: quantize_model(lacking, out, W4, options),
        lambda: arrondi.plan(lacking, "W4A16"),
        lambda: compare_models(lacking, whole, text, seq_len=24, samples=2),
        lambda: compare_models(whole, lacking, text, seq_len=24, samples=2),
        lambda: arrondi.load(lacking),
        lambda: generate(lacking, "Return", max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises(FileFormatError) as caught:
            call()
        assert word in str(caught.value) and "missing" in str(caught.value)
    refused(cli("quantize", lacking, "-o", out, "--scheme", "W4A16"), word)
    refused(cli("eval", lacking, "--against", whole, "--text", text), word)
    refused(cli("run", lacking, "Return"), word)
    assert not out.exists()


def test_a_quantized_checkpoint_that_lacks_a_layer_is_refused(models: Models, text: Path, tmp_path: Path) -> None:
    """A packed tensor that is gone is not taken for one that was never quantized."""
    quantize_model(models("llama"), tmp_path / "q", W4)
    for word in ("layers.1.mlp.up_proj", "layers.1.mlp.up_proj.weight_packed", "layers.1.mlp.up_proj.weight_scale"):
        lacking = without(tmp_path / "q", tmp_path / word, word)
        with pytest.raises(FileFormatError, match=r"layers\.1\.mlp\.up_proj"):
            arrondi.load(lacking)
        with pytest.raises(FileFormatError, match=r"layers\.1\.mlp\.up_proj"):
            compare_models(lacking, models("llama"), text, seq_len=24, samples=2)
        if "weight_" in word:  # without the model's class nobody knows that a whole layer is gone
            with pytest.raises(FileFormatError, match=r"layers\.1\.mlp\.up_proj"):
                arrondi.dequantize(lacking, tmp_path / "plain")


def test_a_tied_head_may_be_absent(models: Models, text: Path, tmp_path: Path) -> None:
    source = models("llama-tied")
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    report = quantize_model(source, tmp_path / "q", W4, TextOptions(eval_text=text, seq_len=24, eval_samples=2))
    again = compare_models(tmp_path / "q", source, text, seq_len=24, samples=2)
    assert report["evaluation"]["kl_mean"] == again["kl_mean"] > 0
