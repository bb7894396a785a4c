"""Numbers that are not finite: before, in and after rounding, the site is named, and what can be done is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import arrondi
from arrondi.errors import DataError
from arrondi.pipeline import unit
from arrondi.pipeline.rounded import Rounded, round_alone, round_together
from tests.zoo import make, save

SITE = "model.layers.1.mlp.up_proj.weight"


def quantize(model: Path, out: Path, text: Path, scheme: str = "w=int4/g32", **options: Any) -> dict[str, Any]:
    report: dict[str, Any] = arrondi.quantize(
        model, scheme, calibration=text, out=out, samples=4, seq_len=32, eval_samples=2, **options
    )
    return report


def spoilt(how: Callable[..., Any]) -> Callable[..., Any]:
    """A way of rounding that gives NaN for one site."""

    def rounds(*given: Any, **named: Any) -> Any:
        done = how(*given, **named)
        name = given[0][-1].name if isinstance(given[0], list) else given[4]
        last: Rounded = done[-1] if isinstance(done, list) else done
        if name == SITE:
            assert isinstance(last.q.scale, torch.Tensor)
            last.q.scale[0] = torch.nan
        return done

    return rounds


def test_what_a_method_spoils_is_rounded_by_the_fallback_and_said(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "round_together", spoilt(round_together))
    report = quantize(models("llama"), tmp_path / "out", text, method="gptq")
    ways = {row["name"]: (row["method"], row.get("why")) for row in report["layers"]}
    assert ways.pop(SITE) == ("rtn", "gptq gave NaN or infinity")
    assert set(ways.values()) == {("gptq", None)}
    assert report["evaluation"]["kl_mean"] < 1


def test_what_the_fallback_spoils_too_is_refused_by_name(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "round_together", spoilt(round_together))
    monkeypatch.setattr(unit, "round_alone", spoilt(round_alone))
    with pytest.raises(DataError, match=rf"{SITE}: rtn gives NaN or infinity as .*--ignore"):
        quantize(models("llama"), tmp_path / "out", text, method="gptq")


@pytest.mark.parametrize("scheme", ["w=int4/g32", "w=int8/channel,a=int8/token"])
def test_the_layer_whose_inputs_are_not_finite_is_named(scheme: str, text: Path, tmp_path: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    folder = save(model, tmp_path / "model")
    with pytest.raises(DataError, match=r"the input of model\.layers\.1\.mlp\.(gate|up)_proj"):
        quantize(folder, tmp_path / "out", text, scheme, method="gptq")
