"""`save_pretrained` of a loaded quantized model: the same checkpoint, or one sentence."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import arrondi
from arrondi.errors import FileFormatError, OutputError, SchemeError
from tests.runtime.small import IDS, linears, logits


@pytest.fixture(scope="module")
def quantized(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, scheme: str = "W4A16", **options: Any) -> Path:
        if (name, scheme) not in made:
            out = made[name, scheme] = tmp_path_factory.mktemp(name) / "out"
            arrondi.quantize(models(name), scheme, out=out, group_size=32, evaluate=False, **options)
        return made[name, scheme]

    return get


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or "index" in p.name}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "W4A16"), ("llama-tied", "W4A16"), ("gpt2", "W4A16"), ("qwen2-moe", "W4A16"), ("phi3-fused-qkv", "w=nf4/g32")],
)  # fmt: skip
def test_the_same_codes_under_the_same_names(name: str, scheme: str, quantized: Callable[..., Path], tmp_path: Path):
    folder, out = quantized(name, scheme), tmp_path / "again"
    model = arrondi.load(folder, dtype="bfloat16")
    model.save_pretrained(out)
    assert weights(out) == weights(folder)
    assert (out / "config.json").read_text() == (folder / "config.json").read_text()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not list(out.glob("*.partial"))
    assert torch.equal(logits(arrondi.load(out, dtype="bfloat16")), logits(model))


def test_shards_and_transformers(quantized: Callable[..., Path], tmp_path: Path):
    folder = quantized("llama", "W8A16", shard_bytes=100_000)
    assert len(weights(folder)) > 3
    model = arrondi.load(folder)
    model.save_pretrained(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    found, wanted = logits(model), logits(theirs)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_copies_are_saved_too_and_settings_of_generation_with_them(quantized: Callable[..., Path], tmp_path: Path):
    folder = quantized("llama")
    model = arrondi.load(folder)
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.generation_config.eos_token_id = [3, 5]
        other.save_pretrained(tmp_path / str(number))
        assert weights(tmp_path / str(number)) == weights(folder)
        assert arrondi.load(tmp_path / str(number)).generation_config.eos_token_id == [3, 5]
    assert model.generation_config.eos_token_id != [3, 5]


def another_norm(model: Any) -> None:
    model.model.norm.weight.mul_(2)


def another_scale(model: Any) -> None:
    linears(model)[3].packed_scale.mul_(2)


def another_head(model: Any) -> None:
    model.lm_head = torch.nn.Linear(64, 2048, bias=False)


def another_layer(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(64, 96, bias=False)


def another_type(model: Any) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_norm, "model.norm.weight"),
        (another_scale, "model.layers.0.self_attn.o_proj.packed_scale"),
        (another_head, "lm_head.weight"),
        (another_layer, "model.layers.0.mlp.gate_proj"),
        (another_type, "weight"),
    ],
)
def test_a_model_that_was_changed_is_refused_by_the_name_of_what_changed(
    change: Callable[[Any], None], named: str, quantized: Callable[..., Path], tmp_path: Path
):
    model = arrondi.load(quantized("llama"))
    with torch.no_grad():
        change(model)
    with pytest.raises(SchemeError, match="was changed after") as caught:
        model.save_pretrained(tmp_path / "out")
    assert str(caught.value).partition(" was changed")[0].startswith(named) or named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_one_sentence(quantized: Callable[..., Path], tmp_path: Path):
    folder = tmp_path / "here"
    shutil.copytree(quantized("llama"), folder)
    model = arrondi.load(folder)
    with pytest.raises(SchemeError, match="takes no push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(OutputError, match="a model is there already"):
        model.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"rms_norm_epsilon"'))
    with pytest.raises(FileFormatError, match="changed since"):
        model.save_pretrained(tmp_path / "out")
    shutil.rmtree(folder)
    with pytest.raises(FileFormatError, match="no such directory"):
        model.save_pretrained(tmp_path / "out")


def test_a_plain_model_is_saved_by_transformers(models: Callable[..., Path], tmp_path: Path):
    model = arrondi.load(models("llama"))
    model.save_pretrained(tmp_path / "out", max_shard_size="1GB")
    assert torch.equal(logits(arrondi.load(tmp_path / "out"), input_ids=IDS), logits(model, input_ids=IDS))


def test_a_model_is_freed_with_its_last_user(quantized: Callable[..., Path]):
    model = arrondi.load(quantized("llama"))
    found = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert found() is None
    finally:
        gc.enable()
