"""A network in integers: the codes that ONNX Runtime computes, and those that the rounded network foretells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Graph, Node, Program, Value, lower, read_graph, to_onnx, write_graph
from arrondi.graph.ops import evaluate
from arrondi.graph.requantize import requantize
from tests.graph.nets import Residual, images, perturbed
from tests.graph.test_networks import run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("integer")
    graph = read_graph(perturbed(Residual()), images(2))
    write_graph(graph, folder / "net.onnx")
    arrondi.quantize(folder / "net.onnx", "W8A8", calibration=images(48), out=folder / "out.onnx")
    return folder / "out.onnx"


def test_the_whole_network_runs_on_codes_and_onnx_runtime_computes_the_same(quantized: Path, tmp_path: Path) -> None:
    found = lower(read_graph(quantized))
    assert not found.floats and not found.notes
    assert not [n for n in found.graph.nodes if n.op in ("Conv", "Gemm", "Add", "Relu", "DequantizeLinear")]
    write_graph(found.graph, tmp_path / "integer.onnx")
    x = images(6, seed=5)
    ours = Program(found.graph)(x)
    torch.testing.assert_close(ours, run(tmp_path / "integer.onnx", x), rtol=0, atol=0)
    fused = run(quantized, x, "ORT_ENABLE_ALL")
    assert float((ours - fused).abs().max()) <= 1e-4 * float(fused.abs().max())


def _codes(graph: Graph, x: torch.Tensor) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    Program(graph).watch((x,), lambda name, value: kept.setdefault(name, value))
    return kept


def test_every_operator_is_foretold_within_one_step(quantized: Path) -> None:
    """What the network with rounded values makes of the very codes that the integer operators read."""
    graph = read_graph(quantized)
    whole = _codes(lower(graph).graph, images(4, seed=6))
    values = dict(whole)
    compared = 0
    for node in graph.nodes:
        read = [values.get(n, None if not n else _constant(graph, n)) for n in node.inputs]
        if any(v is None and n for v, n in zip(read, node.inputs, strict=True)):
            continue
        (made, *_) = evaluate(node, read, graph.opset)
        name = node.outputs[0]
        if name in whole and node.op == "QuantizeLinear":
            difference = (made.int() - whole[name].int()).abs()
            assert int(difference.max()) <= 1 and float(difference.double().mean()) < 0.01, name
            compared += 1
        else:
            values[name] = made
    assert compared >= 7


def _constant(graph: Graph, name: str) -> torch.Tensor | None:
    from arrondi.graph.codes import tensor_of

    return tensor_of(graph.constants[name]) if name in graph.constants else None


@pytest.mark.parametrize("arithmetic", ["double", "single"])
def test_fixed_point_is_within_a_step_of_a_float_multiplier(quantized: Path, arithmetic: str) -> None:
    graph, x = read_graph(quantized), images(4, seed=7)
    with pytest.raises(arrondi.SchemeError, match="fixed-point"):
        to_onnx(lower(graph, arithmetic).graph)
    whole, fixed = (_codes(lower(graph, how).graph, x) for how in ("float", arithmetic))
    first = next(n.outputs[0] for n in lower(graph).graph.nodes if n.op == "QLinearConv")
    difference = (whole[first].int() - fixed[first].int()).abs()
    assert int(difference.max()) <= 1 and float(difference.double().mean()) < 0.01


def test_one_rounding_or_two_beside_exact_rounding() -> None:
    """Single rounding differs from exact rounding only at ties, double rounding in a few per cent."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**20), 2**20, (200_000,), generator=generator)
    multiplier = torch.tensor(0.9e-3, dtype=torch.float32)
    exact = torch.round(sums.double() * multiplier.double()).clamp(-1000, 1000).int()
    wrong = {
        how: float((requantize(sums, multiplier, torch.tensor(0), -1000, 1000, how) != exact).double().mean())
        for how in ("float", "single", "double")
    }
    assert wrong["float"] < 1e-3 and wrong["single"] < 1e-3
    assert wrong["single"] <= wrong["double"] < 0.04


def test_small_convolutions_before_large_matrices_become_codes(tmp_path: Path) -> None:
    """Nine tenths of the weights are in the matrix, and the first convolution has fewer than eight channels."""
    layers = torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(600, 40)
    write_graph(read_graph(perturbed(torch.nn.Sequential(*layers)), images(2)), tmp_path / "net.onnx")
    arrondi.quantize(tmp_path / "net.onnx", "W8A8", calibration=images(16), out=tmp_path / "out.onnx", evaluate=False)
    found = lower(read_graph(tmp_path / "out.onnx"))
    assert not found.floats and not found.notes


def test_a_bias_of_int32_codes_is_lowered() -> None:
    """As ONNX Runtime's quantizer writes it, at the scale of the products."""
    rng = np.random.default_rng(0)
    constants = {
        "s": np.array(0.02, np.float32), "z": np.array(7, np.uint8), "w": rng.integers(-128, 128, (5, 9)).astype(np.int8),
        "sw": np.array(0.01, np.float32), "b": rng.integers(-999, 999, 5).astype(np.int32),
        "sb": np.float32(0.02) * np.array(0.01, np.float32), "zb": np.array(0, np.int32),
    }  # fmt: skip
    nodes = (
        Node("q", "QuantizeLinear", ("x", "s", "z"), ("codes",), {"codes": "uint8"}),
        Node("d", "DequantizeLinear", ("codes", "s", "z"), ("rounded",)),
        Node("dw", "DequantizeLinear", ("w", "sw"), ("weight",)),
        Node("db", "DequantizeLinear", ("b", "sb", "zb"), ("bias",)),
        Node("product", "Gemm", ("rounded", "weight", "bias"), ("y",), {"transB": 1}),
    )
    ends = [(Value(n, np.dtype(np.float32), ("N", k)),) for n, k in (("x", 9), ("y", 5))]
    graph = Graph("biased", nodes, *ends, constants, 21)
    found = lower(graph)
    assert not found.floats and not [n for n in found.graph.nodes if n.op == "DequantizeLinear"]
    x = torch.from_numpy(rng.normal(0, 1, (4, 9)).astype(np.float32))
    torch.testing.assert_close(Program(found.graph)(x), Program(graph)(x), rtol=1e-5, atol=1e-5)


def test_sums_that_may_leave_int32_stay_in_floating_point() -> None:
    one, zero = np.float32(1), np.uint8(0)
    for columns, lowered in ((60_000, True), (70_000, False)):
        constants = {
            "s": np.array(one),
            "z": np.array(zero),
            "w": np.full((columns, 2), 127, np.int8),
            "sw": np.array(one),
        }
        nodes = (
            Node("q", "QuantizeLinear", ("x", "s", "z"), ("codes",), {"codes": "uint8"}),
            Node("d", "DequantizeLinear", ("codes", "s", "z"), ("rounded",)),
            Node("dw", "DequantizeLinear", ("w", "sw"), ("weight",)),
            Node("product", "MatMul", ("rounded", "weight"), ("y",)),
        )
        ends = [(Value(n, np.dtype(np.float32), ("N", k)),) for n, k in (("x", columns), ("y", 2))]
        found = lower(Graph("long", nodes, *ends, constants, 21))
        assert (not found.floats) is lowered
        assert lowered or found.notes == (f"product: its sums of {columns} products may leave int32",)
