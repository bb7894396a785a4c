"""Models that want other inputs than text: written without data, they are in `load` what they are in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.checkpoint.verdict import TRANSFORMERS
from arrondi.errors import SchemeError
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from tests.contract.cases import OTHER_INPUTS
from tests.contract.measures import IDS, SUMS, distance, loaded, loaded_by_transformers, products, quiet, wrong_product
from tests.zoo import of_transformers

GENERATOR = torch.Generator().manual_seed(7)
PIXELS = torch.randn(2, 3, 32, 32, generator=GENERATOR)
SOUND = torch.randn(2, 8, 64, generator=GENERATOR)
WORDS = IDS[:2, :12]
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "vit": {"pixel_values": PIXELS},
    "dinov2-swiglu": {"pixel_values": PIXELS},
    "clip": {"pixel_values": PIXELS, "input_ids": WORDS},
    "whisper": {"input_features": SOUND, "decoder_input_ids": WORDS},
    "t5": {"input_ids": WORDS, "decoder_input_ids": WORDS.flip(1)},
}
RECIPES = {"weights": "w=int4/g32", "dynamic": "w=int8/channel,a=int8/token"}


def run(name: str, model: Any) -> torch.Tensor:
    """All numbers that a model gives, one after another."""
    with torch.no_grad(), quiet():
        result = model(**INPUTS[name], return_dict=True)
    wanted = ("logits", "logits_per_image", "last_hidden_state", "pooler_output", "image_embeds", "text_embeds")
    return torch.cat([result[key].flatten().float() for key in wanted if result.get(key) is not None])


@pytest.mark.parametrize("scheme", RECIPES)
@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_load_and_transformers_run_one_model(
    name: str, scheme: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantize_model(models(name), out, Recipe.simple(RECIPES[scheme]))
    computed, calls = products(loaded(out, "reference", fuse=False), lambda model: run(name, model))
    assert len(calls) > 2
    native = loaded(out, fuse=False)
    assert wrong_product(native, calls) == ""
    said = next(r for r in report["readers"] if r["reader"] == TRANSFORMERS)
    theirs = loaded_by_transformers(name, out)
    if not said["ok"]:
        assert isinstance(theirs, Exception) or distance(run(name, theirs), computed) > SUMS, said["sentence"]
        return
    found = run(name, theirs)  # first, because transformers unpacks weights when the model is first run
    assert wrong_product(theirs, calls) == ""
    if scheme == "weights":
        assert distance(found, computed) <= SUMS
        assert distance(run(name, native), computed) <= SUMS
        assert distance(run(name, loaded(out)), computed) <= SUMS
        assert distance(run(name, of_transformers(name, models(name))), computed) > SUMS, "something was rounded"


@pytest.mark.parametrize("name", [n for n in OTHER_INPUTS if n not in ("t5", "whisper")])
def test_they_are_not_measured_on_text(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"--method rtn or hqq"):
        quantize_model(models(name), tmp_path / "out", Recipe.simple("w=int4/g32"), TextOptions(eval_text=IDS))
    assert not (tmp_path / "out").exists()
