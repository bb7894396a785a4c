"""Constants computed once, and biases that become parts of products, leave what a network computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import arrondi
from arrondi.graph import Graph, Node, Program, Value, places, read_graph, tidy, write_graph

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)


def sliced() -> Graph:
    """Ids → embedding → LSTM whose weights are joined of slices, as PyTorch's exporter writes it → product of a turned matrix → bias."""
    draw = np.random.default_rng(2)
    shapes = {"e": (9, 5), "w": (32, 5), "r": (1, 32, 8), "b": (1, 64), "m": (10, 8), "c": (10,)}
    held = {n: draw.normal(0, 0.5, s).astype(np.float32) for n, s in shapes.items()}
    held |= {n: np.array(v) for n, v in {"0": [0], "8": [8], "32": [32], "one": [1]}.items()}
    nodes = (
        Node("look", "Gather", ("e", "x"), ("v",)),
        Node("low", "Slice", ("w", "0", "8", "0"), ("w0",)),
        Node("high", "Slice", ("w", "8", "32", "0"), ("w1",)),
        Node("joined", "Concat", ("w1", "w0"), ("w2",), {"axis": 0}),
        Node("wide", "Unsqueeze", ("w2", "0"), ("w3",)),
        Node("cell", "LSTM", ("v", "w3", "r", "b"), ("", "h"), {"hidden_size": 8}),
        Node("last", "Squeeze", ("h", "0"), ("g",)),
        Node("turned", "Transpose", ("m",), ("t",), {"perm": [1, 0]}),
        Node("product", "MatMul", ("g", "t"), ("p",)),
        Node("bias", "Add", ("c", "p"), ("y",)),
    )
    shapes_known = {"p": ("n", 10)}
    return Graph("net", nodes, (Value("x", INT, (6, "n")),), (Value("y", FLOAT, ("n", 10)),), held, 21, shapes_known)


def test_what_is_known_is_computed_and_the_function_stays(tmp_path: Path) -> None:
    graph, x = sliced(), torch.randint(0, 9, (6, 4))
    made = tidy(graph)
    assert [n.op for n in made.nodes] == ["Gather", "LSTM", "Squeeze", "Gemm"]
    assert torch.allclose(Program(made)(x), Program(graph)(x), atol=1e-6)
    assert list(Program(made).layers) == ["cell.enter.0", "cell.again.0", "product"]
    assert list(places(made).values) == ["v", "h", "g"]  # what is looked up in floating numbers is rounded too
    write_graph(graph, tmp_path / "net.onnx")
    report = arrondi.quantize(tmp_path / "net.onnx", "w=int8/channel", out=tmp_path / "out.onnx", evaluate=False)
    assert all(row["status"] == "quantized" for row in report["layers"])
    after = Program(read_graph(tmp_path / "out.onnx"))(x)
    assert 0 < float((after - Program(graph)(x)).abs().max()) < 0.05


def test_a_bias_of_another_shape_stays_a_sum() -> None:
    graph = sliced()
    held = {**graph.constants, "c": np.ones((4, 1), np.float32)}
    assert [n.op for n in tidy(graph.with_nodes(graph.nodes, held)).nodes][-2:] == ["MatMul", "Add"]


def test_large_arrays_are_not_made_of_small_ones() -> None:
    held = {"v": np.ones((1,), np.float32), "s": np.array([1 << 20])}
    nodes = (Node("wide", "Expand", ("v", "s"), ("w",)), Node("sum", "Add", ("x", "w"), ("y",)))
    graph = Graph("net", nodes, (Value("x", FLOAT, (1,)),), (Value("y", FLOAT, (1 << 20,)),), held, 21)
    assert tidy(graph).nodes == graph.nodes
