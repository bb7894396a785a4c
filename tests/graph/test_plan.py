"""A plan of a network is what quantizing makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import arrondi
from arrondi.cli import _run
from arrondi.errors import SchemeError
from arrondi.graph import read_graph, write_graph
from tests.graph.nets import Residual, images, perturbed

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), path)
    return path


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("W8A8", "rtn"),
        ("W4A8", "adaround"),
        ("w=int8/tensor", "rtn"),
        ("w=int4/channel/asym,a=uint8/tensor/asym", "rtn"),
    ],
)
def test_a_plan_says_what_becomes_of_a_network(file: Path, tmp_path: Path, scheme: str, method: str) -> None:
    plan = arrondi.plan(file, scheme, method=method)
    report = arrondi.quantize(file, scheme, method=method, calibration=images(40), out=tmp_path / "out.onnx")
    for key in ("layer", "shape", "status", "scheme", "bits_per_weight"):
        assert [row.get(key) for row in plan["layers"]] == [row.get(key) for row in report["layers"]]
    assert plan["bits_per_weight"] == report["bits_per_weight"] and plan["activations"] == report["activations"]
    assert plan["notes"] == report["notes"] and plan["float_operators"] == report["float_operators"]
    assert plan["needs_samples"] is (scheme in ("W8A8", "W4A8"))
    assert plan["methods"] == [method]
    assert plan["bytes"] == sum(row["bytes"] for row in plan["layers"]) < plan["float_bytes"] / 2


def test_commands_print_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["plan", str(file), "--scheme", "W4A8", "--ends", "same", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {row["scheme"] for row in rows} == {"int4/channel"}
    out = tmp_path / "out.onnx"
    assert _run(["quantize", str(file), "-o", str(out), "--scheme", "W4A8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "int4/channel" in said and "Samples are needed" in said and not out.exists()


def test_what_a_file_cannot_hold_is_refused(file: Path) -> None:
    for scheme, said in (("w=nf4/g64", "hold integers"), ("w=int4/b8x8", "cannot hold"), ("w=int4/g32", "does not divide")):  # fmt: skip
        with pytest.raises(SchemeError, match=said):
            arrondi.plan(file, scheme)
    with pytest.raises(SchemeError, match="takes no --seq-len"):
        _run(["plan", str(file), "--seq-len", "64"])
