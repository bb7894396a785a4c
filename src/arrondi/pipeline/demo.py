"""The main job on the sample model: several schemes and methods, side by side, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrondi.pipeline.quantize import quantize_model
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.texts import TextOptions
from arrondi.runtime.generate import generate
from arrondi.sample import sample_path

_RUNS = (("W8A16", "rtn"), ("W4A16", "rtn"), ("W4A16", "gptq"), ("W3A16", "rtn"), ("W3A16", "gptq"))
_PROMPT = "Return a list of"


def run_demo(out: Path, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Quantize the packaged model into `out/SCHEME-METHOD`, measured on the part of its text that was held back.

    Returns:
        one row for each run, the unquantized numbers, and a continuation by the 4-bit GPTQ model.
    """
    sample = sample_path()
    rows = []
    for i, (scheme, method) in enumerate(_RUNS):
        if progress:
            progress(i, len(_RUNS) + 1, f"{scheme} {method}")
        target = out / f"{scheme}-{method}".lower()
        text = TextOptions(sample / "heldout.txt", samples=64, seq_len=256, eval_samples=32)
        report = quantize_model(sample, target, Recipe.simple(scheme, method), text, overwrite=True)
        measured = report["evaluation"]
        rows.append(
            {
                "scheme": scheme,
                "method": method,
                "bits_per_weight": report["bits_per_weight"],
                "bytes": report["output_bytes"],
                "perplexity": measured["perplexity"],
                "kl_mean": measured["kl_mean"],
                "top1_agreement": measured["top1_agreement"],
                "path": str(target),
            }
        )
    if progress:
        progress(len(_RUNS), len(_RUNS) + 1, "generating")
    words = generate(out / "w4a16-gptq", _PROMPT, max_new_tokens=30)
    return {
        "rows": rows,
        "original": {"bytes": report["input_bytes"], "perplexity": measured["reference_perplexity"]},
        "protocol": measured["protocol"],
        "text": words["text"],
    }
