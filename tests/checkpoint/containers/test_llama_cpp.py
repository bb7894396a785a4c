"""llama.cpp computes from our GGUF files what we predict. ARRONDI_LLAMA_CPP names an interpreter with llama-cpp-python."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.pipeline.convert import convert_model
from tests.checkpoint.containers.test_gguf import FAMILIES

pytestmark = pytest.mark.peer

TOKENS = tuple(range(1, 13))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **FAMILIES,
    "gemma3": ("gemma3", {"num_hidden_layers": 6, "layer_types": None}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "biases": ("llama", {"attention_bias": True}),
}


def theirs(file: Path) -> torch.Tensor:
    python = os.environ.get("ARRONDI_LLAMA_CPP", "")
    if not python:
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs ARRONDI_LLAMA_CPP, an interpreter with llama-cpp-python")
        pytest.skip("ARRONDI_LLAMA_CPP names no interpreter with llama-cpp-python")
    out = file.with_suffix(".npy")
    command = [python, Path(__file__).with_name("llama_logits.py"), file, out, *map(str, TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(out))


def ours(path: Path) -> torch.Tensor:
    return arrondi.load(path)(torch.tensor([TOKENS])).logits[0].detach()


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("name", MODELS)
def test_plain_models(name: str, models: Callable[..., Path], tmp_path: Path) -> None:
    model, changes = MODELS[name]
    plain = models(model, **changes)
    convert_model(plain, tmp_path / "m.gguf", "gguf")
    assert apart(theirs(tmp_path / "m.gguf"), ours(plain)) < 2e-3  # its keys and values are float16


@pytest.mark.parametrize(
    "scheme", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "IQ4_XS"]
)
def test_blocks(scheme: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Inputs are rounded to eight bits there."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    arrondi.quantize(models("llama", **wide), scheme, out=tmp_path / "m.gguf", to="gguf")
    assert apart(theirs(tmp_path / "m.gguf"), ours(tmp_path / "m.gguf")) < 3e-2
