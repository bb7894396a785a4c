"""Means that normalizations tell without data, and biases corrected by them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.errors import SchemeError
from arrondi.graph import Graph, Node, Program, Value, read_graph, write_graph
from arrondi.graph.expected import clipped_mean, expected_means

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf), (-1.0, 0.5)])
def test_means_of_clipped_normals_are_those_of_draws(low: float, high: float) -> None:
    mu, sigma = np.array([-2.0, 0.0, 0.7, 5.0, 30.0]), np.array([1.0, 0.3, 2.0, 1.5, 0.0])
    drawn = torch.randn(400_000, 5, generator=torch.Generator().manual_seed(0)).double().numpy() * sigma + mu
    assert np.abs(np.clip(drawn, low, high).mean(0) - clipped_mean(mu, sigma, low, high)).max() < 0.012


def network() -> Graph:
    """Convolution, normalization, activation, twice, with a depthwise layer between; nothing is padded, so means hold everywhere."""
    draw = np.random.default_rng(0)
    shapes = {"w": (16, 3, 3, 3), "d": (16, 1, 3, 3), "v": (12, 16, 1, 1), "u": (10, 12, 1, 1)}
    held = {n: draw.normal(0, 0.4, s).astype(np.float32) for n, s in shapes.items()}
    for i, count in enumerate((16, 16, 12)):
        held |= {
            f"g{i}": draw.uniform(0.5, 1.5, count) * draw.choice([-1, 1], count),
            f"b{i}": draw.normal(0.5, 1, count),
        }
        held |= {f"m{i}": np.zeros(count), f"s{i}": np.ones(count)}

    def norm(i: int, x: str, y: str) -> Node:
        return Node(f"norm{i}", "BatchNormalization", (x, f"g{i}", f"b{i}", f"m{i}", f"s{i}"), (y,))

    nodes = (
        Node("one", "Conv", ("x", "w"), ("a",)), norm(0, "a", "a1"), Node("r0", "Relu", ("a1",), ("a2",)),
        Node("depth", "Conv", ("a2", "d"), ("c",), {"group": 16}), norm(1, "c", "c1"), Node("r1", "LeakyRelu", ("c1",), ("c2",)),
        Node("point", "Conv", ("c2", "v"), ("e",)), norm(2, "e", "e1"), Node("r2", "Relu", ("e1",), ("e2",)),
        Node("last", "Conv", ("e2", "u"), ("y",)),
    )  # fmt: skip
    constants = {n: v.astype(np.float32) for n, v in held.items()}
    graph = Graph(
        "net", nodes, (Value("x", FLOAT, ("n", 3, 9, 9)),), (Value("y", FLOAT, ("n", 10, 5, 5)),), constants, 21
    )
    seen: dict[str, torch.Tensor] = {}
    for i, name in enumerate(("a", "c", "e")):  # statistics of the data, as training leaves them
        Program(graph).watch((samples(),), seen.__setitem__)
        constants |= {f"m{i}": seen[name].mean((0, 2, 3)).numpy(), f"s{i}": seen[name].var((0, 2, 3)).numpy()}
        graph = graph.with_nodes(nodes, constants)
    return graph


def samples() -> torch.Tensor:
    return torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_means_are_those_of_the_data() -> None:
    graph, seen = network(), {}
    Program(graph).watch((samples(),), seen.__setitem__)
    found = expected_means(graph)
    assert {"a1", "a2", "c1", "c2", "e1", "e2"} == set(found)
    for name, mean in found.items():
        assert np.abs(seen[name].mean((0, 2, 3)).numpy() - mean).max() < 0.12, name


def test_corrected_biases_shift_the_answer_less(tmp_path: Path) -> None:
    write_graph(network(), tmp_path / "net.onnx")
    x, moved = samples(), []
    for repairs, options in ((), {}), (("bias-correction",), {"bias-correction.analytic": True}):
        out = tmp_path / "out.onnx"
        report = arrondi.quantize(
            tmp_path / "net.onnx", "w=int3/channel", repairs=repairs, options=options, out=out, evaluate=False, overwrite=True, ends=None
        )  # fmt: skip
        away = Program(read_graph(out))(x) - Program(network())(x)
        moved.append(float(away.mean((0, 2, 3)).square().mean().sqrt()))
    assert any("3 of 4 layers" in note for note in report["notes"])
    assert moved[1] < 0.2 * moved[0]


def test_means_of_equalized_channels_are_not_known(tmp_path: Path) -> None:
    write_graph(network(), tmp_path / "net.onnx")
    options = {"bias-correction.analytic": True}
    with pytest.raises(SchemeError, match="equalize"):
        arrondi.quantize(
            tmp_path / "net.onnx", "w=int8/channel", rewrites=("equalize",), repairs=("bias-correction",), options=options, out=tmp_path / "out.onnx"
        )  # fmt: skip
    with pytest.raises(SchemeError, match="analytic"):
        layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        arrondi.quantize(layers, "w=int4/channel", repairs=("bias-correction",), options=options, calibration=[torch.randn(4, 16)])  # fmt: skip
