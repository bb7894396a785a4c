"""Ranges that follow each tensor: the file's integer products, and ONNX Runtime's recurrent operator, beside our executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import SchemeError
from arrondi.graph import Graph, Node, Program, Value, read_graph, write_graph
from tests.graph.test_recurrent import HIDDEN, INSIDE, recurrent

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SCHEME = "w=int8/channel,a=uint8/tensor/asym"
FLOAT = np.dtype(np.float32)


def run(path: Path, **feeds: torch.Tensor) -> torch.Tensor:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in feeds.items()})[0])


def layers() -> Graph:
    """Convolution, transposed convolution, Gemm and a product of a matrix and a bias."""
    draw = np.random.default_rng(1)
    shapes = {"w": (8, 2, 3), "b": (8,), "t": (8, 10, 2), "g": (9, 120), "c": (9,), "m": (9, 8), "n": (8,)}
    held = {n: draw.normal(0, 0.4, s).astype(np.float32) for n, s in shapes.items()}
    nodes = (
        Node("conv", "Conv", ("x", "w", "b"), ("a",), {"pads": [1, 0], "strides": [2], "group": 2}),
        Node("relu", "Relu", ("a",), ("r",)),
        Node("up", "ConvTranspose", ("r", "t"), ("u",), {"strides": [2]}),
        Node("flat", "Flatten", ("u",), ("f",)),
        Node("gemm", "Gemm", ("f", "g", "c"), ("h",), {"transB": 1}),
        Node("product", "MatMul", ("h", "m"), ("p",)),
        Node("sum", "Add", ("p", "n"), ("y",)),
    )
    return Graph("net", nodes, (Value("x", FLOAT, ("n", 4, 12)),), (Value("y", FLOAT, ("n", 8)),), held, 21)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8/channel/asym"])
def test_products_of_integers_compute_the_same_in_a_runtime(tmp_path: Path, weights: str) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    write_graph(layers(), source)
    report = arrondi.quantize(source, f"w={weights},a=uint8/tensor/asym", out=out, evaluate=False)
    ops = [n.op for n in read_graph(out).nodes]
    assert ops.count("MatMulInteger") == 2
    assert ops.count("ConvInteger") == (0 if "asym" in weights else 1)  # a zero point a channel is none of its
    assert "Conv" in ops or "asym" not in weights
    assert sum(row["status"] == "quantized" for row in report["layers"]) == 4
    x = torch.randn(5, 4, 12)
    ours, theirs, before = Program(read_graph(out))(x), run(out, x=x), Program(layers())(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert 0 < float((ours - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("batch", [1, 3])
def test_lstm_is_what_a_runtime_computes(tmp_path: Path, batch: int) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    graph = recurrent("LSTM", 4)
    write_graph(graph, source)
    arrondi.quantize(source, SCHEME, out=out, evaluate=False)
    assert [n.op for n in read_graph(out).nodes] == ["com.microsoft.DynamicQuantizeLSTM"]
    x, h = torch.randn(7, batch, INSIDE), torch.randn(2, batch, HIDDEN)
    ours, theirs, before = Program(read_graph(out))(x, h), run(out, x=x, h=h), Program(graph)(x, h)
    assert float((ours - theirs).abs().max()) < 1e-6
    assert 1e-4 < float((ours - before).abs().max()) < 0.05


def test_gru_keeps_its_products_in_floating_point(tmp_path: Path) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    write_graph(recurrent("GRU", 3), source)
    arrondi.quantize(source, SCHEME, out=out, evaluate=False)
    x, h = torch.randn(7, 2, INSIDE), torch.randn(2, 2, HIDDEN)
    assert float((Program(read_graph(out))(x, h) - run(out, x=x, h=h)).abs().max()) < 1e-5


def test_other_grids_are_refused(tmp_path: Path) -> None:
    write_graph(layers(), tmp_path / "net.onnx")
    with pytest.raises(SchemeError, match="a=uint8/tensor/asym"):
        arrondi.quantize(tmp_path / "net.onnx", "w=int8/channel,a=int8/tensor", out=tmp_path / "out.onnx")


def test_gradients_pass_what_is_rounded_over_its_own_range() -> None:
    x = torch.randn(4, requires_grad=True)
    node = Node("grid", "QDQ", ("x",), ("y",), {"codes": "uint8"})
    graph = Graph("net", (node,), (Value("x", FLOAT, (4,)),), (Value("y", FLOAT, (4,)),), {}, 21)
    y = Program(graph)(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4)) and float((y - x).detach().abs().max()) > 0
