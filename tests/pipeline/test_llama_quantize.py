"""Our GGUF files beside those of llama.cpp's own quantizer: the same types and sizes, and no larger errors. See `test_llama_cpp`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType, dequantize

import arrondi
from arrondi.checkpoint.layouts.ggml import BLOCKS
from arrondi.pipeline.convert import convert_model
from arrondi.pipeline.mixes import MIXES

pytestmark = pytest.mark.peer

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
MODELS = {
    "llama": ("llama", {**WIDE, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 17}),
    "experts": ("mixtral", {**WIDE, "num_attention_heads": 8, "num_hidden_layers": 2, "num_local_experts": 8}),
    "narrow": ("qwen3", {"hidden_size": 288, "intermediate_size": 320, "head_dim": 32, "num_attention_heads": 8}),
}
NEEDS_A_MATRIX = {"Q2_K_S"}
"""What llama.cpp makes only with an importance matrix."""


def quantized_there(source: Path, mixes: list[str]) -> dict[str, Path]:
    python = os.environ.get("ARRONDI_LLAMA_CPP", "")
    if not python:
        if os.environ.get("ARRONDI_PEERS"):
            pytest.fail("make peers needs ARRONDI_LLAMA_CPP, an interpreter with llama-cpp-python")
        pytest.skip("ARRONDI_LLAMA_CPP names no interpreter with llama-cpp-python")
    numbers = {mix: int(LlamaFileType[f"MOSTLY_{mix}"]) for mix in mixes}
    command = [python, Path(__file__).with_name("llama_quantize.py"), source, source.parent, json.dumps(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and not done.stdout.strip(), (done.stdout, done.stderr[-2000:])
    return {mix: source.with_name(f"{mix}.gguf") for mix in mixes}


@pytest.mark.parametrize("name", MODELS)
def test_mixes_have_the_types_of_llama_cpp_and_no_larger_errors(
    name: str, models: Callable[..., Path], tmp_path: Path
) -> None:
    kind, changes = MODELS[name]
    plain, source = models(kind, **changes), tmp_path / "plain.gguf"
    convert_model(plain, source, "gguf")
    original = {t.name: np.asarray(dequantize(t.data, t.tensor_type)) for t in GGUFReader(source).tensors}
    for mix, file in quantized_there(source, sorted(MIXES.keys() - NEEDS_A_MATRIX)).items():
        ours = tmp_path / "ours.gguf"
        arrondi.quantize(plain, f"mix:{mix}", out=ours, to="gguf", overwrite=True, evaluate=False)
        mine, theirs = ({t.name: t for t in GGUFReader(f).tensors} for f in (ours, file))
        kept = {n for n in mine if mine[n].tensor_type.name not in BLOCKS and "inp" in n}  # routers
        assert {n: t.tensor_type.name for n, t in mine.items() if n not in kept} == {
            n: t.tensor_type.name for n, t in theirs.items() if n not in kept
        }, mix
        for tensor, x in original.items():
            if mine[tensor].tensor_type.name not in BLOCKS:
                continue
            one, two = (
                float(np.square(dequantize(t.data, t.tensor_type) - x).sum()) for t in (mine[tensor], theirs[tensor])
            )
            assert one <= two * 1.04, (mix, tensor, one / two)
