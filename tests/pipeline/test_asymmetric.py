"""Roundings that follow the original: from the recipe to the file, and from a kill to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arrondi.pipeline import Recipe, TextOptions, quantize_model
from tests.pipeline.stopping import stopped_after
from tests.pipeline.toys import data


@pytest.mark.parametrize(("method", "options"), [("qronos", {}), ("adaround", {"iterations": 60, "rate": 0.1})])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    method: str, options: dict[str, Any], models: Callable[..., Path], tmp_path: Path
) -> None:
    texts = TextOptions(data(6, 24, 1), samples=6, eval_text=data(2, 24, 2))

    def call(out: Path) -> dict[str, Any]:
        return quantize_model(models("llama"), out, Recipe.simple("w=int3/g16", method, options=options), texts)

    report = call(tmp_path / "whole")
    assert {row["method"] for row in report["layers"]} == {method}
    with stopped_after("unit 0"):
        call(tmp_path / "stopped")
    call(tmp_path / "stopped")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes(), file.name
