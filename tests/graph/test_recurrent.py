"""Recurrent layers of both directions: their weights as codes, in the program and in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import DataError
from arrondi.graph import Graph, Node, Program, Value, read_graph, write_graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

HIDDEN, INSIDE = 6, 5
FLOAT = np.dtype(np.float32)


def recurrent(op: str, gates: int, seed: int = 0) -> Graph:
    """x (steps, N, 5) and a first state → every hidden state."""
    make = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return make.normal(0, 0.4, shape).astype(np.float32)

    constants = {
        "w": drawn(2, gates * HIDDEN, INSIDE),
        "r": drawn(2, gates * HIDDEN, HIDDEN),
        "b": drawn(2, 2 * gates * HIDDEN),
    }
    attrs = {"hidden_size": HIDDEN, "direction": "bidirectional", **({"linear_before_reset": 1} if op == "GRU" else {})}
    node = Node("cell", op, ("x", "w", "r", "b", "", "h"), ("y",), attrs)
    float32 = np.dtype(np.float32)
    inputs = (Value("x", float32, (7, "N", INSIDE)), Value("h", float32, (2, "N", HIDDEN)))
    return Graph("net", (node,), inputs, (Value("y", float32, (7, 2, "N", HIDDEN)),), constants, 21)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_codes_of_both_directions(tmp_path: Path, op: str, gates: int) -> None:
    source, out = tmp_path / "net.onnx", tmp_path / "out.onnx"
    write_graph(recurrent(op, gates), source)
    report = arrondi.quantize(source, "w=int4/channel", out=out, evaluate=False)
    assert [row["layer"] for row in report["layers"]] == [
        f"cell.{part}.{d}" for part in ("enter", "again") for d in (0, 1)
    ]
    assert all(row["bits_per_weight"] < 11.5 for row in report["layers"])
    x, h = torch.randn(7, 3, INSIDE), torch.randn(2, 3, HIDDEN)
    (theirs,) = ort.InferenceSession(out).run(None, {"x": x.numpy(), "h": h.numpy()})
    ours, before = Program(read_graph(out))(x, h), Program(read_graph(source))(x, h)
    assert np.abs(ours.numpy() - theirs).max() < 1e-5
    assert 0 < float((ours - before).abs().max()) < 0.2


def drawn(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.4, shape).astype(np.float32)


def characters(tmp_path: Path) -> Path:
    """Ids (N, steps) → classes of every step, as PyTorch's older exporter writes it: first states of a size that is computed, or given."""
    h, held = onnx.helper, onnx.numpy_helper.from_array
    constants = {
        "table": drawn(20, INSIDE, seed=4), "w": drawn(1, 4 * HIDDEN, INSIDE), "r": drawn(1, 4 * HIDDEN, HIDDEN),
        "b": drawn(1, 8 * HIDDEN), "v": drawn(HIDDEN, 20), "at": np.int64(0), "zero": np.array([0]), "one": np.array([1]), "size": np.array([HIDDEN]),
    }  # fmt: skip
    nodes = [
        h.make_node("Gather", ["table", "x"], ["embedded"]), h.make_node("Shape", ["x"], ["shape"]), h.make_node("Gather", ["shape", "at"], ["n"]),
        h.make_node("Unsqueeze", ["n", "zero"], ["row"]), h.make_node("Concat", ["one", "row", "size"], ["sizes"], axis=0),
        h.make_node("ConstantOfShape", ["sizes"], ["c"], value=held(np.zeros(1, np.float32))), h.make_node("Transpose", ["embedded"], ["steps"], perm=[1, 0, 2]),
        h.make_node("LSTM", ["steps", "w", "r", "b", "", "h", "c"], ["every"], hidden_size=HIDDEN), h.make_node("Squeeze", ["every", "one"], ["states"]),
        h.make_node("Transpose", ["states"], ["samples"], perm=[1, 0, 2]), h.make_node("MatMul", ["samples", "v"], ["y"]),
    ]  # fmt: skip
    info = h.make_tensor_value_info
    inputs = [info("x", onnx.TensorProto.INT64, ["n", 9]), info("h", 1, [1, "n", HIDDEN])]
    graph = h.make_graph(
        nodes, "g", inputs, [info("y", 1, ["n", 9, 20])], [held(np.asarray(v), n) for n, v in constants.items()]
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.mark.parametrize("scheme", ["W8A8", "w=int8/channel,a=uint8/tensor/asym"])
def test_every_step_of_a_sequence_is_told_as_a_runtime_does(tmp_path: Path, scheme: str) -> None:
    source, out, count = characters(tmp_path), tmp_path / "out.onnx", 70
    draw = np.random.default_rng(5)
    x, h = draw.integers(0, 20, (count, 9)), drawn(1, count, HIDDEN, seed=6)
    labels = draw.integers(0, 20, (count, 9))
    np.savez(tmp_path / "data.npz", x=x, h=h, labels=labels)
    report = arrondi.quantize(
        source, scheme, calibration=tmp_path / "data.npz", evaluation=tmp_path / "data.npz", out=out
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    ours, theirs = (
        np.concatenate([session.run(None, {"x": x[i : i + 32], "h": h[:, i : i + 32]})[0] for i in range(0, count, 32)])
        for session in (ort.InferenceSession(path, options) for path in (out, source))
    )
    found = report["evaluation"]
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((theirs**2).sum() / ((ours - theirs) ** 2).sum()), abs=0.1)
    for key, share in (
        ("agreement", (ours.argmax(-1) == theirs.argmax(-1)).mean()),
        ("top1", (ours.argmax(-1) == labels).mean()),
        ("reference_top1", (theirs.argmax(-1) == labels).mean()),
    ):
        assert found[key] == pytest.approx(share, abs=0.003)
    assert found["samples"] == count and 0.9 < found["agreement"] < 1


def test_samples_lie_where_the_first_states_have_them(tmp_path: Path) -> None:
    source = characters(tmp_path)
    x = np.zeros((6, 9), np.int64)
    for h, said in (
        (drawn(1, 5, HIDDEN), "6 samples of x and 5 samples of h"),
        (drawn(6, 1, HIDDEN), r"h has the shape \(1, N, 6\)"),
    ):
        with pytest.raises(DataError, match=said):
            arrondi.quantize(source, "W8A8", calibration=(x, h), out=tmp_path / "out.onnx")
    with pytest.raises(DataError, match="labels are 4 classes of every sample, and the network tells 9"):
        data = {"x": x, "h": drawn(1, 6, HIDDEN), "labels": np.zeros((6, 4), int)}
        arrondi.quantize(source, "W8A8", calibration=data, evaluation=data, out=tmp_path / "out.onnx")


def test_a_number_without_axes_is_the_same_for_all_samples(tmp_path: Path) -> None:
    number = Value("rate", FLOAT, ())
    nodes = (Node("times", "Mul", ("x", "rate"), ("m",)), Node("product", "MatMul", ("m", "w"), ("y",)))
    value = Value("x", FLOAT, ("n", 8)), Value("y", FLOAT, ("n", 12))
    graph = Graph("net", nodes, (value[0], number), (value[1],), {"w": drawn(8, 12)}, 21)
    write_graph(graph, tmp_path / "net.onnx")
    data = {"x": drawn(50, 8), "rate": np.float32(3)}
    report = arrondi.quantize(tmp_path / "net.onnx", "W8A8", calibration=data, out=tmp_path / "out.onnx")
    assert report["evaluation"]["samples"] == 5 and report["evaluation"]["sqnr_db"] > 25
