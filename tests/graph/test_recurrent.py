"""Recurrent layers of both directions: their weights as codes, in the program and in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Graph, Node, Program, Value, read_graph, write_graph

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

HIDDEN, INSIDE = 6, 5


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
