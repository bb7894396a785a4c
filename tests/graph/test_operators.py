"""Operators against ONNX's own test cases, which hold what each must give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from arrondi.graph.codes import tensor_of
from arrondi.graph.ops import OPERATORS, evaluate
from arrondi.graph.read import read_graph

pytest.importorskip("onnx")

NO_TENSORS = {"test_identity_sequence", "test_identity_opt", "test_equal_string", "test_equal_string_broadcast"}


def _cases() -> Iterator[Any]:
    """Those of one node that our table has."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        nodes = case.model.graph.node
        arrays = all(isinstance(v, (np.ndarray, np.generic)) for ins, _ in case.data_sets for v in ins)
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS and arrays and case.name not in NO_TENSORS:
            yield case


def _array(value: Any) -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def test_every_operator_gives_what_onnx_says() -> None:
    checked: set[str] = set()
    wrong: list[str] = []
    for case in _cases():
        graph = read_graph(case.model)
        (node,) = graph.nodes
        names = [v.name for v in case.model.graph.input]
        for inputs, outputs in case.data_sets:
            given = {n: tensor_of(v) for n, v in {**graph.constants, **dict(zip(names, inputs, strict=False))}.items()}
            try:
                found = evaluate(node, [given.get(n) if n else None for n in node.inputs], graph.opset)
                kept = [x for x, name in zip(found, node.outputs, strict=False) if name]
                for ours, theirs in zip(kept, map(_array, outputs), strict=True):
                    assert tuple(ours.shape) == np.shape(theirs)
                    np.testing.assert_allclose(
                        ours.numpy().astype(np.float64), np.asarray(theirs).astype(np.float64), case.rtol or 1e-3, 1e-5
                    )
            except Exception as error:
                wrong.append(f"{case.name}: {type(error).__name__} {str(error).strip()[:80]}")
        checked.add(node.op)
    assert not wrong
    assert len(checked) >= 90
