"""What is no chain is run as a whole, or refused with a sentence; never run wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.model import Budget, OnDisk, Stream, settle, walk
from tests.zoo import of_transformers, outputs

Models = Callable[..., Path]
IDS = torch.randint(3, 2000, (3, 23), generator=torch.Generator().manual_seed(5))
WHOLE = ["rwkv", "albert"]
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
