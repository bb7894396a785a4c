"""Documents that any JSON parser reads, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from arrondi.checkpoint import read_report, write_config, write_json
from arrondi.errors import OutputError

INF, NAN = math.inf, math.nan


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_document_without_numbers_that_are_none_comes_back(tmp_path: Path) -> None:
    document = {"a": [1, 2.5, None, True, {"ü": "é"}], "n": 10**30}
    write_json(tmp_path / "x.json", document)
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == document == read_report(tmp_path / "x.json")


def test_numbers_that_are_none_are_null_with_a_word_beside(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"kl": INF, "rows": [{"sqnr": NAN}]})
    wanted = {"kl": None, "rows": [{"sqnr": None, "not_finite": {"sqnr": "nan"}}], "not_finite": {"kl": "infinity"}}
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == wanted


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"model": os.fsdecode(b"/models/\xff\xfe")})
    assert strict((tmp_path / "x.json").read_text(encoding="utf-8")) == {"model": "/models/\udcff\udcfe"}


@pytest.mark.parametrize("value", [INF, -INF, NAN, 0.25])
def test_transformers_reads_the_numbers_of_a_config(value: float, tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", {"model_type": "x", "limit": value, "limits": [0.0, value]})
    strict((tmp_path / "config.json").read_text())
    config, _ = PreTrainedConfig.get_config_dict(tmp_path)
    read = PreTrainedConfig.from_dict(PreTrainedConfig._dict_from_json_file(tmp_path / "config.json"))
    for found in (read.limit, *read.limits[1:]):
        assert found == value or (math.isnan(found) and math.isnan(value))
    assert config["model_type"] == "x"


@pytest.mark.parametrize("content", [None, b"", b"{", b"7", b"\xff", b"[" * 200_000])
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
