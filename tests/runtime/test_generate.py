"""Which type `arrondi generate` computes in. What it generates: tests/pipeline/test_decoding.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import arrondi
from arrondi.checkpoint import Checkpoint
from arrondi.native import native
from arrondi.runtime.fuse import is_fused

module = importlib.import_module("arrondi.runtime.generate")  # the package's `generate` is the function


@pytest.fixture(scope="module")
def quantized(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp(name) / "out"
            arrondi.quantize(models(name, dtype), "W4A16", out=made[name, dtype], group_size=32, evaluate=False)
        return made[name, dtype]

    return get


@pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")
@pytest.mark.parametrize(
    ("name", "stored", "multiplies", "wanted"),
    [
        ("llama", torch.bfloat16, False, torch.bfloat16),
        ("llama", torch.bfloat16, True, torch.bfloat16),
        ("llama", torch.float32, True, torch.float32),
        ("gemma2", torch.bfloat16, False, torch.float32),
        ("gemma2", torch.bfloat16, True, torch.bfloat16),
    ],
    ids=["fused-slow-cpu", "fused-fast-cpu", "stored-in-float32", "not-fused-slow-cpu", "not-fused-fast-cpu"],
)
def test_the_type_that_is_picked(
    name: str,
    stored: torch.dtype,
    multiplies: bool,
    wanted: torch.dtype,
    quantized: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: multiplies)
    model = module.load_fast(Checkpoint.open(quantized(name, stored)), None)
    assert is_fused(model) == (name == "llama")
    assert model.config.dtype == wanted
    assert {p.dtype for p in model.parameters()} == {wanted}


def test_a_plain_model_has_no_products_of_ours(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    for multiplies, wanted in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        model = module.load_fast(Checkpoint.open(models("llama", torch.bfloat16)), None)
        assert {p.dtype for p in model.parameters()} == {wanted}


def test_generate_asks_for_it_unless_a_type_is_named(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    path, asked = quantized("llama", torch.bfloat16), []
    plain = module.load
    monkeypatch.setattr(module, "load", lambda where, **how: asked.append(how["dtype"]) or plain(where, **how))
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    for dtype in ("auto", "float32"):
        assert module.generate(path, "The", max_new_tokens=2, dtype=dtype)["text"].startswith("The")
    assert asked == ["bfloat16", "float32"]
