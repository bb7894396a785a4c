"""Numbers of samples that a file fixes, padding that it leaves to the runtime, joined values on one grid, and networks in which nothing can be rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import DataError, SchemeError
from arrondi.graph import Graph, Node, Program, Value, read_graph, tidy, write_graph
from arrondi.graph.layers import LAYERS
from arrondi.measure.arrays import read_arrays
from arrondi.measure.batching import in_batches

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
FLOAT = np.dtype(np.float32)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def graph_of(
    nodes: tuple[Node, ...], constants: dict[str, np.ndarray], shape: tuple[Any, ...], kind: Any = FLOAT
) -> Graph:
    values = tuple(Value(n, np.dtype(kind), s) for n, s in (("x", shape), ("y", (shape[0], None))))
    return Graph("net", nodes, values[:1], values[1:], constants, 18)


def reshaped(count: int | str) -> Graph:
    """A network whose file says how many samples there are, where it makes rows of pictures."""
    nodes = (
        Node("conv", "Conv", ("x", "w"), ("c",), {"pads": [1] * 4}),
        Node("relu", "Relu", ("c",), ("r",)),
        Node("rows", "Reshape", ("r", "shape"), ("f",)),
        Node("product", "MatMul", ("f", "v"), ("y",)),
    )
    first = count if isinstance(count, int) else 0
    held = {"w": numbers(4, 3, 3, 3), "v": numbers(256, 10), "shape": np.array([first, 256], np.int64)}
    return graph_of(nodes, held, (count, 3, 8, 8))


def with_token(count: int) -> Graph:
    """One that joins a token to its samples' own: no other number of samples goes through."""
    nodes = (
        Node("conv", "Conv", ("x", "w"), ("c",), {"strides": [4, 4]}),
        Node("rows", "Reshape", ("c", "shape"), ("t",)),
        Node("turn", "Transpose", ("t",), ("u",), {"perm": [0, 2, 1]}),
        Node("join", "Concat", ("token", "u"), ("z",), {"axis": 1}),
        Node("product", "MatMul", ("z", "v"), ("p",)),
        Node("flat", "Flatten", ("p",), ("y",)),
    )
    held = {
        "w": numbers(8, 3, 4, 4),
        "v": numbers(8, 10),
        "shape": np.array([count, 8, 4], np.int64),
        "token": numbers(count, 1, 8),
    }
    return graph_of(nodes, held, (count, 3, 8, 8))


def runtime(path: Path, x: np.ndarray, size: int) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": x[i : i + size]})[0] for i in range(0, len(x), size)])


@pytest.mark.parametrize(("made", "count", "method"), [(reshaped, 1, "adaround"), (reshaped, 3, "rtn"), (with_token, 1, "gptq"), (with_token, 2, "rtn")])  # fmt: skip
def test_a_fixed_number_of_samples_goes_through(tmp_path: Path, made: Any, count: int, method: str) -> None:
    whole, out, x = tmp_path / "net.onnx", tmp_path / "out.onnx", numbers(60, 3, 8, 8, seed=1)
    write_graph(made(count), whole)
    report = arrondi.quantize(whole, "W8A8", method=method, options={}, calibration=x, out=out)
    held = x[-report["evaluation"]["samples"] :]
    assert len(held) % count == 0 and len(held) >= 4
    wanted, given = (runtime(path, held, count) for path in (whole, out))
    noise = np.square(wanted - given).sum()
    assert (
        report["evaluation"]["sqnr_db"] == pytest.approx(10 * np.log10(np.square(wanted).sum() / noise), abs=0.3)
        and noise
    )


def test_a_shape_that_names_the_samples_takes_them_from_the_input() -> None:
    x = torch.from_numpy(numbers(5, 3, 8, 8, seed=1))
    fixed, free = (tidy(_with_shapes(reshaped(count))) for count in (1, "n"))
    assert torch.equal(Program(fixed)(x), Program(free)(x))


def _with_shapes(graph: Graph) -> Graph:
    from arrondi.graph import to_onnx

    return read_graph(to_onnx(graph))


def test_batches_are_of_the_size_that_a_network_takes() -> None:
    graph = _with_shapes(with_token(4))
    samples = in_batches(graph, read_arrays(numbers(11, 3, 8, 8), graph))
    assert [len(x) for (x,) in samples.batches()] == [4, 4] and len(samples) == 8
    assert [len(x) for (x,) in samples.part(0, 6).batches()] == [4]
    with pytest.raises(DataError, match="takes 4 at a time"):
        in_batches(graph, read_arrays(numbers(3, 3, 8, 8), graph))
    free = _with_shapes(reshaped(4))
    assert len(in_batches(free, read_arrays(numbers(11, 3, 8, 8), free))) == 11


def test_methods_that_run_parts_say_so(tmp_path: Path) -> None:
    write_graph(with_token(1), tmp_path / "net.onnx")
    with pytest.raises(SchemeError, match="samples at a time"):
        arrondi.quantize(
            tmp_path / "net.onnx", "W4A8", method="brecq", calibration=numbers(40, 3, 8, 8), out=tmp_path / "o.onnx"
        )


