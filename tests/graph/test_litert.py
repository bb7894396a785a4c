"""Our fixed-point executor beside TFLite's int8 kernels, code for code, over random inputs.

`ARRONDI_LITERT` names a Python interpreter with ai-edge-litert. Its reference kernels round sums twice ("double"), but those of fully connected layers
once ("single"); the optimized ones have roundings of their own, which now and then give the next code.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrondi.graph import Graph, Node, Program, Value, lower

pytestmark = pytest.mark.peer
FLOAT = np.dtype(np.float32)
SCRIPT = Path(__file__).with_name("litert_peer.py")
X, Y = (0.037, -7), (0.052, 11)
"""Scale and zero point of what enters and of what leaves."""


class Case:
    """An operator both ways: as TFLite has it (channels last) and as a graph of ours."""

    def __init__(self, name: str, op: str, options: tuple[str, dict[str, Any]], inputs: list[np.ndarray]) -> None:
        self.name, self.op, self.options, self.inputs = name, op, options, inputs
        self.tensors: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray] = {f"{name}/{i}": x for i, x in enumerate(inputs)}
        self.graph: Graph | None = None
        self.soft = False  # computed in floating point here, and by tables there

    def tensor(self, array: np.ndarray, scale: Any, zero: Any, axis: int = 0, constant: bool = False) -> int:
        row = {"shape": list(array.shape), "type": array.dtype.name, "scale": np.ravel(scale).tolist(), "zero": np.ravel(zero).tolist(), "axis": axis}  # fmt: skip
        if constant:
            row["data"] = f"{self.name}/constant{len(self.tensors)}"
            self.arrays[row["data"]] = array
        self.tensors.append(row)
        return len(self.tensors) - 1

    def said(self, inputs: list[int], output: int) -> dict[str, Any]:
        return {"name": self.name, "op": self.op, "options": self.options, "tensors": self.tensors, "inputs": inputs, "outputs": [output]}  # fmt: skip


def codes(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.integers(-128, 128, shape).astype(np.int8)


def first(x: np.ndarray) -> np.ndarray:
    """Channels last → first."""
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def graph_of(op: str, attrs: Mapping[str, Any], inputs: list[np.ndarray], grids: list[tuple[float, int]], y: tuple[float, int],
             weight: tuple[np.ndarray, np.ndarray, int] | None = None, bias: np.ndarray | None = None) -> Graph:  # fmt: skip
    """Codes → DequantizeLinear → the operator → QuantizeLinear → codes."""
    held: dict[str, np.ndarray] = {}
    nodes: list[Node] = []

    def real(stem: str, scale: Any, zero: Any, kind: Any = np.int8, axis: int | None = None) -> str:
        held[f"{stem}_scale"], held[f"{stem}_zero"] = np.array(scale, np.float32), np.array(zero, kind)
        own = {} if axis is None else {"axis": axis}
        nodes.append(Node(f"{stem}_real", "DequantizeLinear", (stem, f"{stem}_scale", f"{stem}_zero"), (f"{stem}_r",), own))  # fmt: skip
        return f"{stem}_r"

    read = [real(f"x{i}", *grid) for i, grid in enumerate(grids)]
    if weight is not None:
        held["w"] = weight[0]
        read.append(real("w", weight[1], np.zeros(np.shape(weight[1])), axis=weight[2] if np.ndim(weight[1]) else None))
    if bias is not None:
        held["b"] = (bias * (np.float64(np.float32(grids[0][0])) * weight[1])).astype(np.float32)  # type: ignore[index]
        read.append("b")
    nodes.append(Node("it", op, tuple(read), ("r",), attrs))
    held["y_scale"], held["y_zero"] = np.array(y[0], np.float32), np.array(y[1], np.int8)
    nodes.append(Node("q", "QuantizeLinear", ("r", "y_scale", "y_zero"), ("y",), {"codes": "int8"}))
    ends = tuple(Value(f"x{i}", np.dtype(np.int8), first(x).shape) for i, x in enumerate(inputs))
    return Graph("one", tuple(nodes), ends, (Value("y", np.dtype(np.int8), ()),), held, 21)


STRIDES = {"padding": 1, "strideH": 2, "strideW": 1}  # VALID
CONV = {"strides": [2, 1]}
LAYERS: dict[str, tuple[str, tuple[str, dict[str, Any]], Any, Any, Any, int, tuple[int, ...], str, dict[str, Any]]] = {
    "conv": ("CONV_2D", ("Conv2DOptions", STRIDES), (2, 9, 8, 6), (10, 3, 3, 6), (2, 4, 6, 10), 0, (0, 3, 1, 2), "Conv", CONV),
    "depthwise": (
        "DEPTHWISE_CONV_2D", ("DepthwiseConv2DOptions", {**STRIDES, "depthMultiplier": 1}), (2, 9, 8, 6), (1, 3, 3, 6), (2, 4, 6, 6), 3,
        (3, 0, 1, 2), "Conv", {**CONV, "group": 6},
    ),
    "full": ("FULLY_CONNECTED", ("FullyConnectedOptions", {}), (90, 40), (12, 40), (90, 12), 0, (0, 1), "Gemm", {"transB": 1}),
}  # fmt: skip
"""TFLite's operator and options, shapes of input, weight and output, the weight's axis of outputs, its order here, our operator."""


def layers(draw: np.random.Generator) -> list[tuple[Case, dict[str, Any]]]:
    """Convolutions and a fully connected layer."""
    found = []
    for name, (op, options, inside, kernel, outside, axis, order, ours, attrs) in LAYERS.items():
        x, w = codes(draw, *inside), np.maximum(codes(draw, *kernel), -127)
        count = w.shape[axis]
        scales = draw.uniform(0.0005, 0.004, 1 if name == "full" else count).astype(np.float32)
        bias = draw.integers(-2000, 2000, count).astype(np.int32)
        case, zeros = Case(name, op, options, [x]), np.zeros(len(scales), int)
        read = [
            case.tensor(x, *X), case.tensor(w, scales, zeros, axis, True), case.tensor(bias, np.float32(X[0]) * scales, zeros, 0, True),
        ]  # fmt: skip
        said = case.said(read, case.tensor(np.zeros(outside, np.int8), *Y))
        weight = np.ascontiguousarray(w.transpose(order)), scales if len(scales) > 1 else scales[0], 0
        case.graph = graph_of(ours, attrs, [x], [X], Y, weight, bias)
        found.append((case, said))
    return found


def others(draw: np.random.Generator) -> list[tuple[Case, dict[str, Any]]]:
    """Sums, means, joins, and functions of one value."""
    a, b, pair = codes(draw, 2, 5, 6, 3), codes(draw, 2, 5, 6, 3), (0.021, 5)
    flat = codes(draw, 16, 10)
    wide = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
    pool = {"padding": 1, "strideH": 2, "strideW": 2, "filterHeight": 2, "filterWidth": 3}
    third = (1 / 256, -128)
    rows: list[tuple[str, str, tuple[str, dict[str, Any]], list[np.ndarray], list[Any], Any, tuple[int, ...], str, dict[str, Any]]] = [
        ("add", "ADD", ("AddOptions", {}), [a, b], [X, pair], Y, a.shape, "Add", {}),
        ("pool", "AVERAGE_POOL_2D", ("Pool2DOptions", pool), [a], [X], X, (2, 2, 2, 3), "AveragePool", {"kernel_shape": [2, 3], "strides": [2, 2]}),
        ("concat", "CONCATENATION", ("ConcatenationOptions", {"axis": 3}), [a, b], [X, X], X, (2, 5, 6, 6), "Concat", {"axis": 1}),
        ("logistic", "LOGISTIC", ("", {}), [wide], [(0.06, 3)], third, wide.shape, "Sigmoid", {}),
        ("tanh", "TANH", ("", {}), [wide], [(0.03, 3)], (1 / 128, 0), wide.shape, "Tanh", {}),
        ("softmax", "SOFTMAX", ("SoftmaxOptions", {"beta": 1.0}), [flat], [(0.06, 3)], third, flat.shape, "Softmax", {"axis": -1}),
    ]  # fmt: skip
    found = []
    for name, op, options, inputs, grids, y, shape, ours, attrs in rows:
        case = Case(name, op, options, inputs)
        read = [case.tensor(x, *grid) for x, grid in zip(inputs, grids, strict=True)]
        said = case.said(read, case.tensor(np.zeros(shape, np.int8), *y))
        case.graph, case.soft = graph_of(ours, attrs, inputs, grids, y), name == "softmax"
        found.append((case, said))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], Any]:
    python = os.environ.get("ARRONDI_LITERT", "")
    if not python:
        pytest.skip("ARRONDI_LITERT names no interpreter with ai-edge-litert")
    folder, draw = tmp_path_factory.mktemp("litert"), np.random.default_rng(0)
    rows = [*layers(draw), *others(draw)]
    arrays = {k: v for case, _ in rows for k, v in case.arrays.items()}
    np.savez(folder / "cases.npz", cases=json.dumps([said for _, said in rows]), **arrays)
    done = subprocess.run([python, SCRIPT, folder / "cases.npz", folder / "out.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [case for case, _ in rows], np.load(folder / "out.npz")


@pytest.mark.parametrize("kernels", ["reference", "optimized"])
def test_codes_are_those_of_tflite(results: tuple[list[Case], Any], kernels: str) -> None:
    away = {}
    for case in results[0]:
        assert case.graph is not None
        lowered = lower(case.graph, "single" if case.name == "full" else "double")
        assert case.soft or not lowered.floats, case.name
        ours = Program(lowered.graph)(*[torch.from_numpy(np.ascontiguousarray(first(x))) for x in case.inputs])
        theirs = first(results[1][f"{case.name}/{kernels}"])
        away[case.name] = np.abs(ours.numpy().astype(int) - theirs.astype(int))
    allowed = {case.name: int(case.soft or kernels == "optimized") for case in results[0]}
    said = {n: (int(d.max()), float((d > 0).mean())) for n, d in away.items()}
    assert all(most <= allowed[n] and share < 0.01 for n, (most, share) in said.items()), said
    spread = {n: len(np.unique(results[1][f"{n}/{kernels}"])) for n in away}
    assert min(spread.values()) > 20, spread  # nothing is all saturated
