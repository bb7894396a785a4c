"""`inspect --outliers`: inputs that are far larger than others are found where they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from arrondi.errors import SchemeError
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from arrondi.pipeline.outliers import inspect_outliers
from tests.pipeline.toys import data

PLANTED = 37


@pytest.fixture
def planted(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A Llama whose second attention reads a channel that is far larger than the others."""
    path = tmp_path / "planted"
    shutil.copytree(models("llama"), path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][PLANTED] *= 200
    save_file(tensors, file, {"format": "pt"})
    return path


def test_a_planted_channel_is_found_and_the_numbers_are_those_of_a_plain_loop(planted: Path) -> None:
    ids = data(6, 24, 3)
    found = inspect_outliers(planted, ids)
    rows = {row["read_by"][0]: row for row in found["inputs"]}
    own = next(row for row in found["inputs"] if "model.layers.1.self_attn.q_proj.weight" in row["read_by"])
    assert own["outliers"] == [PLANTED]
    assert not any(row["outliers"] for row in found["inputs"] if "layers.0" in row["read_by"][0])
    assert own["int8_error"]["tensor"] > own["int8_error"]["token"] >= own["int8_error"]["group"]

    model = transformers.AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float32).eval()
    seen: list[np.ndarray] = []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].numpy()))
    with torch.no_grad():
        model(torch.as_tensor(ids))
    x = np.concatenate(seen).astype(np.float64)
    centred = x - x.mean()
    assert own["kurtosis"] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-4)
    assert own["absmax"] == pytest.approx(np.abs(x).max(), rel=1e-5)
    assert own["median_channel"] == pytest.approx(np.sort(np.abs(x).reshape(-1, x.shape[-1]).max(0))[(x.shape[-1] - 1) // 2], rel=1e-5)  # fmt: skip
    step = np.abs(x).reshape(-1, x.shape[-1]).max(1, keepdims=True) / 127
    flat = x.reshape(-1, x.shape[-1])
    error = ((np.round(flat / step).clip(-128, 127) * step - flat) ** 2).sum() / (flat**2).sum()
    assert own["int8_error"]["token"] == pytest.approx(error, rel=0.05)
    assert len(rows) == 3 * 4, "one for every activation that layers of a block read"


def test_a_quantized_model_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    quantize_model(models("llama"), tmp_path / "out", Recipe.simple("w=int8/channel"), TextOptions(evaluate=False))
    with pytest.raises(SchemeError, match=r"already quantized\. Inspect the original"):
        inspect_outliers(tmp_path / "out", data(2, 24, 1))