@pytest.mark.parametrize("how", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(("op", "stride"), [("Conv", 1), ("Conv", 2), ("Conv", 3), ("ConvTranspose", 2)])
@pytest.mark.parametrize("known", [True, False])
def test_padding_that_depends_on_sizes(how: str, op: str, stride: int, known: bool) -> None:
    weight = numbers(3, 3, 4, 5)
    attrs = {"auto_pad": how, "strides": [stride, stride], "dilations": [1, 1]}
    graph = graph_of(
        (Node("layer", op, ("x", "w"), ("y",), attrs),),
        {"w": weight},
        ("n", 3, 11, 10) if known else ("n", 3, "h", "v"),
    )
    graph = Graph(
        graph.name, graph.nodes, graph.inputs, (Value("y", FLOAT, (None,) * 4),), graph.constants, graph.opset
    )
    x, made = torch.from_numpy(numbers(2, 3, 11, 10)), tidy(graph)
    (node,) = made.nodes
    layer = LAYERS[op](node, made) is not None
    assert layer == (known or stride == 1), "where it can be known it is a layer"
    assert torch.allclose(Program(made)(x), Program(graph)(x), atol=1e-6)
    from arrondi.graph import to_onnx

    session = ort.InferenceSession(to_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x.numpy()})[0], Program(made)(x).numpy(), atol=1e-5)


def test_a_grid_of_joined_values_reaches_over_all_of_them(tmp_path: Path) -> None:
    """Two values nearly twice apart, joined: none is cut off by the grid of the other."""
    nodes = (
        Node("first", "Conv", ("x", "a"), ("b",)), Node("other", "Conv", ("x", "c"), ("d",)),
        Node("join", "Concat", ("b", "d"), ("e",), {"axis": 1}), Node("last", "Conv", ("e", "f"), ("y",)),
    )  # fmt: skip
    a = numbers(8, 3, 1, 1)
    graph = graph_of(nodes, {"a": a, "c": 1.8 * a, "f": numbers(10, 16, 1, 1)}, ("n", 3, 8, 8))
    graph = Graph(
        graph.name, graph.nodes, graph.inputs, (Value("y", FLOAT, ("n", 10, 8, 8)),), graph.constants, graph.opset
    )
    write_graph(graph, tmp_path / "net.onnx")
    x = numbers(64, 3, 8, 8)
    report = arrondi.quantize(
        tmp_path / "net.onnx", "W8A8", calibration=x, out=tmp_path / "out.onnx", observer="min-max"
    )
    assert report["ranges"]["b"] == report["ranges"]["d"] == report["ranges"]["e"], "they share a grid"
    assert all(report["values"][n]["beyond_range"] == 0 for n in "bde")
    assert report["evaluation"]["sqnr_db"] > 30
    few = arrondi.quantize(tmp_path / "net.onnx", "W4A4", calibration=x, out=tmp_path / "few.onnx", observer="min-max")
    steps = {n.inputs[0]: n for n in read_graph(tmp_path / "few.onnx").nodes if n.op == "QuantizeLinear"}
    assert steps["e"].inputs[1] != steps["b_grid_clipped" if "b_grid_clipped" in steps else "b"].inputs[1], (
        "what the last layer reads has eight bits"
    )
    assert few["grids"] >= 3


def test_nothing_to_round_says_why(tmp_path: Path) -> None:
    def refused(graph: Graph, words: str) -> None:
        write_graph(graph, tmp_path / "net.onnx")
        with pytest.raises(SchemeError, match=words):
            arrondi.quantize(
                tmp_path / "net.onnx",
                "W8A8",
                calibration=numbers(40, 3, 8, 8),
                out=tmp_path / "no.onnx",
                overwrite=True,
            )

    refused(graph_of((Node("r", "Relu", ("x",), ("y",)),), {}, ("n", 3)), "no layer")
    half = reshaped("n")
    constants = {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in half.constants.items()}
    refused(graph_of(half.nodes, constants, ("n", 3, 8, 8), np.float16), "float16")
    write_graph(reshaped("n"), tmp_path / "net.onnx")
    arrondi.quantize(tmp_path / "net.onnx", "W8A8", calibration=numbers(40, 3, 8, 8), out=tmp_path / "once.onnx")
    refused(read_graph(tmp_path / "once.onnx"), "quantized already")


@pytest.mark.parametrize("where", ["v", "w"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_numbers_that_are_none(tmp_path: Path, where: str, scheme: str) -> None:
    graph = reshaped("n")
    graph.constants[where].reshape(-1)[3] = np.inf if where == "v" else np.nan
    write_graph(graph, tmp_path / "net.onnx")
    with pytest.raises(DataError, match="NaN or infini"):
        arrondi.quantize(tmp_path / "net.onnx", scheme, calibration=numbers(40, 3, 8, 8), out=tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()


def test_a_mask_of_infinite_numbers_is_none_of_them(tmp_path: Path) -> None:
    nodes = (
        Node("q", "MatMul", ("x", "w"), ("q",)), Node("t", "Transpose", ("q",), ("k",), {"perm": [0, 2, 1]}),
        Node("s", "MatMul", ("q", "k"), ("s",)), Node("m", "Add", ("s", "mask"), ("masked",)), Node("p", "Softmax", ("masked",), ("p",)),
        Node("o", "MatMul", ("p", "q"), ("o",)), Node("l", "MatMul", ("o", "v"), ("y",)),
    )  # fmt: skip
    mask = np.triu(np.full((6, 6), -np.inf, np.float32), 1)
    graph = graph_of(nodes, {"w": numbers(8, 16), "v": numbers(16, 10), "mask": mask}, ("n", 6, 8))
    graph = Graph(
        graph.name, graph.nodes, graph.inputs, (Value("y", FLOAT, ("n", 6, 10)),), graph.constants, graph.opset
    )
    write_graph(graph, tmp_path / "net.onnx")
    report = arrondi.quantize(tmp_path / "net.onnx", "W8A8", calibration=numbers(40, 6, 8), out=tmp_path / "out.onnx")
    assert report["evaluation"]["sqnr_db"] > 20
    assert np.isfinite(report["values"]["masked"]["sqnr_db"])
