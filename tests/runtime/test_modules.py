"""Models of transformers that were quantized in memory, to files and back."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
from arrondi.errors import SchemeError
from tests.zoo import of_transformers

IDS = torch.arange(48).reshape(2, 24) * 37 % 2048
CALIBRATION = torch.arange(96).reshape(4, 24) * 41 % 2048


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


# Falcon has linears of a class of its own, and starts only around whole weights; Mixtral's experts are one parameter.
@pytest.mark.parametrize(("name", "scheme"), [("llama", "W8A8_STATIC"), ("llama-tied", "w=int4/g16"), ("falcon", "w=int4/g16"), ("mixtral", "W8A8_STATIC"), ("gpt2", "w=int4/g16")])  # fmt: skip
def test_what_is_saved_loads_everywhere(name: str, scheme: str, models: Any, tmp_path: Path) -> None:
    plain = of_transformers(name, models(name))
    model = copy.deepcopy(plain)
    arrondi.quantize(model, scheme, calibration=CALIBRATION if "STATIC" in scheme else None)
    found = logits(model)
    assert 1e-3 < apart(found, logits(plain)) < 0.9
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert (saved / "generation_config.json").exists()
    limit = 1e-5 if "a=" not in scheme else 0.05
    assert apart(logits(arrondi.load(saved)), found) < limit
    assert torch.equal(logits(arrondi.load(saved, model=copy.deepcopy(plain))), found)
    if name != "mixtral":  # its experts are one tensor, which arrondi alone reads
        assert apart(logits(type(plain).from_pretrained(saved).eval()), found) < limit


def test_a_copy_saves_itself_and_options_are_refused(models: Any, tmp_path: Path) -> None:
    model = of_transformers("llama", models("llama"))
    arrondi.quantize(model, "w=int4/g16")
    other = copy.deepcopy(model)
    found = logits(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "own")
    assert apart(logits(arrondi.load(tmp_path / "own")), found) < 1e-5
    assert apart(logits(arrondi.load(tmp_path / "other")), logits(other)) < 1e-5 < apart(logits(other), found)
    with pytest.raises(SchemeError, match="takes no max_shard_size"):
        model.save_pretrained(tmp_path / "third", max_shard_size="1GB")


def test_a_model_that_nobody_holds_is_saved_and_then_freed(models: Any, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    arrondi.quantize(models("llama"), "w=int4/g16", out=quantized, evaluate=False)
    found = logits(arrondi.load(quantized))
    arrondi.load(quantized).save_pretrained(tmp_path / "again")
    copy.deepcopy(arrondi.load(quantized)).save_pretrained(tmp_path / "copy")
    fresh = of_transformers("llama", models("llama"))
    arrondi.load(quantized, model=fresh).save_pretrained(tmp_path / "filled")
    for name in ("again", "copy", "filled"):
        assert torch.equal(logits(arrondi.load(tmp_path / name)), found), name

    model = arrondi.load(quantized)
    gone = weakref.ref(model.model.layers[0].mlp.down_proj)
    gc.disable()
    try:
        del model
        assert gone() is None, "no cycle keeps a model alive"
    finally:
        gc.enable()


def test_what_was_quantized_after_it_was_loaded_is_not_written_by_halves(models: Any, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    arrondi.quantize(models("llama"), "w=int4/g16", out=quantized, evaluate=False)
    model = arrondi.load(quantized)
    arrondi.quantize(model, "w=int8/channel", targets=["lm_head"], ignore=[])
    for save in (model.save_pretrained, lambda out: arrondi.save(model, out)):
        with pytest.raises(SchemeError, match="Quantize the original model"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
