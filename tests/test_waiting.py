"""OpenMP's threads are asked to sleep by the command line and the runtime, not by importing the library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arrondi.waiting import wait_passively


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that the end of the test restores it
    monkeypatch.delenv("OMP_WAIT_POLICY")


def test_before_torch_it_is_set_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_after_torch_it_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", pytest)
    wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(("statement", "found"), [("import arrondi", "None"), ("import arrondi.runtime", "PASSIVE")])
def test_who_sets_it(statement: str, found: str):
    code = f"{statement}; import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == found, done.stderr
