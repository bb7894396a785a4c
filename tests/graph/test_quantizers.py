"""Every case of ONNX's own that quantizes, through our importer and our operators: exactly what it expects."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from arrondi.graph import Program, read_graph
from arrondi.graph.codes import tensor_of

onnx = pytest.importorskip("onnx")

OPERATORS = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
}  # fmt: skip


def _array(value: Any) -> np.ndarray:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _quantizes(case: Any) -> bool:
    """It has such an operator, or it makes powers of two (e8m0) of numbers or numbers of them."""
    return any(n.op_type in OPERATORS for n in case.model.graph.node) or "e8m0" in case.name.lower()


def test_all_cases_that_quantize() -> None:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [c for c in collect_testcases(None) if _quantizes(c)]
    wrong = []
    for case in cases:
        program = Program(read_graph(case.model))
        for inputs, outputs in case.data_sets:
            found = program(*(tensor_of(_array(v)) for v in inputs))
            for ours, theirs in zip(found if isinstance(found, tuple) else (found,), map(_array, outputs), strict=True):
                if not np.array_equal(ours.numpy().astype(np.float64), theirs.astype(np.float64), equal_nan=True):
                    wrong.append(case.name)
    assert not wrong
    assert len(cases) >= 49
