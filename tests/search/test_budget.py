"""The integer program against every combination there is."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from arrondi.errors import SchemeError
from arrondi.graph import Program, read_graph, tidy, write_graph
from arrondi.pipeline import Recipe
from arrondi.pipeline.network import NetworkData
from arrondi.search.allowance import products_of
from arrondi.search.budget import choose_under
from arrondi.search.mixed import quantize_mixed
from arrondi.search.nuclear import nuclear_losses
from arrondi.tensor.nearest import quantize_tensor
from tests.graph.nets import Residual, images, perturbed


def test_it_finds_what_trying_everything_finds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        losses = [sorted(generator.random(3), reverse=True) for _ in range(6)]
        costs = [np.cumsum(generator.integers(1, 50, 3)).tolist() for _ in range(6)]
        budget = float(generator.integers(sum(c[0] for c in costs), sum(c[-1] for c in costs) + 1))
        every = [
            (sum(row[i] for row, i in zip(losses, picks, strict=True)), picks)
            for picks in itertools.product(range(3), repeat=6)
            if sum(row[i] for row, i in zip(costs, picks, strict=True)) <= budget
        ]
        found = choose_under(losses, costs, budget)
        assert sum(row[i] for row, i in zip(costs, found, strict=True)) <= budget
        assert sum(row[i] for row, i in zip(losses, found, strict=True)) == pytest.approx(min(every)[0], abs=1e-9)


def test_a_larger_budget_never_costs_more() -> None:
    losses, costs = [[3.0, 1.0, 0.1]] * 4, [[2, 4, 8]] * 4
    totals = [
        sum(row[i] for row, i in zip(losses, choose_under(losses, costs, b), strict=True)) for b in range(8, 33, 3)
    ]
    assert totals == sorted(totals, reverse=True)


def test_too_small_a_budget_names_the_least() -> None:
    with pytest.raises(SchemeError, match="takes 6 bits"):
        choose_under([[1.0, 0.0]] * 2, [[3, 8]] * 2, 5)


def test_a_network_takes_the_budget_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    net = tmp_path / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), net)
    data = NetworkData(images(64).numpy(), samples=64)
    recipe = Recipe.simple("w=int8/channel,a=int8/token")
    reports = [quantize_mixed(net, tmp_path / f"{b}.onnx", recipe, data, b) for b in ("7bpw", "10bpw")]
    for report, bits in zip(reports, (7, 10), strict=True):
        assert report["bits_per_weight"] <= bits
        assert {row["bits"] for row in report["choice"]} <= {2, 4, 8}
    assert reports[0]["evaluation"]["sqnr_db"] < reports[1]["evaluation"]["sqnr_db"]
    with pytest.raises(SchemeError, match="Raise --budget"):
        quantize_mixed(net, tmp_path / "none.onnx", recipe, data, "1bpw")
    with pytest.raises(SchemeError, match="4bpw"):
        quantize_mixed(net, tmp_path / "none.onnx", recipe, data, "small")


def test_multiplications_are_counted_as_they_are() -> None:
    """Beside what the shapes say: a strided convolution, one in groups, a transposed one, and a matrix."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, 2, 1)
            self.second = torch.nn.Conv2d(8, 8, 3, 1, 1, groups=4)
            self.third = torch.nn.ConvTranspose2d(8, 4, 2, 2)
            self.last = torch.nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.third(self.second(self.first(x))).mean((2, 3)))
            return y

    program = Program(read_graph(perturbed(Net()), images(2)))
    side = images(2).shape[-1] // 2
    found = products_of(program, (images(3),))
    by_layer = [found[path] for path in program.layers.values()]
    assert by_layer == [32 * n for n in (side**2 * 8 * 27, side**2 * 8 * 18, side**2 * 8 * 16, 20)]


def test_bit_operations_are_a_budget(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    net = tmp_path / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), net)
    data, recipe = NetworkData(images(64).numpy(), samples=64), Recipe.simple("w=int8/channel,a=int8/token")
    whole = sum(products_of(Program(read_graph(net)), (images(2),)).values()) / 32 * 64
    report = quantize_mixed(net, tmp_path / "out.onnx", recipe, data, f"{whole * 0.6 / 1e3}KBOP")
    assert len({row["bits"] for row in report["choice"]}) > 1
    with pytest.raises(SchemeError, match="bit operations, more than"):
        quantize_mixed(net, tmp_path / "none.onnx", recipe, data, f"{whole * 0.2 / 1e3}KBOP")


def test_a_layer_is_measured_by_the_norm_of_what_it_gives(tmp_path: Path) -> None:
    """Beside singular values and squared differences computed apart; the module's weight is what it was."""
    layer = perturbed(torch.nn.Linear(12, 7))
    program = Program(tidy(read_graph(layer, torch.randn(2, 5, 12))))
    (path,) = program.layers.values()
    weight = program.get_parameter(f"{path}.weight").detach().clone()
    choices = [quantize_tensor(weight, f"w=int{bits}/channel") for bits in (2, 4, 8)]
    x = torch.randn(3, 5, 12)
    found = nuclear_losses(program, (x,), {path: choices})[path]
    y = layer(x).detach()
    worth = float(torch.stack([torch.linalg.matrix_norm(one, "nuc") for one in y]).mean())
    for loss, q in zip(found, choices, strict=True):
        off = x @ (q.dequantize() - weight).T
        assert loss == pytest.approx(worth * float(off.square().sum()), rel=1e-3)
    assert torch.equal(program.get_parameter(f"{path}.weight"), weight)
    net = tmp_path / "net.onnx"
    write_graph(read_graph(perturbed(Residual()), images(2)), net)
    data, recipe = NetworkData(images(64).numpy(), samples=64), Recipe.simple("w=int8/channel,a=int8/token")
    report = quantize_mixed(net, tmp_path / "out.onnx", recipe, data, "7bpw", measure="nuclear")
    assert report["bits_per_weight"] <= 7
    with pytest.raises(SchemeError, match="nuclear"):
        quantize_mixed(net, tmp_path / "none.onnx", recipe, data, "7bpw", measure="nuclaer")
