"""`arrondi inspect --outliers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Cli, refused


def test_the_table_and_the_document(cli: Cli, models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    model = models("llama")
    found = cli("inspect", model, "--outliers", "--calibration", short, "--json").document
    assert found["tokens"] and all(row["int8_error"]["token"] < 0.01 for row in found["inputs"])
    table = cli("inspect", model, "--outliers", "--calibration", short).out
    assert "model.layers.1.self_attn.k_proj +2" in table and "One scale a tensor costs" in table


def test_what_contradicts_itself_is_refused(cli: Cli, models: Callable[..., Path], text: Path) -> None:
    for arguments in (["--outliers"], ["--calibration", text], ["--outliers", "--folds", "--calibration", text]):
        refused(cli("inspect", models("llama"), *arguments), "--outliers with --calibration FILE")
