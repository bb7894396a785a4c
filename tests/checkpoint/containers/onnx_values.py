"""What ONNX Runtime makes of the weights of a graph: an oracle for the reader.

Owns: `runtime_values`. Each operator that holds codes is run alone: products get the identity, so that their result is the weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
PRODUCTS = ("MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul")


def runtime_values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Name of the constant that holds codes → the weight (out, in) of products, or what a DequantizeLinear or a GatherBlockQuantized gives."""
    constants = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        codes = next((n for n in node.input if n in constants), "")
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            found[codes] = _run(node, constants, model, None)
        elif node.op_type == "GatherBlockQuantized":
            rows = np.arange(constants[codes].dims[0])
            found[codes] = _run(node, constants, model, (node.input[1], rows))
        elif node.op_type in PRODUCTS:
            columns = next(a.i for a in node.attribute if a.name == "K")
            found[codes] = _run(node, constants, model, (node.input[0], np.eye(columns, dtype=np.float32))).T
    return found


def _run(node: Any, constants: dict[str, Any], model: Any, given: tuple[str, np.ndarray] | None) -> np.ndarray:
    held = [constants[n] for n in node.input if n in constants]
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    inputs = []
    if given is not None:
        kind = helper.np_dtype_to_tensor_dtype(given[1].dtype)
        inputs = [helper.make_tensor_value_info(given[0], kind, given[1].shape)]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph([alone], "one", inputs, [output], held)
    one = helper.make_model(graph, opset_imports=list(model.opset_import))
    one.ir_version = model.ir_version
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {} if given is None else {given[0]: given[1]})[0]
    return result


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A constant."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
