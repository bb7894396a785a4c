"""Memory: one block, not the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
BLOCK = 4 * (4 * 512 * 512 + 3 * 512 * 512)
"""Bytes of a block's weights in float32."""


def peaks_of(cases: dict[str, dict[str, Any]], work: Path) -> dict[str, tuple[int, int]]:
    """Case → bytes that were measured, and bytes that the plan had said."""
    command = [sys.executable, "-m", "tests.pipeline.peak", str(work), json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, tuple[int, int]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_peak_memory_is_that_of_a_block_and_what_the_plan_said(models: Callable[..., Path], tmp_path: Path) -> None:
    few, many = (str(models("llama", torch.bfloat16, num_hidden_layers=n, **WIDE)) for n in (2, 10))
    methods: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {"method": "gptq", "samples": 2, "eval_samples": 1}}
    cases = {f"{m} {n}": {"model": n, **case} for m, case in methods.items() for n in (few, many)}
    peaks = peaks_of({"small": {"model": str(models("llama", num_hidden_layers=1))}, **cases}, tmp_path)
    for method in methods:
        (a, _), (b, said) = peaks[f"{method} {few}"], peaks[f"{method} {many}"]
        # Eight layers more are the bytes of four such blocks on disk (bfloat16), and of eight in float32.
        assert b - a < 1.5 * BLOCK, peaks
        assert a > 0, "it was measured"
        assert 0.5 < said / b < 3, peaks
