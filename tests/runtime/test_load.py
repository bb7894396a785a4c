"""What `load` computes is what the file says, also where no packed module can hold a weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import arrondi
from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme, parse_scheme
from arrondi.measure.compare import compare_models
from tests.checkpoint.copies import distance, linears, logits, quantized_copy, reference

STATIC = parse_scheme("w=int8/channel,a=int8/tensor/static")


@pytest.mark.parametrize(
    ("model", "kept"), [("hunyuan", "gate.wg"), ("llama4", "router"), ("rwkv", "attention.output")]
)
def test_inputs_are_rounded_also_where_the_weight_stays_dense(
    model: str, kept: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    """Files of other tools quantize routers, and weights that the model reads itself."""
    pick = linears(STATIC)
    made = quantized_copy(models(model), tmp_path / "out", lambda n, s: STATIC if kept in n else pick(n, s))
    assert any(kept in name for name in made)
    loaded, wanted = arrondi.load(tmp_path / "out"), logits(reference(models(model), tmp_path / "reference", made))
    assert distance(logits(loaded), wanted) < 1e-5
    unrounded = logits(reference(models(model), tmp_path / "again", made, rounded=False))
    assert distance(unrounded, wanted) > 1e-3, "the rounding of inputs must show"
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("scheme", "which", "words"),
    [
        (STATIC, "embed_tokens", "token ids"),
        (parse_scheme("w=int8/channel,o=int8/token"), "up_proj", "rounds outputs"),
    ],
)
def test_what_is_not_computed_is_refused_and_not_left_out(
    scheme: LayerScheme, which: str, words: str, models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = models("llama"), tmp_path / "out"
    quantized_copy(source, out, lambda n, s: scheme if which in n else None)
    with pytest.raises(SchemeError, match=words):
        arrondi.load(out)
    with pytest.raises(SchemeError, match=words):
        compare_models(out, source, text, seq_len=24, samples=1)
    made = quantized_copy(source, tmp_path / "plain", lambda n, s: LayerScheme(scheme.weights) if which in n else None)
    wanted = logits(reference(source, tmp_path / "reference", made))
    assert distance(logits(arrondi.load(tmp_path / "plain")), wanted) < 1e-5
