"""Memory: one block, not the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
BLOCK = 4 * (4 * 512 * 512 + 3 * 512 * 512)
"""Bytes of a block's weights in float32."""


def test_peak_memory_does_not_grow_with_the_number_of_layers(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    few, many = (str(models("llama", torch.bfloat16, num_hidden_layers=n, **WIDE)) for n in (2, 10))
    small = str(models("llama", num_hidden_layers=1))
    command = [sys.executable, "-m", "tests.pipeline.peak", str(tmp_path), str(text), small, few, many]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    peaks = json.loads(result.stdout.splitlines()[-1])
    for method in ("rtn", "gptq"):
        # Eight layers more are the bytes of four such blocks on disk (bfloat16), and of eight in float32.
        assert peaks[many][method] - peaks[few][method] < 1.5 * BLOCK, peaks
        assert peaks[few][method] > 0, "it was measured"
