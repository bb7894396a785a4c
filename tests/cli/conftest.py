"""`cli(...)` runs a command in this process, through the same entry point as the installed one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from arrondi.cli import main


@dataclass
class Result:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; anything else there is an error."""
        return dict(json.loads(self.out))


Cli = Callable[..., Result]


def refused(result: Result, *words: str) -> str:
    """The one sentence of a command that was refused, with these words in it: what is wrong, and what to do."""
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err + result.out
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    for word in words:
        assert word in lines[0], lines[0]
    assert lines[0].startswith("arrondi: ")
    said = lines[0].removeprefix("arrondi: ")
    assert ". " in said or ": " in said or " takes " in said, "it says what to do, too"
    return lines[0]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["arrondi", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run
