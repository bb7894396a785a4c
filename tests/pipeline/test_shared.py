"""Blocks that share a weight: it is rounded once, and every block that follows sees it rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import arrondi
import arrondi.model.source as source_module
from arrondi.measure.compare import compare_models
from arrondi.model import OnDisk
from arrondi.nn import QLinear
from arrondi.pipeline import TextOptions, dequantize_model, quantize_model
from arrondi.pipeline.journal import Journal
from tests.pipeline.killer import digest


def share_module(model: Any) -> None:
    """The second block's MLP is the first's."""
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_weight(model: Any) -> None:
    """Two modules, one weight: its parameter has two names."""
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


SHARED: dict[str, tuple[Callable[[Any], None], str]] = {
    "module": (share_module, "model.layers.1.mlp."),
    "weight": (share_weight, "model.layers.1.mlp.down_proj.weight"),
}


@pytest.fixture(params=SHARED)
def source(
    request: pytest.FixtureRequest, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A model whose class shares weights between blocks, and its checkpoint, which stores them once."""
    share, prefix = SHARED[request.param]
    build = source_module.build_model

    def shared(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        share(model)
        return model

    monkeypatch.setattr(source_module, "build_model", shared)
    folder = tmp_path / "shared"
    folder.mkdir()
    for path in models("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, folder / "model.safetensors")
    return folder


def quantized(source: Path, out: Path, text: Path) -> dict[str, Any]:
    options = TextOptions(text, samples=4, seq_len=24, eval_text=text, eval_samples=3)
    return quantize_model(source, out, arrondi.Recipe.simple("W2A16", "gptq", group_size=32), options)


def test_a_shared_weight_has_several_names_and_one_place(source: Path) -> None:
    opened = OnDisk.open(source)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert opened.names.names_of(names[1]) == names and opened.names.missing() == []
    (site,) = (s for s in opened.sites if s.param in names)
    assert site.block == 0 and site.modules == tuple(n.removesuffix(".weight") for n in names)
    instance = opened.instance()
    instance.fill(names[1:])
    assert instance.parameter(names[0]) is instance.parameter(names[1])
    instance.drop(names[:1])
    assert instance.is_empty(names[1])


def test_it_is_rounded_once_and_measured_rounded_everywhere(source: Path, text: Path, tmp_path: Path) -> None:
    report = quantized(source, tmp_path / "out", text)
    names = [r["name"] for r in report["layers"]]
    assert names.count("model.layers.0.mlp.down_proj.weight") == 1
    assert "model.layers.1.mlp.down_proj.weight" not in names
    again = compare_models(tmp_path / "out", source, text, seq_len=24, samples=3)
    assert report["evaluation"]["kl_mean"] == again["kl_mean"] > 0
    assert report["evaluation"]["reference_perplexity"] == again["reference_perplexity"]


def test_the_loaded_model_computes_with_it_in_both_blocks(source: Path, text: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "out", text)
    model = arrondi.load(tmp_path / "out")
    one, two = (model.get_submodule(f"model.layers.{i}.mlp.down_proj") for i in (0, 1))
    assert isinstance(one, QLinear) and isinstance(two, QLinear)
    assert torch.equal(one.dequantize(), two.dequantize())
    assert not any(
        p.numel() == one.in_features * one.out_features for n, p in model.named_parameters() if "down_proj" in n
    )
    plain = tmp_path / "plain"
    dequantize_model(tmp_path / "out", plain, "float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, arrondi.load(plain)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_run_that_was_stopped_between_the_blocks_ends_with_the_same_bytes(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception): ...

    record = Journal.record

    def once(self: Journal, step: str, data: Any, **claims: Any) -> None:
        record(self, step, data, **claims)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Journal, "record", once)
        quantized(source, tmp_path / "out", text)
    quantized(source, tmp_path / "out", text)
    quantized(source, tmp_path / "whole", text)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
