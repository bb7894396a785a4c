"""Real models in the real libraries. Run by `make peers DATA=DIR`; a skip is a failure there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import arrondi

pytestmark = pytest.mark.peer

CAUSAL = {
    "books-llama-6m": ("emma.txt", "the_time_machine.txt"),
    "tinystories-656k": ("tinystories_val_a.txt", "tinystories_val_a.txt"),
}
"""Model → text to calibrate on, text to measure on (its last tenth is held back where they are the same)."""
WAYS = {"widest range": ("rtn", {"range": "absmax"}), "rtn": ("rtn", {}), "hqq": ("hqq", {}), "gptq": ("gptq", {})}


def texts(data: Path, model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text that share nothing."""
    calibration, evaluation = (data / "text" / name for name in CAUSAL[model])
    if calibration != evaluation:
        return calibration, evaluation
    content = calibration.read_text(encoding="utf-8")
    half = len(content) // 2
    for name, part in (("first.txt", content[:half]), ("second.txt", content[half:])):
        (folder / name).write_text(part, encoding="utf-8")
    return folder / "first.txt", folder / "second.txt"


@pytest.mark.parametrize("name", CAUSAL)
def test_gptq_keeps_what_round_to_nearest_loses(name: str, data: Path, tmp_path: Path) -> None:
    calibration, evaluation = texts(data, name, tmp_path)
    kl = {}
    for row, (method, options) in WAYS.items():
        arrondi.quantize(
            data / name, "W3A16", method=method, options=options, calibration=calibration, out=tmp_path / row, samples=32,
            seq_len=256, evaluate=False,
        )  # fmt: skip
        kl[row] = arrondi.evaluate(tmp_path / row, data / name, evaluation, samples=24)["kl_mean"]
    assert kl["gptq"] < 0.5 * kl["widest range"] and kl["gptq"] < 0.75 * kl["rtn"]
    assert kl["rtn"] < 0.95 * kl["widest range"]
    assert kl["hqq"] < 0.95 * kl["widest range"]


@pytest.mark.parametrize("name", CAUSAL)
def test_transformers_computes_what_we_do(name: str, data: Path, tmp_path: Path) -> None:
    arrondi.quantize(data / name, "W4A16", method="hqq", out=tmp_path / "w4")
    ids = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w4", dtype=torch.float32).eval()
    ours = arrondi.load(tmp_path / "w4")
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_8_bits_cost_next_to_nothing(data: Path, tmp_path: Path) -> None:
    arrondi.quantize(data / "books-llama-6m", "W8A16", out=tmp_path / "w8")
    text = data / "text" / "the_time_machine.txt"
    result = arrondi.evaluate(tmp_path / "w8", data / "books-llama-6m", text, samples=24)
    assert result["kl_mean"] < 1e-4
    assert result["top1_agreement"] > 0.99


def test_a_sentence_encoder_keeps_its_vectors(data: Path, tmp_path: Path) -> None:
    model, text = data / "minilm-l6", data / "text" / "wikipedia_calib.txt"
    held = tmp_path / "held.txt"
    held.write_text((data / "text" / "emma.txt").read_text(encoding="utf-8")[:40000], encoding="utf-8")
    error = {}
    for row in ("widest range", "rtn", "gptq"):
        method, options = WAYS[row]
        arrondi.quantize(
            model, "W4A16", method=method, options=options, calibration=text, out=tmp_path / row, samples=16, seq_len=128,
            evaluate=False,
        )  # fmt: skip
        error[row] = arrondi.evaluate(tmp_path / row, model, held, seq_len=128, samples=24)["relative_error"]
    assert error["gptq"] < 0.6 * error["widest range"] and error["gptq"] < 0.75 * error["rtn"]
    loaded, plain = (
        arrondi.load(tmp_path / "gptq"),
        transformers.AutoModel.from_pretrained(tmp_path / "gptq", dtype=torch.float32),
    )
    ids = torch.randint(1000, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids)[0], plain.eval()(input_ids=ids)[0], rtol=1e-4, atol=1e-4)
