"""What flows: sums that leave the network stay as they are, and values with quiet samples get sixteen bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Graph, Node, Program, Value, places, read_graph, write_graph

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
FLOAT = np.dtype(np.float32)


def network() -> Graph:
    """x and a convolution of its mirror image, added at the end: what super-resolution networks are."""
    draw = np.random.default_rng(0)
    held = {"w": draw.normal(0, 0.2, (8, 1, 3)), "v": draw.normal(0, 0.2, (1, 8, 3))}
    same = {"pads": [1, 1]}
    nodes = (
        Node("one", "Conv", ("x", "w"), ("a",), same),
        Node("relu", "Relu", ("a",), ("r",)),
        Node("two", "Conv", ("r", "v"), ("d",), same),
        Node("sum", "Add", ("x", "d"), ("y",)),
    )
    constants = {n: v.astype(np.float32) for n, v in held.items()}
    return Graph("net", nodes, (Value("x", FLOAT, ("n", 1, 24)),), (Value("y", FLOAT, ("n", 1, 24)),), constants, 21)


def samples(quiet: float) -> torch.Tensor:
    """(64, 1, 24), half of them quieter."""
    loud = torch.randn(64, 1, 24, generator=torch.Generator().manual_seed(0))
    return loud * torch.tensor([1.0, quiet]).repeat(32)[:, None, None]


def test_a_sum_that_leaves_the_network_adds_what_was_not_rounded() -> None:
    found = places(network())
    assert list(found.values) == ["x", "r"]  # d is read by the sum alone
    assert found.readers == {"one", "relu", "two"}


def test_a_sum_that_a_layer_reads_adds_codes() -> None:
    graph = network()
    more = (*graph.nodes, Node("move", "Slice", ("y", "s", "e"), ("z",)), Node("last", "Conv", ("z", "u"), ("out",)))
    constants = {**graph.constants, "u": np.ones((2, 1, 3), np.float32), "s": np.array([0]), "e": np.array([9])}
    found = places(Graph("net", more, graph.inputs, (Value("out", FLOAT, ("n", 2, 22)),), constants, 21))
    assert list(found.values) == ["x", "r", "d", "y", "z"]
    assert "sum" in found.readers and found.values["y"] == found.values["z"]


@pytest.mark.parametrize(("quiet", "faint", "wide"), [(1.0, True, False), (0.01, True, True), (0.01, False, False)])
def test_quiet_samples_get_sixteen_bits(tmp_path: Path, quiet: float, faint: bool, wide: bool) -> None:
    write_graph(network(), tmp_path / "net.onnx")
    x, out = samples(quiet), tmp_path / "out.onnx"
    report = arrondi.quantize(
        tmp_path / "net.onnx", "W8A8", method="rtn", calibration=x, out=out, evaluate=False, faint=faint
    )
    graph = read_graph(out)
    kinds = {v.dtype.name for n, v in graph.constants.items() if n.startswith("x_zero")}
    assert kinds == {"uint16" if wide else "uint8"}
    assert any("sixteen" in said for said in report["notes"]) == wide
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x.numpy()})
    ours = Program(graph)(x).numpy()
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    soft = x[1::2]  # the quiet ones: what the convolutions add, beside what the sum adds itself
    wanted, found = Program(network())(soft) - soft, Program(graph)(soft) - soft
    clear = 10 * float(torch.log10(wanted.square().sum() / (wanted - found).square().sum()))
    assert (clear > 25) == (wide or quiet == 1.0)
