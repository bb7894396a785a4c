"""One truth: what `quantize` reports, what `evaluate` measures, what `load` computes and what transformers computes are one model.

Models that read text. Each case writes a quantized model and asks everyone who can run it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arrondi.checkpoint.verdict import TRANSFORMERS
from arrondi.measure.compare import compare_models
from arrondi.pipeline import TextOptions, quantize_model
from arrondi.runtime.fuse import fuse
from tests.contract.cases import Case, all_cases, chosen_cases
from tests.contract.measures import (  # fmt: skip
    IDS,
    SUMS,
    Calls,
    distance,
    divergence,
    loaded,
    loaded_by_transformers,
    products,
    quiet,
    rounded_by_load,
    rounded_by_transformers,
    rounded_on_the_way,
    without_rounding,
    wrong_product,
)
from tests.zoo import outputs

CHOSEN = chosen_cases()
CASES = [
    pytest.param(case, id=str(case), marks=() if case in CHOSEN else pytest.mark.full)
    for case in dict.fromkeys([*CHOSEN, *all_cases()])
]
FUSED = ("llama", "llama-tied", "qwen3", "qwen2.5-vl")
"""Models with blocks that are computed in few compiled calls."""
Spelled = Callable[[str, str], Path]


def run(model: Any) -> torch.Tensor:
    return outputs(model, IDS)


@pytest.mark.parametrize("case", CASES)
def test_all_who_run_it_run_one_model(
    case: Case, spelled: Spelled, originals: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    source, out, original = spelled(case.model, case.spelling), tmp_path / "out", originals(case.model)
    text = TextOptions(calibration=IDS, eval_text=IDS, eval_samples=len(IDS))
    with rounded_on_the_way() as by_quantize:
        report = quantize_model(source, out, case.recipe, text)
    with rounded_on_the_way() as by_evaluate:
        measured = compare_models(out, source, IDS)

    plain = loaded(out, "reference", fuse=False)
    computed, calls = products(plain, run)
    causal = "kl_mean" in measured
    key = "kl_mean" if causal else "relative_error"
    assert measured[key] == pytest.approx(report["evaluation"][key], rel=1e-3), "evaluate on the files, and quantize"
    assert divergence(original, computed, causal) == pytest.approx(measured[key], rel=1e-3), (
        "a plain loop, and evaluate"
    )
    assert measured[key] > 0

    rounded = rounded_by_load(plain)
    assert by_quantize == by_evaluate == rounded
    assert bool(rounded) == case.rounds_inputs

    cost = 0.0
    if rounded:
        cost = distance(run(without_rounding(plain)), computed)
        assert cost > 0
    compiled(case, loaded(out, fuse=False), computed, calls, cost)
    said = next(r for r in report["readers"] if r["reader"] == TRANSFORMERS)
    theirs = loaded_by_transformers(case.model, out)
    why = apart(theirs, computed, calls, rounded, cost)
    assert (why == "") == said["ok"], f"readers.py says {said['sentence']!r}, found: {why or 'the same'}"


def compiled(case: Case, native: Any, computed: torch.Tensor, calls: Calls, cost: float) -> None:
    """The compiled kernels, one call each and in fused blocks, compute what the reference computes.

    Where inputs are rounded, the last bit of a sum moves some of them over the edge between two codes. Products of the same input are
    compared, so that one edge does not move the next; and as wholes the models may be as far apart as two roundings of the
    same inputs, each of which is as far from the unrounded model as `cost` says.
    """
    assert wrong_product(native, calls) == ""
    bound = SUMS + 2 * cost
    found = run(native)
    assert distance(found, computed) <= bound, "compiled kernels"
    fused = fuse(native)
    assert distance(run(native), found) <= bound, "fused blocks"
    assert case.model not in FUSED or case.scheme == "turned" or None in fused.values(), "some blocks are fused"


def apart(theirs: Any, computed: torch.Tensor, calls: Calls, rounded: set[str], cost: float) -> str:
    """Why transformers does not run the model that the files mean, "" if it does."""
    if isinstance(theirs, Exception):
        return f"{type(theirs).__name__}: {str(theirs)[:200]}"
    if rounded_by_transformers(theirs) != rounded:
        return f"it rounds other inputs: {sorted(rounded_by_transformers(theirs) ^ rounded)[:3]}"
    try:
        with quiet():
            found = distance(
                run(theirs), computed
            )  # first, because transformers unpacks weights when the model is first run
        wrong = wrong_product(theirs, calls)
    except Exception as error:
        return f"it does not run: {type(error).__name__}: {str(error)[:200]}"
    if wrong:
        return wrong
    return "" if found <= SUMS + 2 * cost else f"{found:.1e} off"
