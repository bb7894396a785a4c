"""Methods that learn codes and scales of networks, and graphs that are equalized: what must hold whatever is learned, and in which direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Program, read_graph, write_graph
from arrondi.graph.equalize import absorb, equalize
from arrondi.pipeline.ends import ends_of
from tests.graph.nets import Residual, Separable, Upward, images, perturbed

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

W4A4 = "w=int4/channel,a=int4/token"


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), path)
    return path


def signal(graph: Path, scheme: str, tmp_path: Path, **settings: Any) -> float:
    """dB of the quantized network's outputs."""
    report = arrondi.quantize(
        graph, scheme, calibration=images(64), evaluation=images(48, seed=2), out=tmp_path / "out.onnx", overwrite=True, **settings
    )  # fmt: skip
    return float(report["evaluation"]["sqnr_db"])


def test_transposed_convolutions_are_convolutions_over_zeros(tmp_path: Path) -> None:
    module, x = Upward().eval(), torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(1))
    graph = module.graph()
    program = Program(graph)
    assert torch.allclose(program(x), module(x), atol=1e-5)
    write_graph(graph, tmp_path / "net.onnx")
    assert torch.allclose(Program(read_graph(tmp_path / "net.onnx"))(x), module(x), atol=1e-5)
    settings: dict[str, Any] = {
        "calibration": x,
        "evaluation": x,
        "ignore": [program.layers["twice"]],
        "overwrite": True,
    }
    report = arrondi.quantize(tmp_path / "net.onnx", "W8A16", method="gptq", out=tmp_path / "out.onnx", **settings)
    assert report["evaluation"]["sqnr_db"] > 30
    assert {row["layer"]: row["status"] for row in report["layers"]}["up"] == "quantized"
    session = ort.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(given, Program(read_graph(tmp_path / "out.onnx"))(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "repair"),
    [("brecq", "block-sides"), ("adaquant", "layer-tune"), ("qdrop", "block-drop"), ("easyquant", "scale-search")],
)
def test_learned_codes_and_scales_beat_the_nearest(residual: Path, tmp_path: Path, method: str, repair: str) -> None:
    few = {} if method == "easyquant" else {f"{repair}.iterations": 60}
    if method == "adaquant":
        few["iterations"] = 200
    learned = signal(residual, W4A4, tmp_path, method=method, options=few)
    assert learned > signal(residual, W4A4, tmp_path, method="rtn", options={"range": "absmax"}) + 0.5


def test_sides_are_learned_behind_the_activation(residual: Path, tmp_path: Path) -> None:
    plain = signal(residual, "W4A16", tmp_path)
    learned = signal(residual, "W4A16", tmp_path, repairs=["layer-sides"], options={"layer-sides.iterations": 200})
    assert learned > plain + 1


def test_channels_get_their_means_and_variances_back(residual: Path, tmp_path: Path) -> None:
    plain = signal(residual, W4A4, tmp_path, method="easyquant")
    assert signal(residual, W4A4, tmp_path, method="easyquant", repairs=["para-norm"]) > plain - 0.2


def test_nothing_is_learned_at_no_rate(residual: Path, tmp_path: Path) -> None:
    plain = signal(residual, W4A4, tmp_path, method="gptq")
    options = {"layer-tune.iterations": 10, "layer-tune.rate": 0.0}
    held = signal(residual, W4A4, tmp_path, method="gptq", repairs=["layer-tune"], options=options)
    assert held == pytest.approx(plain, abs=0.01)
    options = {"scale-search.alpha": 1.0, "scale-search.beta": 1.0, "range": "absmax"}
    assert signal(residual, W4A4, tmp_path, method="easyquant", options=options) > 0


def test_every_group_of_a_convolution_has_moments_of_its_own(residual: Path, tmp_path: Path) -> None:
    plain = signal(residual, "W4A16", tmp_path)
    for method, options in (("gptq", {}), ("adaround", {"iterations": 200})):
        assert signal(residual, "W4A16", tmp_path, method=method, options=options) > plain + 0.5
    report = arrondi.quantize(residual, "W4A16", method="gptq", calibration=images(64), out=tmp_path / "out.onnx", overwrite=True)  # fmt: skip
    assert all("group" not in str(row.get("why")) for row in report["layers"])


def test_first_and_last_layers_keep_eight_bits(residual: Path, tmp_path: Path) -> None:
    graph = read_graph(residual)
    first, last = ends_of(graph)
    assert len(first) == len(last) == 1 and graph.producers[graph.outputs[0].name].name == last[0]
    for ends, bits in ((8, 8), (None, 4)):
        report = arrondi.quantize(residual, "W4A16", out=tmp_path / "out.onnx", ends=ends, overwrite=True)
        rows = {row["layer"]: row["bits_per_weight"] for row in report["layers"]}
        assert all(rows[name] > bits and rows[name] < bits + 8 for name in (*first, *last))
        assert any("--ends" in note for note in report["notes"]) is (ends == 8)
    report = arrondi.quantize(residual, "W8A16", out=tmp_path / "out.onnx", overwrite=True)
    assert not report["notes"]


def test_equalization_leaves_the_function_and_saves_one_scale_a_tensor(tmp_path: Path) -> None:
    module, x = Separable().eval(), images(48)
    graph = read_graph(module, x[:2])
    made, done = equalize(graph)
    assert sorted(map(len, done.chains)) == [2, 3]
    assert torch.allclose(Program(made)(x), module(x), atol=1e-5)
    for one, other in done.between:
        if (one, other) == done.chains[1][:2]:
            continue
        nodes = {n.name: n for n in made.nodes}
        reach = (
            np.abs(made.constants[nodes[one].inputs[1]]).reshape(16, -1).max(1) if one == done.chains[0][0] else None
        )
        if reach is not None and other == done.chains[0][1]:
            read = np.abs(made.constants[nodes[other].inputs[1]]).reshape(16, -1).max(1)
            assert np.allclose(reach, read, rtol=2e-3)
    path = tmp_path / "net.onnx"
    write_graph(graph, path)
    lost = signal(path, "w=int8/tensor,a=int8/token", tmp_path)
    assert signal(path, "w=int8/tensor,a=int8/token", tmp_path, rewrites=["equalize"]) > lost + 6
    biased = made.constants | {
        next(n for n in made.nodes if n.name == done.chains[0][1]).inputs[2]: np.full(16, 5.0, np.float32)
    }
    high = made.with_nodes(made.nodes, biased)
    moved, count = absorb(high, done, [(x,)])
    assert count > 8 and torch.allclose(Program(moved)(x), Program(high)(x), atol=0.05)


def test_methods_for_networks_say_so_elsewhere() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    done = arrondi.quantize(module, "w=int4/channel", method="brecq", calibration=x)
    assert torch.isfinite(done(x)).all()
