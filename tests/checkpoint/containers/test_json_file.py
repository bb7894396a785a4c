"""Documents that any JSON parser reads, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from arrondi.checkpoint import plain_json, read_report, write_config, write_json
from arrondi.errors import OutputError

INF, NAN = math.inf, math.nan


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("document", "plain"),
    [
        (1.5, 1.5),
        (INF, "inf"),
        (-INF, "-inf"),
        (NAN, None),
        ({"a": [1, INF, {"b": (NAN, -INF)}]}, {"a": [1, "inf", {"b": [None, "-inf"]}]}),
        ({"x": True, "y": None, "z": "ü", "n": 10**30}, {"x": True, "y": None, "z": "ü", "n": 10**30}),
        ("name\udcff", "name\\udcff"),
    ],
)
def test_what_json_lacks_becomes_what_it_has(document: Any, plain: Any, tmp_path: Path) -> None:
    assert plain_json(document) == plain
    write_json(tmp_path / "x.json", document)
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == plain


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5).filter(lambda w: w not in ("inf", "-inf"))  # fmt: skip


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8))  # fmt: skip
def test_a_report_comes_back_with_its_infinities(document: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        write_json(path, document)
        strict(path.read_text(encoding="utf-8"))
        assert read_report(path) == document


@pytest.mark.parametrize("value", [INF, -INF, NAN, 0.25])
def test_transformers_reads_the_numbers_of_a_config(value: float, tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", {"model_type": "x", "limit": value, "limits": [0.0, value]})
    strict((tmp_path / "config.json").read_text())
    config, _ = PreTrainedConfig.get_config_dict(tmp_path)
    read = PreTrainedConfig.from_dict(PreTrainedConfig._dict_from_json_file(tmp_path / "config.json"))
    for found in (read.limit, *read.limits[1:]):
        assert found == value or (math.isnan(found) and math.isnan(value))
    assert config["model_type"] == "x"


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 200_000])
def test_a_report_that_cannot_be_read_is_one_sentence(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"report\.json: cannot be read .* Delete .* and run again"):
        read_report(tmp_path / "report.json")


def full(*args: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError):
        write_json(path, {"new": "ü"})
    assert json.loads(path.read_text()) == {"old": 1}
    monkeypatch.undo()
    write_json(path, {"new": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"new": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
