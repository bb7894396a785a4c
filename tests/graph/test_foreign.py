"""Operators of other sets than ONNX's own: run by ONNX Runtime if it has them, put in their places if the file says what they are, and else left
as they are where nothing has to be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arrondi
from arrondi.errors import SchemeError
from arrondi.graph import read_graph
from tests.graph.test_bad_input import HEAD, NODES, H, model, node

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
X = np.random.default_rng(7).normal(0, 1, (40, 3, 6, 6)).astype(np.float32)


def save(
    path: Path, op: str, domain: str, version: int = 1, opset: int = 21, functions: Any = (), **attrs: Any
) -> Path:
    made = model([NODES[0], node(op, "c", "a", domain=domain, **attrs), *HEAD], opset=opset)
    made.opset_import[1].CopyFrom(H.make_opsetid(domain, version))
    made.functions.extend(functions)
    onnx.save_model(made, path / "net.onnx")
    return path / "net.onnx"


def run(path: Path) -> np.ndarray:
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0])


FOREIGN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "of the runtime": ("QuickGelu", "com.microsoft", {"alpha": 1.7}),
    "of an old file": ("Gelu", "com.microsoft", {"opset": 13}),
    "of another set of ONNX": ("Binarizer", "ai.onnx.ml", {"threshold": 0.1, "version": 3}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_the_runtime_has_is_run_by_it_and_counted(tmp_path: Path, kind: str) -> None:
    op, domain, more = FOREIGN[kind]
    source, out = save(tmp_path, op, domain, **more), tmp_path / "out.onnx"
    report = arrondi.quantize(source, "W8A8", calibration=X, evaluation=X, out=out)
    assert report["float_operators"] == {f"{domain}.{op}": 1}
    ours, theirs = run(out), run(source)
    wanted = 10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum())
    assert report["evaluation"]["sqnr_db"] == pytest.approx(wanted, abs=0.5) and wanted > 20
    assert read_graph(out).domains == {domain: more.get("version", 1)}


def test_functions_of_a_file_are_put_in_their_places(tmp_path: Path) -> None:
    half = onnx.numpy_helper.from_array(np.float32(0.5))
    inside = [H.make_node("Constant", [], ["k"], value=half), H.make_node("Mul", ["p", "k"], ["q"])]
    function = H.make_function("mine", "Half", ["p"], ["q"], inside, [H.make_opsetid("", 21)])
    source, out = save(tmp_path, "Half", "mine", functions=[function]), tmp_path / "out.onnx"
    report = arrondi.quantize(source, "W8A8", calibration=X, evaluation=X, out=out)
    ours, theirs = run(out), run(source)
    wanted = 10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum())
    assert report["evaluation"]["sqnr_db"] == pytest.approx(wanted, abs=0.5) and wanted > 20


@pytest.mark.parametrize("scheme", ["W8A16", "w=int8/channel,a=uint8/tensor/asym"])
def test_what_nobody_has_stays_where_nothing_has_to_run(tmp_path: Path, scheme: str) -> None:
    source = save(tmp_path, "Frob", "mine", version=4, strength=2)
    with pytest.raises(SchemeError, match=r"knows mine\.Frob \(1\).*leave calibration"):
        arrondi.quantize(source, scheme, calibration=X, out=tmp_path / "out.onnx")
    report = arrondi.quantize(source, scheme, out=tmp_path / "out.onnx")
    assert report["float_operators"] == {"mine.Frob": 1}
    assert all(row["status"] == "quantized" for row in report["layers"])
    written = onnx.load(tmp_path / "out.onnx")
    (kept,) = (n for n in written.graph.node if n.op_type == "Frob")
    assert kept.domain == "mine" and kept.attribute[0].i == 2
    assert {o.domain: o.version for o in written.opset_import}["mine"] == 4
