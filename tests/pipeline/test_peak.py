"""Memory: one unit, not the model; and the plan says beforehand how much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
BLOCK = 4 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
"""Bytes of a block's weights in float32."""
WORDS = {"vocab_size": 60_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
LOGITS = 4 * 60_000 * 128
"""Bytes of the logits of one window of one model."""
EXPERTS = {"hidden_size": 256, "moe_intermediate_size": 256, "num_local_experts": 32, "num_hidden_layers": 2, "num_attention_heads": 8}  # fmt: skip
DATA = {"samples": 4, "eval_samples": 4, "seq_len": 128}


@pytest.fixture(scope="module")
def peaks(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Case → the measured peak and the estimated one, both beyond what libraries take."""
    few, many = (str(models("llama", torch.bfloat16, num_hidden_layers=n, **WIDE)) for n in (2, 4))
    words = str(models("llama", torch.bfloat16, **WORDS))
    cases: dict[str, dict[str, Any]] = {
        "few, rtn": {"model": few},
        "many, rtn": {"model": many},
        "few, rtn, measured": {"model": few, **DATA, "samples": 0},
        "few, gptq": {"model": few, "method": "gptq", **DATA},
        "many, gptq": {"model": many, "method": "gptq", **DATA},
        "words with head, measured on 2": {"model": words, "head": True, "eval_samples": 2, "seq_len": 128},
        "words with head, measured on 12": {"model": words, "head": True, "eval_samples": 12, "seq_len": 128},
        "experts, gptq": {"model": str(models("qwen3-moe", torch.bfloat16, **EXPERTS)), "method": "gptq", **DATA},
    }
    work = tmp_path_factory.mktemp("peaks")
    command = [sys.executable, "-m", "tests.pipeline.peak", str(work), json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    return {name: (measured, estimated) for name, (measured, estimated) in found.items()}


def test_peak_memory_does_not_grow_with_the_number_of_layers(peaks: dict[str, tuple[int, int]]) -> None:
    for method in ("rtn", "gptq"):
        few, many = peaks[f"few, {method}"][0], peaks[f"many, {method}"][0]
        assert few > BLOCK, "it was measured"
        assert many - few < 0.4 * BLOCK, f"two layers more took {many - few} bytes more"


def test_outputs_are_not_kept(peaks: dict[str, tuple[int, int]]) -> None:
    few, many = (peaks[f"words with head, measured on {n}"][0] for n in (2, 12))
    assert many - few < 3 * LOGITS, f"ten windows more took {many - few} bytes more, the logits of one are {LOGITS}"


def test_the_plan_knows_the_peak(peaks: dict[str, tuple[int, int]]) -> None:
    for name, (measured, estimated) in peaks.items():
        assert measured <= 1.25 * estimated, (name, measured, estimated)
        assert estimated <= 2 * measured, (name, measured, estimated)
