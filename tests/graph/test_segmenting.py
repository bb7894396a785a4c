"""A segmentation network of dilated, joined and transposed convolutions, and biases as int32 codes, beside ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import SchemeError
from arrondi.graph import Program, read_graph, write_graph
from tests.graph.nets import Segmenting, images, perturbed

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Segmenting()), images(2)), path)
    return path


def run(path: Path, x: torch.Tensor, level: str) -> torch.Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(("scheme", "bias"), [("W8A8", False), ("W8A8_STATIC", True), ("W4A8", False)])
def test_what_a_runtime_computes_is_what_was_simulated(network: Path, tmp_path: Path, scheme: str, bias: bool) -> None:
    out, x = tmp_path / "out.onnx", images(4, seed=1)
    report = arrondi.quantize(
        network, scheme, method="rtn", calibration=images(32), out=out, evaluate=False, int32_bias=bias
    )
    assert len(report["layers"]) == 8 and all(row["status"] == "quantized" for row in report["layers"])
    graph, before = read_graph(out), Program(read_graph(network))(x)
    codes = [n for n, v in graph.constants.items() if v.dtype == np.int32]
    assert len(codes) == (8 if bias else 0)
    ours = Program(graph)(x)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        theirs = run(out, x, level)
        away = (ours - theirs).abs()
        limit = 0.004 if level == "ORT_DISABLE_ALL" else 0.02  # codes at ties may differ
        assert float(away.norm() / ours.norm()) < limit, level
        assert float((ours.argmax(1) == theirs.argmax(1)).double().mean()) > 0.98
    lost = float((ours - before).norm() / before.norm())
    assert 0 < lost < (0.5 if scheme == "W4A8" else 0.06)


def test_biases_as_codes_need_a_stored_scale(network: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="--int32-bias"):
        arrondi.quantize(network, "w=int8/channel", out=tmp_path / "out.onnx", evaluate=False, int32_bias=True)
    assert not (tmp_path / "out.onnx").exists()
