"""A short run of the fuzzer of graphs, and that it would notice."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from tests.checkpoint.containers.onnx_nets import in_blocks, mlp
from tests.fuzz.graphs import KINDS, bases, plain_values, run, verdict


def test_mutants_are_read_or_refused() -> None:
    result = run(seed=2026, mutants=150, seconds=300)
    assert result.mutants == 150 * len(KINDS)
    assert not result.failures, result.failures[:3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_whole_is_read(kind: str, tmp_path: Path) -> None:
    for raw in bases()[kind]:
        assert verdict(raw, kind, tmp_path) is None


def test_a_number_that_is_silently_another_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain decoder says otherwise if the middle of the codes is taken for another one."""
    model = in_blocks(mlp(), 4, True)
    real = plain_values(model)
    monkeypatch.setattr("tests.fuzz.graphs.plain_values", lambda m: {n: [v + 1 for v in vs] for n, vs in real.items()})
    assert "other numbers" in str(verdict(model.SerializeToString(), "onnx blocks", tmp_path))
    assert numpy_helper.to_array(onnx.load_from_string(model.SerializeToString()).graph.initializer[0]).size
