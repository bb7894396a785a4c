"""Prints how much memory runs need at their peak beyond what the imported libraries take, and what the plan had said. A script.

Every run is a forked process: its peak begins at what its parent holds, and no run inherits another's free heap.

    python -m tests.pipeline.peak WORK '{"name": {"model": DIR, "method": "rtn", …}, …}'
        →  one JSON document, {name: [measured bytes, estimated bytes]}

A case has: model, method, scheme, head (the head is quantized too), samples and eval_samples (windows; 0: none), seq_len.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arrondi.model import OnDisk
from arrondi.pipeline import Recipe, TextOptions, make_plan, quantize_model
from arrondi.pipeline.estimate import BASE_BYTES, estimate
from tests.pipeline.killer import child

DEFAULTS: dict[str, Any] = {"method": "rtn", "scheme": "w=int4/g32", "head": False, "samples": 0, "eval_samples": 0, "seq_len": 32}  # fmt: skip


_HIGH = 1.2
"""A peak above its estimate by this factor is measured again."""


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def recipe_of(case: dict[str, Any]) -> Recipe:
    return Recipe.simple(case["scheme"], case["method"], ignore=() if case["head"] else None)


def ids(count: int, length: int) -> torch.Tensor | None:
    return torch.randint(0, 2048, (count, length), generator=torch.Generator().manual_seed(count)) if count else None


def run(case: dict[str, Any], out: Path) -> None:
    length = case["seq_len"]
    evaluation = ids(case["eval_samples"], length)
    texts = TextOptions(ids(case["samples"], length), eval_text=evaluation, evaluate=evaluation is not None)
    quantize_model(case["model"], out, recipe_of(case), texts)


def planned(case: dict[str, Any]) -> int:
    """What the plan says of it, beyond the libraries."""
    plan = make_plan(OnDisk.open(case["model"]), recipe_of(case))
    tokens = [case[n] * case["seq_len"] for n in ("samples", "eval_samples")]
    return estimate(plan, *tokens, case["seq_len"]).bytes - BASE_BYTES


def apart(job: Callable[[], int]) -> int:
    """A number that a forked process finds: what this one holds stays as it is."""
    start, end = os.pipe()

    def find() -> None:
        try:
            os.write(end, str(job()).encode())
        except BaseException:
            traceback.print_exc()
            raise

    assert child(find) == 0
    os.close(end)
    with os.fdopen(start) as pipe:
        return int(pipe.read())


def measured(case: dict[str, Any], out: Path) -> int:
    """What a run needs at its peak beyond what this process holds."""

    def need() -> int:
        before = peak()
        run(case, out)
        return peak() - before

    return apart(need)


def least(name: str, case: dict[str, Any], work: Path) -> int:
    """The peak of a run; of two where it seems high, since pages of the parent that the system took back count when they return."""
    first = measured(case, work / name)
    return (
        first if first <= _HIGH * apart(lambda: planned(case)) else min(first, measured(case, work / f"{name}, again"))
    )


def main(work: str, cases: str) -> None:
    torch.set_num_threads(1)
    asked = {name: {**DEFAULTS, **case} for name, case in json.loads(cases).items()}
    small = next(iter(asked.values()))["model"]
    for name, warm in {"rtn": {}, "gptq": {"method": "gptq", "samples": 2, "eval_samples": 1}}.items():
        run({**DEFAULTS, "model": small, **warm}, Path(work) / "warm" / name)
    peaks = {name: least(name, case, Path(work)) for name, case in asked.items()}
    print(json.dumps({name: [peaks[name], planned(case)] for name, case in asked.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
