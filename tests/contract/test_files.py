"""The files are the truth: restored they compute what `load` computes, and a run that was stopped ends in the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrondi.checkpoint import Checkpoint
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from tests.contract.cases import Case
from tests.contract.measures import IDS, SUMS, distance, loaded, quiet, without_rounding
from tests.pipeline.killer import digest
from tests.pipeline.stopping import stopped_after
from tests.zoo import of_transformers, outputs

CASES = [Case("llama", "other", "mixed"), Case("gpt2", "usual", "weights"), Case("qwen3-moe", "usual", "static")]
Spelled = Callable[[str, str], Path]


def quantized(case: Case, spelled: Spelled, out: Path) -> Path:
    text = TextOptions(calibration=IDS, eval_text=IDS, eval_samples=len(IDS))
    quantize_model(spelled(case.model, case.spelling), out, case.recipe, text)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_restored_files_are_what_is_loaded(case: Case, spelled: Spelled, tmp_path: Path) -> None:
    out, plain = quantized(case, spelled, tmp_path / "out"), tmp_path / "plain"
    dequantize_model(out, plain, "float32")
    source, packed, restored = (Checkpoint.open(p) for p in (spelled(case.model, case.spelling), out, plain))
    assert not restored.quantized and restored.names == source.names
    changed = {n for n in source.names if not torch.equal(restored.read(n), source.read(n))}
    assert changed == set(packed.placed)
    for name in packed.placed:
        assert torch.equal(restored.read(name), packed.dense(name))

    wanted = outputs(without_rounding(loaded(out, "reference", fuse=False)), IDS)
    with quiet():
        theirs = outputs(of_transformers(case.model, plain), IDS)
    assert distance(theirs, wanted) <= SUMS
    assert distance(outputs(loaded(plain), IDS), wanted) <= SUMS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_is_stopped_after_its_second_unit_ends_in_the_same_bytes(
    case: Case, spelled: Spelled, tmp_path: Path
) -> None:
    with stopped_after("unit 1"):
        quantized(case, spelled, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "config.json").exists()
    assert digest(quantized(case, spelled, tmp_path / "stopped")) == digest(quantized(case, spelled, tmp_path / "out"))
