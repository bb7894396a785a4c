"""Which layers are the first and the last, and what `inspect` says of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Graph, Node, Value, read_graph, write_graph
from arrondi.pipeline.ends import ends_of
from tests.graph.nets import Residual, images, perturbed

pytest.importorskip("onnx")
FLOAT = np.dtype(np.float32)


def blocks(head: bool) -> Graph:
    """Patches and a token that is spread over as many samples as there are, two residual blocks of two layers, perhaps a head."""
    draw = np.random.default_rng(0)
    held: dict[str, np.ndarray] = {
        n: draw.normal(0, 0.3, (8, 8)).astype(np.float32) for n in ("in", "a0", "b0", "a1", "b1", "head")
    }
    held |= {"token": np.ones((1, 1, 8), np.float32), "zero": np.array([0]), "one": np.array([1])}
    nodes = [
        Node("embed", "MatMul", ("x", "in"), ("t",)),
        Node("shape", "Shape", ("x",), ("s",)),
        Node("count", "Slice", ("s", "zero", "one"), ("n",)),
        Node("sizes", "Concat", ("n", "one", "one"), ("sizes",), {"axis": 0}),
        Node("spread", "Expand", ("token", "sizes"), ("spread",)),
        Node("join", "Concat", ("spread", "t"), ("z0",), {"axis": 1}),
    ]
    for k in (0, 1):
        nodes += [
            Node(f"up{k}", "MatMul", (f"z{k}", f"a{k}"), (f"u{k}",)), Node(f"relu{k}", "Relu", (f"u{k}",), (f"r{k}",)),
            Node(f"down{k}", "MatMul", (f"r{k}", f"b{k}"), (f"d{k}",)), Node(f"sum{k}", "Add", (f"z{k}", f"d{k}"), (f"z{k + 1}",)),
        ]  # fmt: skip
    nodes += (
        [Node("norm", "Relu", ("z2",), ("w",)), Node("head", "MatMul", ("w", "head"), ("y",))]
        if head
        else [Node("norm", "Relu", ("z2",), ("y",))]
    )
    values = (Value("x", FLOAT, ("n", 4, 8)),), (Value("y", FLOAT, ("n", 5, 8)),)
    return Graph("blocks", tuple(nodes), *values, held, 21)


def test_a_stream_that_layers_add_to_is_neither_input_nor_output() -> None:
    assert ends_of(blocks(True)) == (("embed",), ("head",))
    assert ends_of(blocks(False)) == (("embed",), ("down1",))


def test_a_network_of_few_bits_has_eight_at_its_ends_alone(tmp_path: Path) -> None:
    write_graph(blocks(True), tmp_path / "net.onnx")
    x = np.random.default_rng(1).standard_normal((40, 4, 8)).astype(np.float32)
    arrondi.quantize(tmp_path / "net.onnx", "W4A4", calibration=x, out=tmp_path / "out.onnx", evaluate=False)
    rows = {row["layer"]: row for row in arrondi.inspect(tmp_path / "out.onnx")["layers"]}
    assert {n: row["format"] for n, row in rows.items()} == {
        n: "int8/channel" if n in ("embed", "head") else "int4/channel" for n in rows
    }
    assert {n: row["reads"] for n, row in rows.items()} == {
        n: "uint8" if n in ("embed", "head") else "uint4" for n in rows
    }


def test_what_a_file_holds(tmp_path: Path) -> None:
    write_graph(read_graph(perturbed(Residual()), images(2)), tmp_path / "net.onnx")
    arrondi.quantize(tmp_path / "net.onnx", "W8A8", calibration=images(40), out=tmp_path / "out.onnx", evaluate=False)
    before, after = (arrondi.inspect(tmp_path / name) for name in ("net.onnx", "out.onnx"))
    assert [r["shape"] for r in before["layers"]] == [r["shape"] for r in after["layers"]]
    assert {r["format"] for r in before["layers"]} == {"float32"} and {r["reads"] for r in before["layers"]} == {None}
    assert {r["format"] for r in after["layers"]} == {"int8/channel"} and {r["reads"] for r in after["layers"]} == {
        "uint8"
    }
    module = perturbed(Residual())
    weights = [p for n, p in module.named_parameters() if n.endswith("weight") and p.ndim > 1]
    assert before["parameters"] == after["parameters"] == sum(p.numel() for p in weights)
    first = after["layers"][0]
    assert first["bits_per_weight"] == pytest.approx(
        8 + 32 * first["shape"][0] / torch.Size(first["shape"]).numel(), abs=0.5
    )
    assert after["operators"]["Conv"] == 4 and after["inputs"][0]["name"] == before["inputs"][0]["name"]
