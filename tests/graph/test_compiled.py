"""Compiled networks of codes: what PyTorch computes for the same graph, code for code, on every path that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arrondi
from arrondi.graph import Executor, Graph, Node, Program, Value, executor, lower, read_graph, write_graph
from arrondi.measure.networks import compare_graphs
from arrondi.native import native
from tests.graph.nets import Residual, Separable, images, perturbed

if native is None:
    pytest.skip("there are no compiled kernels", allow_module_level=True)

PATHS = [name for name, missing in native.paths() if missing is None]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.path()
    native.use_path(request.param)
    yield request.param
    native.use_path(before)


class Line:
    """A graph that is a line of operators on codes, from float32 to float32, with constants at random."""

    def __init__(self, seed: int, shape: tuple[int, ...], kind: Any, *, extreme: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[Node] = []
        self.shape, self.kind, self.extreme = shape, kind, extreme
        self.at = self.add("QuantizeLinear", "x", *self.grid(0.03), codes=np.dtype(kind).name)

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def grid(self, scale: float, kind: Any = None) -> tuple[str, str]:
        """Names of a scale and of a zero point: any, or one in the middle, so that codes stay apart along many operators."""
        ends = np.iinfo(kind or self.kind)
        zero = self.rng.integers(ends.min + 90, ends.max - 90)
        if self.extreme:
            zero = self.rng.choice([ends.min, ends.max, *self.rng.integers(ends.min, ends.max + 1, 4)])
        self.last = self.constant(np.float32(scale)), self.constant(np.array(zero, kind or self.kind))
        return self.last

    def add(self, op: str, *inputs: str, **attrs: Any) -> str:
        self.nodes.append(Node(f"n{len(self.nodes)}", op, inputs, (f"v{len(self.nodes)}",), attrs))
        self.at = f"v{len(self.nodes) - 1}"
        return self.at

    def conv(self, out: int, inside: int, kernel: tuple[int, ...], bias: bool = True, **attrs: Any) -> None:
        rng, fan = self.rng, inside * int(np.prod(kernel))
        weight = rng.integers(-128, 128, (out, inside, *kernel)).astype(np.int8)
        scales = np.float32(10.0 ** rng.uniform(-4, -2, out)) if rng.integers(2) else np.float32(0.002)
        held = self.last
        w = (
            self.constant(weight),
            self.constant(scales),
            self.constant(np.zeros(np.shape(scales), np.int8)),
        )
        y = self.grid(0.03 * float(np.max(scales)) * 73 * fan**0.5)
        shift = (self.constant(rng.integers(-9999, 9999, out).astype(np.int32)),) if bias else ()
        self.add("QLinearConv", self.at, *held, *w, *y, *shift, **attrs)

    def check(self, samples: int, *, whole: bool = True) -> None:
        """Both ways on numbers that fill the range and pass its ends."""
        self.add("DequantizeLinear", self.at, *self.last)
        value = Value("x", np.dtype(np.float32), ("n", *self.shape))
        out = Value(self.at, np.dtype(np.float32), ("n", None))
        graph = Graph("line", tuple(self.nodes), (value,), (out,), self.constants, 21)
        compiled, reference = Executor(graph), Program(graph)
        for n in (samples, 1):
            x = torch.from_numpy(self.rng.normal(0, 2.5, (n, *self.shape)).astype(np.float32))
            expected = reference(x)
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
            assert n < samples or len(expected.unique()) > 3
        if whole:
            two = compiled._two([x])
            assert two is not None and all(isinstance(step, tuple) for step in two.steps)


CONVOLUTIONS: list[tuple[tuple[int, ...], int, int, tuple[int, ...], dict[str, Any]]] = [
    ((3, 9, 8), 5, 3, (3, 3), {"pads": [1, 0, 2, 1]}),
    ((1, 11, 6), 16, 1, (5, 4), {"pads": [4, 1, 5, 1], "strides": [2, 2]}),
    ((16, 7, 9), 33, 16, (3, 3), {"pads": [1, 1, 1, 1], "strides": [1, 2]}),
    ((70, 5, 5), 100, 70, (1, 1), {}),
    ((7, 9, 9), 48, 7, (2, 3), {"dilations": [2, 3], "auto_pad": "SAME_UPPER"}),
    ((8, 8, 9), 8, 1, (3, 3), {"group": 8, "pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ((67, 6, 5), 67, 1, (5, 3), {"group": 67, "pads": [4, 2, 0, 1], "dilations": [2, 1]}),
    ((6, 9, 8), 9, 2, (2, 3), {"group": 3, "dilations": [2, 1], "pads": [2, 2, 0, 1]}),
    ((4, 9), 6, 4, (3,), {"pads": [2, 1], "strides": [2]}),
    ((6, 12), 6, 1, (3,), {"group": 6, "dilations": [2]}),
]


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_convolutions(case: int, kind: Any, path: str) -> None:
    shape, out, inside, kernel, attrs = CONVOLUTIONS[case]
    line = Line(case, shape, kind, extreme=True)
    line.conv(out, inside, kernel, bias=case % 3 > 0, **attrs)
    line.check(5)


@pytest.mark.parametrize("seed", range(8))
def test_convolutions_of_any_shape(seed: int, path: str) -> None:
    rng = np.random.default_rng(seed)
    group = int(rng.choice([1, 1, 2, 3]))
    inside, out = group * int(rng.integers(1, 24)), group * int(rng.integers(1, 40))
    kernel = tuple(int(v) for v in rng.integers(1, 5, 2))
    attrs = {
        "pads": [int(v) for v in rng.integers(0, 3, 4)], "strides": [int(v) for v in rng.integers(1, 4, 2)],
        "dilations": [int(v) for v in rng.integers(1, 3, 2)], "group": group,
    }  # fmt: skip
    line = Line(seed, (inside, *(int(v) for v in rng.integers(7, 14, 2))), (np.uint8, np.int8)[seed % 2], extreme=True)
    line.conv(out, inside // group, kernel, **attrs)
    line.check(int(rng.integers(2, 9)))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_sums_pools_joins_tables_and_moves(kind: Any, path: str) -> None:
    line = Line(3, (20, 9, 7), kind)
    first, grid = line.at, line.last
    line.conv(20, 20, (3, 3), pads=[1, 1, 1, 1])
    ends = [line.constant(np.array(v, kind)) for v in (3, 90)]
    line.add("Clip", line.at, *ends)
    line.add("com.microsoft.QLinearAdd", first, *grid, line.at, *line.last, *line.grid(0.05))
    line.add("com.microsoft.QLinearMul", line.at, *line.last, first, *grid, *line.grid(0.04))
    line.add("MaxPool", line.at, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], ceil_mode=1, dilations=[1, 2])
    held, mine = line.at, line.last
    index = line.add("Cast", held, to=6)
    table = line.constant(line.rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, 256).astype(kind))
    looked = line.add("Gather", table, index, axis=0)
    line.add("com.microsoft.QLinearConcat", *line.grid(0.02), held, *mine, looked, *line.last, axis=1)
    joined = line.last
    bounds = [line.constant(np.array(v, np.int64)) for v in ([1, 5], [100, -1], [2, 1], [2, 3])]
    line.add("Slice", line.at, *bounds)
    fill = line.constant(np.array(7, kind))
    line.add("Pad", line.at, line.constant(np.array([0, 1, 0, 2, 0, 0, 3, 0])), fill)
    line.add("Transpose", line.at, perm=[0, 3, 1, 2])
    line.add("Pad", line.at, line.constant(np.array([0, 0, 1, 1, 0, 0, 1, 0])), mode="reflect")
    line.add("Clip", line.at, line.constant(np.array(2, kind)), line.constant(np.array(100, kind)))
    line.last = joined
    line.check(3)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("shape", [(5, 1, 1), (70, 9, 7), (16, 40)])
def test_means_over_space(shape: tuple[int, ...], kind: Any, path: str) -> None:
    line = Line(len(shape), shape, kind, extreme=True)
    line.add("com.microsoft.QLinearGlobalAveragePool", line.at, *line.last, *line.grid(0.02))
    line.add("Squeeze", line.at, line.constant(np.arange(2, len(shape) + 1)))
    line.check(6)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_matrices(rows: int, kind: Any, path: str) -> None:
    line = Line(rows, (5, 3, 4), kind)
    line.add("Flatten", line.at, axis=1)

    def product(op: str, shape: tuple[int, int], outputs: int, bias: bool, **attrs: Any) -> None:
        codes = line.rng.integers(-128, 128, shape).astype(np.int8)
        scales = np.float32(10.0 ** line.rng.uniform(-3, -2, outputs))
        grid = line.last
        w = [line.constant(v) for v in (codes, scales, np.zeros(outputs, np.int8))]
        fan = codes.size // outputs
        y = line.grid(float(line.constants[grid[0]]) * 0.004 * 73 * fan**0.5)
        added = [line.constant(line.rng.integers(-9999, 9999, outputs).astype(np.int32))] if bias else [""]
        if op == "QLinearMatMul":
            line.add(op, line.at, *grid, *w, *y)
        else:
            line.add(op, line.at, *grid, *w, *added, *y, **attrs)

    product("com.microsoft.QGemm", (70, 60), 70, True, transB=1)
    product("QLinearMatMul", (70, 9), 9, False)
    product("com.microsoft.QGemm", (9, 11), 11, False)
    line.check(rows)


@pytest.mark.parametrize("arithmetic", ["single", "double"])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_fixed_point(kind: Any, arithmetic: str, path: str) -> None:
    how = {"arithmetic": arithmetic}
    line = Line(5, (19, 6, 7), kind)
    first, grid = line.at, line.last
    line.conv(19, 1, (3, 3), group=19, pads=[1, 1, 1, 1], **how)
    line.conv(19, 19, (1, 1), **how)
    line.add("com.microsoft.QLinearAdd", first, *grid, line.at, *line.last, *line.grid(0.05), **how)
    line.add("com.microsoft.QLinearMul", line.at, *line.last, first, *grid, *line.grid(0.04), **how)
    line.check(4)
    line = Line(6, (9, 5, 5), kind)
    line.add("com.microsoft.QLinearGlobalAveragePool", line.at, *line.last, *line.grid(0.01), **how)
    line.check(6)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "attrs",
    [
        {"kernel_shape": [2, 3], "strides": [2, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [3, 2], "pads": [1, 0, 2, 1], "strides": [2, 3], "ceil_mode": 1},
    ],
)
def test_means_of_windows(attrs: dict[str, Any], kind: Any, path: str) -> None:
    line = Line(7, (21, 8, 9), kind, extreme=True)
    line.add("com.microsoft.QLinearAveragePool", line.at, *line.last, *line.grid(0.021), **attrs)
    line.check(5)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["com.microsoft.QLinearAdd", "com.microsoft.QLinearMul"])
def test_two_values_that_broadcast(op: str, kind: Any) -> None:
    line = Line(8, (11, 4, 6), kind)
    whole, grid = line.at, line.last
    line.add("com.microsoft.QLinearGlobalAveragePool", whole, *grid, *line.grid(0.01))
    line.add(op, whole, *grid, line.at, *line.last, *line.grid(0.03))
    line.check(4)


@pytest.mark.parametrize("group", [1, 6])
def test_integer_sums_that_go_on_in_floating_point(group: int, path: str) -> None:
    line = Line(9, (6, 7, 8), np.uint8)
    grid, rng = line.last, line.rng
    weight = line.constant(rng.integers(-128, 128, (18, 6 // group, 3, 3)).astype(np.int8))
    bias = line.constant(rng.integers(-9999, 9999, (18, 1, 1)).astype(np.int32))
    step = line.constant((10.0 ** rng.uniform(-4, -3, (18, 1, 1))).astype(np.float32))
    line.add("ConvInteger", line.at, weight, grid[1], pads=[1, 0, 1, 0], group=group)
    line.add("Cast", line.add("Add", line.at, bias), to=1)
    line.add("LeakyRelu", line.add("Mul", line.at, step), alpha=0.1)
    line.add("QuantizeLinear", line.at, *line.grid(0.05), codes="uint8")
    grid = line.last
    line.add("Flatten", line.at, axis=1)
    codes = line.constant(rng.integers(-128, 128, (18 * 7 * 6, 10)).astype(np.int8))
    line.add("MatMulInteger", line.at, codes, grid[1])
    line.add("Mul", line.add("Cast", line.at, to=1), line.constant(np.float32(0.001)))
    line.add("QuantizeLinear", line.at, *line.grid(0.07), codes="uint8")
    line.check(3)


def test_what_has_no_kernel_is_computed_by_pytorch_in_between() -> None:
    """Weights whose zero point leaves int8, fixed-point multipliers, and an operator in floating point."""
    line = Line(0, (6, 8, 8), np.uint8)
    line.conv(8, 6, (3, 3))
    line.conv(8, 8, (3, 3), arithmetic="double")
    line.constants[line.nodes[1].inputs[3]] = line.rng.integers(0, 256, (8, 6, 3, 3)).astype(np.uint8)
    scales = line.constants[line.nodes[1].inputs[4]]
    line.constants[line.nodes[1].inputs[5]] = np.full(np.shape(scales), 7, np.uint8)
    grid = line.last
    line.add("DequantizeLinear", line.at, *grid)
    line.add("Sin", line.at)
    line.add("QuantizeLinear", line.at, *line.grid(0.01), codes="uint8")
    line.conv(8, 8, (1, 1))
    line.check(3, whole=False)


@pytest.fixture(scope="module", params=[Residual, Separable])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    pytest.importorskip("onnx")
    folder: Path = tmp_path_factory.mktemp("compiled")
    write_graph(read_graph(perturbed(request.param()), images(2)), folder / "net.onnx")
    arrondi.quantize(folder / "net.onnx", "W8A8", calibration=images(48), out=folder / "out.onnx", evaluate=False)
    return lower(read_graph(folder / "out.onnx")).graph


def test_a_network_is_the_same_for_any_number_of_samples_and_threads(lowered: Graph) -> None:
    compiled, reference = Executor(lowered), Program(lowered)
    two = compiled._two([images(1)])
    assert two is not None and all(isinstance(step, tuple) for step in two.steps)
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        for n in (1, 2, 33, 150):
            x = images(n, seed=n)
            torch.testing.assert_close(compiled(x), reference(x), rtol=0, atol=0)
    torch.set_num_threads(before)


def test_lowered_graphs_are_run_compiled_and_measured_so(lowered: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(executor(lowered), Executor)
    from arrondi.graph.compiled import plans
    from arrondi.measure.arrays import read_arrays

    samples = read_arrays({"inputs": images(9).numpy()}, lowered)
    fast = compare_graphs(lowered, lowered, samples)
    monkeypatch.setattr(plans, "native", None)
    assert isinstance(executor(lowered), Program)
    assert compare_graphs(lowered, lowered, samples) == fast
    with pytest.raises(arrondi.ArrondiError, match="compiled kernels"):
        Executor(lowered)


def test_another_number_of_inputs_is_refused(lowered: Graph) -> None:
    with pytest.raises(arrondi.DataError, match="takes 1 inputs"):
        Executor(lowered)(images(1), images(1))
