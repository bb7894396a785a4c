"""Integer operators against ONNX Runtime's, code for code, on random shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arrondi.graph.codes import tensor_of
from arrondi.graph.ir import Node
from arrondi.graph.ops import evaluate

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def both(op: str, feeds: dict[str, np.ndarray], attrs: dict[str, Any], kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """What we and ONNX Runtime compute."""
    domain, _, name = op.rpartition(".")
    helper = onnx.helper
    node = helper.make_node(name, [n if n in feeds else "" for n in feeds], ["y"], domain=domain or None, **attrs)
    info = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()
    ]
    made = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    constants = [onnx.numpy_helper.from_array(v, n) for n, v in feeds.items() if n not in ("x", "a")]
    live = [i for i in info if i.name in ("x", "a")]
    model = helper.make_model(
        helper.make_graph([node], "g", live, [made], constants), opset_imports=imports, ir_version=10
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {i.name: feeds[i.name] for i in live})
    (ours, *_) = evaluate(Node("n", op, tuple(feeds), ("y",), attrs), [tensor_of(v) for v in feeds.values()], 21)
    return ours.numpy(), theirs


def codes(rng: np.random.Generator, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    ends = np.iinfo(kind)
    return rng.integers(ends.min, ends.max + 1, shape).astype(kind)


CONVOLUTIONS: list[dict[str, Any]] = [
    {"n": 2, "i": 3, "o": 5, "k": (3, 3), "attrs": {"pads": [1, 0, 2, 1]}},
    {"n": 1, "i": 8, "o": 8, "k": (3, 3), "attrs": {"group": 8, "pads": [1, 1, 1, 1], "strides": [2, 1]}},
    {"n": 1, "i": 6, "o": 9, "k": (2, 3), "attrs": {"group": 3, "dilations": [2, 1], "pads": [2, 2, 0, 1]}},
    {"n": 3, "i": 16, "o": 17, "k": (1, 1), "attrs": {"strides": [2, 2]}},
    {"n": 2, "i": 4, "o": 6, "k": (3,), "attrs": {"pads": [2, 1], "strides": [2]}},
    {"n": 1, "i": 70, "o": 3, "k": (3, 3), "attrs": {}},
]


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_are_those_of_onnx_runtime(case: dict[str, Any], kind: Any) -> None:
    rng = np.random.default_rng(len(case["k"]) + case["o"])
    space, groups = len(case["k"]), case["attrs"].get("group", 1)
    channels = np.float32(10.0 ** rng.uniform(-4, -2, case["o"]))
    fan = case["i"] // groups * int(np.prod(case["k"]))
    feeds = {
        "x": codes(rng, (case["n"], case["i"], 9, 8, 7)[: 2 + space], kind), "sx": np.float32(0.021), "zx": codes(rng, (), kind),
        "w": codes(rng, (case["o"], case["i"] // groups, *case["k"]), np.int8), "sw": channels, "zw": np.zeros(case["o"], np.int8),
        "sy": np.float32(0.021 * 0.002 * 73 * fan**0.5), "zy": codes(rng, (), kind),
        "b": rng.integers(-(10**5), 10**5, case["o"]).astype(np.int32),
    }  # fmt: skip
    ours, theirs = both("QLinearConv", feeds, case["attrs"], kind)
    assert len(np.unique(ours)) > 20
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["com.microsoft.QLinearAdd", "com.microsoft.QLinearMul"])
@pytest.mark.parametrize("shapes", [((5, 100), (5, 100)), ((4, 7, 33), (7, 1)), ((3, 40), (1,)), ((1,), (6, 9))])
def test_sums_and_products_of_two(op: str, shapes: Any, kind: Any) -> None:
    rng = np.random.default_rng(len(shapes[0]))
    for _ in range(6):
        sa, sb, sy = (np.float32(v) for v in 10.0 ** rng.uniform(-2, -1, 3))
        sy = np.float32(sa + sb) if op.endswith("Add") else np.float32(sa * sb * 60)
        feeds = {
            "a": codes(rng, shapes[0], kind), "sa": sa, "za": codes(rng, (), kind), "b": codes(rng, shapes[1], kind), "sb": sb,
            "zb": codes(rng, (), kind), "sy": sy, "zy": codes(rng, (), kind),
        }  # fmt: skip
        np.testing.assert_array_equal(*both(op, feeds, {}, kind))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_matrices_and_means_and_joins(kind: Any) -> None:
    rng = np.random.default_rng(3)

    def grid(name: str, scale: float) -> dict[str, np.ndarray]:
        return {f"s{name}": np.float32(scale), f"z{name}": codes(rng, (), kind)}

    x = {"x": codes(rng, (2, 5, 9, 11), kind), **grid("x", 0.03)}
    for count in (1, 4, 7):
        image = {"x": codes(rng, (2, 5, count, 11), kind), **grid("x", 0.03), **grid("y", 0.011)}
        np.testing.assert_array_equal(*both("com.microsoft.QLinearGlobalAveragePool", image, {}, kind))
    for attrs in (
        {"kernel_shape": [2, 3], "strides": [2, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1]},
    ):
        np.testing.assert_array_equal(*both("com.microsoft.QLinearAveragePool", {**x, **grid("y", 0.02)}, attrs, kind))
    a = {"a": codes(rng, (6, 40), kind), **grid("a", 0.03)}
    w = {
        "w": codes(rng, (40, 12), np.int8),
        "sw": np.float32(10.0 ** rng.uniform(-3, -2, 12)),
        "zw": np.zeros(12, np.int8),
    }
    np.testing.assert_array_equal(*both("QLinearMatMul", {**a, **w, **grid("y", 0.4)}, {}, kind))
    bias = {"c": rng.integers(-9999, 9999, 12).astype(np.int32)}
    np.testing.assert_array_equal(*both("com.microsoft.QGemm", {**a, **w, **bias, **grid("y", 0.4)}, {}, kind))
    np.testing.assert_array_equal(*both("com.microsoft.QGemm", {**a, **w, **bias}, {}, np.float32))
    parts = {"sy": np.float32(0.04), "zy": codes(rng, (), kind), **a, "w2": codes(rng, (6, 3), kind), **grid("2", 0.04)}
    np.testing.assert_array_equal(*both("com.microsoft.QLinearConcat", parts, {"axis": 1}, kind))
