"""Models with an encoder and a decoder: what text reaches is calibrated, and what they write is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
from arrondi.measure.calling import Calling
from arrondi.measure.metrics import kl_divergence
from arrondi.model import OnDisk
from tests.zoo import VOCABULARY, of_transformers

Models = Callable[..., Path]
START = {"t5": 0, "bart": 2, "marian": 1, "mt5": 0, "whisper": 1}


@pytest.mark.parametrize(("name", "method"), [("t5", "gptq"), ("bart", "awq"), ("marian", "gptq"), ("whisper", "gptq")])
def test_the_text_that_they_write_is_measured(name: str, method: str, models: Models, tmp_path: Path) -> None:
    """The divergence is that of a plain loop over what transformers computes, written apart."""
    path, ids = models(name), torch.randint(3, VOCABULARY, (20, 24))
    report = arrondi.quantize(
        path, method=method, calibration=ids[:16], evaluation=ids[16:], out=tmp_path / "out", group_size=32
    )
    original, packed = of_transformers(name, path), arrondi.load(tmp_path / "out").float()
    found = []
    for i, window in enumerate(ids[16:, None]):
        given: dict[str, Any] = {"decoder_input_ids": torch.cat([torch.tensor([[START[name]]]), window[:, :-1]], 1)}
        if name == "whisper":
            calling = Calling.of(original)
            given["input_features"] = calling(ids[16:])["input_features"][i : i + 1]  # type: ignore[call-overload]
        else:
            given["input_ids"] = window
        with torch.no_grad():
            first, second = (m(**given).logits[0, :-1] for m in (original, packed))
        found.append(kl_divergence(first, second))
    assert report["evaluation"]["kl_mean"] == pytest.approx(float(torch.cat(found).mean()), rel=2e-3)
    assert "decoder writes it from its start token" in report["evaluation"]["protocol"]
    again = arrondi.evaluate(tmp_path / "out", path, ids[16:])
    assert again["kl_mean"] == pytest.approx(report["evaluation"]["kl_mean"], rel=1e-3)
    rows = {row["name"]: row for row in report["layers"]}
    heard = [n for n, row in rows.items() if row["calibration_tokens"]]
    assert set(heard) == set(rows), "both halves, as far as they are quantized"
    assert any("decoder" in n for n in rows) and any("encoder." in n for n in rows) == (name != "whisper")


def test_an_encoder_that_reads_no_text_is_kept_and_said_so(models: Models, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (20, 24))
    asked: dict[str, Any] = {"method": "gptq", "calibration": ids[:16], "evaluation": ids[16:], "group_size": 32}
    report = arrondi.quantize(models("whisper"), **asked, out=tmp_path / "out")
    kept = [k for k in report["kept"] if "encoder.layers" in k["name"] and "text does not reach it" in k["reason"]]
    assert len(kept) == 12 and not any("--calibration-images" in k["reason"] for k in kept)
    assert any("12 weights that text does not reach" in n for n in report["notes"])
    assert any("noise as input_features" in n for n in report["notes"])
    named = arrondi.quantize(models("whisper"), **asked, out=tmp_path / "all", targets=[r"re:model\.encoder\.layers"])
    assert len(named["layers"]) == 12 and all(row["calibration_tokens"] for row in named["layers"])


@pytest.mark.parametrize("name", ["t5", "bart", "mt5", "marian"])
def test_the_start_is_that_of_the_models_own_rule(name: str, models: Models) -> None:
    """Where transformers can make inputs of the decoder from labels, ours are the same."""
    model, ids = of_transformers(name, models(name)), torch.randint(3, VOCABULARY, (2, 9))
    ours = Calling.of(OnDisk.open(models(name)).model)(ids)
    assert isinstance(ours, dict)
    assert torch.equal(ours["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(ids))
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, model(input_ids=ids, labels=ids).logits)


def test_computed_tables_of_positions_are_what_transformers_computes(models: Models) -> None:
    """Marian's file lacks them."""
    instance = OnDisk.open(models("marian")).instance()
    expected = of_transformers("marian", models("marian")).model.encoder.embed_positions.weight
    instance.fill(["model.encoder.embed_positions.weight"])
    assert torch.equal(instance.parameter("model.encoder.embed_positions.weight"), expected)


def test_inputs_that_overflow_are_named(models: Models, tmp_path: Path) -> None:
    """Where calibration gives a layer NaN or infinity, the sentence says which layer."""
    model, ids = of_transformers("t5", models("t5")), torch.randint(3, VOCABULARY, (8, 16))
    with torch.no_grad():
        model.decoder.block[1].layer[2].DenseReluDense.wi.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "huge")
    with pytest.raises(arrondi.DataError, match=r"the input of decoder.*NaN or infinite"):
        arrondi.quantize(tmp_path / "huge", method="gptq", calibration=ids, out=tmp_path / "out", evaluate=False)
