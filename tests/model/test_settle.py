"""What is no chain is run as a whole, or refused with a sentence; never run wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi.measure.compare as comparing
import arrondi.pipeline.texts as texts
from arrondi.errors import SchemeError
from arrondi.model import Budget, OnDisk, Stream, settle, walk
from arrondi.pipeline import Recipe, TextOptions, quantize_model
from tests.zoo import of_transformers, outputs

Models = Callable[..., Path]
IDS = torch.randint(3, 2000, (3, 23), generator=torch.Generator().manual_seed(5))
WHOLE = ["rwkv", "albert", "hrm"]
"""Weights that change as the model runs; blocks that run more than once."""
NO_TEXT = ["t5", "whisper", "vit", "clip"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_is_no_chain_is_run_as_a_whole(name: str, models: Models, tmp_path: Path) -> None:
    source = OnDisk.open(models(name))
    (note,) = settle(source, IDS[-1:])
    assert "kept in memory as a whole" in note and source.whole
    assert all(s.block == 0 for s in source.sites)
    units = source.units_of(source.instance())
    with Stream(units, [IDS[:2], IDS[2:]], Budget(1 << 30), tmp_path) as stream:
        stream.begin()
        assert list(walk([[stream]])) == [0]
        found = torch.cat([stream.output(j) for j in range(2)])
    expected = outputs(of_transformers(name, models(name)), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(p.device.type == "meta" for p in units.model.parameters())


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_model_that_wants_other_inputs_is_refused_in_one_sentence(name: str, models: Models) -> None:
    with pytest.raises(SchemeError, match=r"does not run on this data.*--method rtn or hqq") as caught:
        settle(OnDisk.open(models(name)), IDS[-1:])
    assert "\n" not in str(caught.value)


def test_a_whole_model_that_does_not_fit_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with pytest.raises(SchemeError, match=r"Run as a whole it would need twice"):
        settle(OnDisk.open(models("albert")), IDS[-1:])


def leaving(first: Any) -> Any:
    """A block's forward that gives the second block the mean of the first one's output, beside its arguments."""

    def forward(self: Any, hidden: torch.Tensor, **kwargs: Any) -> Any:
        output = first(self, hidden, **kwargs)
        if self.self_attn.layer_idx == 0:
            type(self).left = output.mean()
        return output + type(self).left if self.self_attn.layer_idx == 1 else output

    return forward


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_what_blocks_keep_for_each_other_between_calls_is_refused(
    command: str, models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch alone is right; only when batches take turns the second block sees what another batch left."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(LlamaDecoderLayer, "forward", leaving(LlamaDecoderLayer.forward))
    monkeypatch.setattr(LlamaDecoderLayer, "left", torch.zeros(()), raising=False)
    for module in (texts, comparing):
        monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    source = models("llama")
    one, several = (TextOptions(eval_text=text, seq_len=33, eval_samples=n) for n in (3, 7))
    w8 = Recipe.simple("W8A16", group_size=32)
    quantize_model(source, tmp_path / "one", w8, one)
    with pytest.raises(SchemeError, match="keep something for each other"):
        if command == "quantize":
            quantize_model(source, tmp_path / "several", w8, several)
        else:
            comparing.compare_models(tmp_path / "one", source, text, seq_len=33, samples=7)
