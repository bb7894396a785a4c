"""A network read, run, quantized and written: what is reported is what a runtime computes from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import ArrondiError
from arrondi.graph import Program, read_graph, tidy, write_graph
from tests.graph.nets import Residual, images, perturbed

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), path)
    return path


def run(path: Path, x: torch.Tensor, level: str = "ORT_DISABLE_ALL") -> torch.Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def test_a_program_computes_what_the_module_and_a_runtime_do(network: Path) -> None:
    x, module = images(5, seed=1), perturbed(Residual())
    found = Program(read_graph(network))(x)
    assert torch.allclose(found, module(x), atol=1e-5)
    assert torch.allclose(found, run(network, x), atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "method"), [("W8A8", "rtn"), ("W4A8", "adaround"), ("W8A8_STATIC", "rtn"), ("W4A16", "rtn")]
)
def test_the_file_computes_what_was_measured(network: Path, tmp_path: Path, scheme: str, method: str) -> None:
    held = images(40, seed=2)
    out = tmp_path / "out.onnx"
    report = arrondi.quantize(network, scheme, method=method, calibration=images(48), evaluation=held, out=out)
    x, float_outputs = held, run(network, held)
    ours, theirs = Program(read_graph(out))(x), run(out, x)
    assert float((ours - theirs).abs().max()) < 0.02 * float(theirs.abs().max()), "codes at ties may differ"
    noise = float((theirs - float_outputs).square().sum())
    assert report["evaluation"]["sqnr_db"] == pytest.approx(
        10 * np.log10(float(float_outputs.square().sum()) / noise), abs=0.3
    )
    agreement = float((theirs.argmax(1) == float_outputs.argmax(1)).double().mean())
    assert report["evaluation"]["agreement"] == pytest.approx(agreement, abs=0.026)
    quantized = [row for row in report["layers"] if row["status"] == "quantized"]
    assert len(quantized) == 5 and all(row["bits_per_weight"] < 13 for row in quantized)


def test_every_value_is_described(network: Path, tmp_path: Path) -> None:
    x = images(32)
    report = arrondi.quantize(
        network, "W8A8", calibration=x, out=tmp_path / "out.onnx", evaluate=False, observer="percentile"
    )
    graph, made, moved = tidy(read_graph(network)), {}, {}
    Program(graph).watch((x,), made.__setitem__)
    Program(read_graph(tmp_path / "out.onnx")).watch((x,), moved.__setitem__)
    assert set(report["ranges"]) <= set(report["values"]) <= set(made)
    for name, row in report["values"].items():
        assert sum(row["histogram"]["counts"]) == made[name].numel()
        noise = float((made[name] - moved[name]).square().sum())
        if row["sqnr_db"] is not None:
            assert row["sqnr_db"] == pytest.approx(10 * np.log10(float(made[name].square().sum()) / noise), abs=0.1)
        if row["range"] is not None:
            low, high = row["range"]
            assert row["beyond_range"] == pytest.approx(
                float(((made[name] < low) | (made[name] > high)).float().mean())
            )


def test_two_runs_give_the_same_bytes(network: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        arrondi.quantize(network, "W8A8", calibration=images(48), out=tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (images(4).permute(0, 2, 3, 1), "channels come last"),
        (torch.full((4, 3, 12, 12), torch.nan), "NaN"),
        (images(0), "at least one"),
        (None, "--calibration"),
        (torch.zeros(4, 3, 12, 13), "has the shape"),
    ],
)
def test_wrong_data_is_one_sentence(network: Path, tmp_path: Path, data: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ArrondiError, match=said):
        arrondi.quantize(network, "W8A8", calibration=data, out=tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_damaged_file_is_one_sentence(network: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(network.read_bytes()[:-200])
    with pytest.raises(ArrondiError, match="cannot be read"):
        read_graph(broken)
