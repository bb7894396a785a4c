"""Prints how much memory `quantize_model` needs at its peak, beyond what the imported libraries take. A script, not a test.

Every run is a forked process: its peak begins at what its parent holds, and no run inherits another's free heap.

    python -m tests.pipeline.peak WORK TEXT SMALL MODEL…    →  one JSON document, {model: {method: bytes}}
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch

import arrondi
from arrondi.pipeline import TextOptions, quantize_model
from tests.pipeline.killer import child

METHODS = ("rtn", "gptq")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def quantize(model: str, out: Path, text: str, method: str) -> None:
    recipe = arrondi.Recipe.simple("W4A16", method, group_size=32)
    options = None if method == "rtn" else TextOptions(Path(text), samples=2, seq_len=32, eval_samples=1)
    quantize_model(model, out, recipe, options)


def main(work: str, text: str, small: str, *models: str) -> None:
    torch.set_num_threads(1)
    for method in METHODS:
        quantize(small, Path(work) / "warm" / method, text, method)
    found: dict[str, dict[str, int]] = {}
    for model in models:
        for method in METHODS:
            start, end = os.pipe()

            def job(model: str = model, method: str = method, end: int = end) -> None:
                before = peak()
                quantize(model, Path(work) / Path(model).name / method, text, method)
                os.write(end, str(peak() - before).encode())

            assert child(job) == 0
            os.close(end)
            with os.fdopen(start) as pipe:
                found.setdefault(model, {})[method] = int(pipe.read())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
