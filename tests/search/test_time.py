"""A budget of time: what is timed is what a file has, what is chosen keeps the budget as measured, and bad budgets are one sentence."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import arrondi
from arrondi.errors import MissingExtraError, SchemeError
from arrondi.graph import Graph, Program, read_graph, write_graph
from arrondi.graph.ir import QDQ
from arrondi.graph.neighbourhood import rounded_around
from arrondi.search.allowance import Allowance
from arrondi.search.alone import alike, layer_alone, numbers_for
from arrondi.search.clock import Clock
from tests.graph.nets import Residual, images, perturbed

pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), path)
    return path


@pytest.fixture(scope="module")
def rounded(network: Path) -> Graph:
    out = network.with_name("rounded.onnx")
    arrondi.quantize(
        network, "w=int8/channel,a=uint8/tensor/asym/static", calibration=images(64), out=out, evaluate=False
    )
    graph = read_graph(out)
    assert any(n.op == QDQ for n in graph.nodes) or any(n.op == "QuantizeLinear" for n in graph.nodes)
    return graph


def grids(graph: Graph) -> Graph:
    """A graph of our own with grids: every value that a layer reads or a sum makes."""
    from arrondi.formats import parse_scheme
    from arrondi.graph import places, round_values
    from arrondi.tensor.ranges.observed import grid_from_range

    scheme = parse_scheme("w=uint8/tensor/asym").weights
    found = places(graph)
    made = {n: (grid_from_range(-4.0, 4.0, scheme), scheme) for n in found.values}
    return round_values(graph, made, readers=found.readers)


def test_grids_stay_beside_the_layers_that_are_named(network: Path) -> None:
    plain = read_graph(network)
    graph, x = grids(plain), images(3, seed=4)
    layers = [n.name for n in plain.nodes if n.op in ("Conv", "Gemm", "MatMul")]
    assert torch.equal(Program(rounded_around(graph, ()))(x), Program(plain)(x))
    assert torch.equal(Program(rounded_around(graph, layers))(x), Program(graph)(x))
    counts = [sum(n.op == QDQ for n in rounded_around(graph, layers[:k]).nodes) for k in range(len(layers) + 1)]
    assert counts == sorted(counts) and counts[0] == 0 and 2 <= counts[1] < counts[-1]
    (first,) = (n for n in rounded_around(graph, layers[:1]).nodes if n.name == layers[0])
    assert first.inputs[0].endswith("_rounded")


class Slow(Clock):
    """Every layer in floating point takes ten, on codes one, and a change between them three."""

    def __init__(self) -> None:
        self.runtime, self.threads = "a made-up runtime", 1

    def times(self, graphs: Sequence[Graph], inputs: Sequence[Sequence[torch.Tensor]]) -> list[float]:
        return [self.one(graph) for graph in graphs]

    def one(self, graph: Graph) -> float:
        coded = {n.outputs[0] for n in graph.nodes if n.op == "DequantizeLinear"}
        layers = [n for n in graph.nodes if n.op in ("Conv", "Gemm")]
        kinds = [n.inputs[1] in coded for n in layers]
        changes = sum(a != b for a, b in itertools.pairwise(kinds))
        return sum(1.0 if kind else 10.0 for kind in kinds) + 3.0 * changes + 1.0


def test_a_budget_is_kept_by_leaving_layers_in_floating_point(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arrondi.search.timed.Clock", Slow)
    spent, lost = [], []
    for budget in (7, 30, 45):  # five layers: 6 on codes, 51 in floating point
        out = tmp_path / f"{budget}.onnx"
        report = arrondi.quantize(network, "W8A8", calibration=images(64), out=out, budget=f"{budget}us")
        kept = [row for row in report["choice"] if row["bits"] == "float"]
        assert report["latency"]["milliseconds"] <= budget / 1e3 and report["latency"]["kept"]
        assert Slow().one(read_graph(out)) == pytest.approx(1e3 * report["latency"]["milliseconds"])
        assert {r["layer"] for r in report["layers"] if r["status"] == "kept"} == {r["layer"] for r in kept}
        assert json.loads(out.with_suffix(".report.json").read_text())["latency"] == report["latency"]
        spent.append(len(kept))
        lost.append(-report["evaluation"]["sqnr_db"])
    assert spent[0] == 0 < spent[-1] < 5 and lost[-1] < lost[0]
    with pytest.raises(SchemeError, match="takes 6 microseconds, more than the budget of 5"):
        arrondi.quantize(network, "W8A8", calibration=images(64), out=tmp_path / "none.onnx", budget="5us")
    with pytest.raises(SchemeError, match="nothing has to be rounded"):
        arrondi.quantize(network, "W8A8", calibration=images(64), out=tmp_path / "none.onnx", budget="1000ms")
    assert not (tmp_path / "none.onnx").exists()


def test_a_layer_alone_computes_what_it_does_in_the_network(rounded: Graph) -> None:
    values: dict[str, torch.Tensor] = {}
    Program(rounded).watch((images(1),), values.__setitem__)
    layers = [n.name for n in rounded.nodes if n.op == "Conv"]
    made = [layer_alone(rounded, name, values) for name in layers]
    for graph in made:
        (x, *_), (output,) = numbers_for(graph), graph.outputs
        found = Program(graph)(x)
        assert tuple(found.shape) == output.shape and found.unique().numel() > 1
    assert len({alike(graph) for graph in made}) == len(made), "all are of different shapes"
    assert alike(made[0]) == alike(layer_alone(rounded, layers[0], values))


def test_it_is_measured_here(network: Path, rounded: Graph) -> None:
    pytest.importorskip("onnxruntime")
    small, large = images(1), images(64)
    clock = Clock()
    one, many = clock.times([rounded, rounded], [[small], [large]])
    assert 0 < one < many and "ONNX Runtime" in clock.runtime


def test_without_a_runtime_the_compiled_kernels_are_measured(rounded: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    from arrondi.native import native

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if native is not None and native.path() != "portable":
        clock = Clock()
        assert clock.runtime == "Arrondi's executor" and clock.times([rounded], [[images(1)]])[0] > 0
    monkeypatch.setattr("arrondi.search.clock.native", None)
    with pytest.raises(MissingExtraError, match="pip install onnxruntime"):
        Clock()


@pytest.mark.parametrize("budget", ["0ms", "-1ms", "nanms", "infms", "1", "1.5 s"])
def test_bad_budgets(budget: str) -> None:
    with pytest.raises(SchemeError, match=r"1\.5ms"):
        Allowance.parse(budget)


def test_units_of_time() -> None:
    assert Allowance.parse("1.5ms").microseconds == 1500
    assert Allowance.parse("20 us").microseconds == 20
    assert Allowance.parse("4bpw").microseconds is None


def test_what_a_budget_of_time_does_not_go_with(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.onnx"
    with pytest.raises(SchemeError, match="nuclear"):
        arrondi.quantize(network, "W8A8", calibration=images(64), out=out, budget="1ms", budget_by="nuclear")
    with pytest.raises(SchemeError, match="stored ranges"):
        arrondi.quantize(network, "w=int8/channel,a=uint8/tensor/asym", calibration=images(64), out=out, budget="1ms")
    with pytest.raises(SchemeError, match=r"\.onnx"):
        arrondi.quantize(torch.nn.Linear(4, 4), "W8A8", budget="1ms")
