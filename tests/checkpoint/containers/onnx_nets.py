"""Small networks in ONNX's operators, and what ONNX Runtime's own quantizers make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS = {"onnx::MatMul_7": (64, 48), "head.weight": (48, 40)}
"""Constants (in, out) that inputs are multiplied by, in a row."""
MODULES = {"onnx::MatMul_7": "encoder.layer.0.dense.weight", "head.weight": "head.weight"}
"""What the weights are called by their modules."""


def mlp(path: Path | None = None, table: bool = False) -> onnx.ModelProto:
    """Two products, as an exporter leaves them: the constant of the first has no name, the second one's has; with a table, rows of it are looked up first."""
    rng = np.random.default_rng(0)
    held = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in LAYERS.items()]
    held.append(numpy_helper.from_array(rng.standard_normal(48).astype(np.float32), "encoder.layer.0.dense.bias"))
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["a"], "/encoder/layer.0/dense/MatMul"),
        helper.make_node("Add", ["a", "encoder.layer.0.dense.bias"], ["b"], "/encoder/layer.0/dense/Add"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "head.weight"], ["y"], "/head/MatMul"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    if table:
        held.append(numpy_helper.from_array(rng.standard_normal((30, 64)).astype(np.float32), "words.weight"))
        nodes.insert(0, helper.make_node("Gather", ["words.weight", "ids"], ["x"], "/words/Gather"))
        inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40])]
    model = helper.make_model(helper.make_graph(nodes, "mlp", inputs, outputs, held), opset_imports=[helper.make_opsetid("", 21)])  # fmt: skip
    model.ir_version = 10
    if path is not None:
        onnx.save(model, path)
    return model


def in_blocks(model: Any, bits: int, symmetric: bool, *, standard: bool = False, table: bool = False) -> Any:
    """What ONNX Runtime's quantizer of blocks makes of it."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=16, is_symmetric=symmetric, bits=bits, quant_format=QuantFormat.QDQ if standard else QuantFormat.QOperator,
        op_types_to_quantize=("MatMul", "Gather") if table else ("MatMul",),
    )  # fmt: skip
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def in_four(model: Any, kind: int) -> Any:
    """What ONNX Runtime's quantizer to bitsandbytes' FP4 (0) or NF4 (1) makes of it."""
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    quantizer = MatMulBnb4Quantizer(model, kind, 16)
    quantizer.process()
    return quantizer.model.model


def values_of(path: Path, ids: bool = False, seed: int = 1) -> np.ndarray:
    """What ONNX Runtime computes with a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    given = {"ids": np.arange(12)} if ids else {"x": rng.standard_normal((5, 64)).astype(np.float32)}
    result: np.ndarray = session.run(None, given)[0]
    return result
