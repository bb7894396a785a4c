"""One operator on int8 codes in TFLite's kernels. A script for an environment with ai-edge-litert; knows nothing of arrondi.

    python litert_peer.py CASES.npz RESULTS.npz

Cases are JSON under `cases`: {name, op, options, tensors: [{shape, type, scale, zero, axis, data}], inputs, outputs}; `data` names an array of the
archive that is constant. Arrays `NAME/i` are what input i gets. Results: `NAME/KERNELS`, for the reference kernels and the optimized ones.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

TYPES = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
KERNELS = {
    "reference": OpResolverType.BUILTIN_REF,
    "optimized": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
}


def built(case: dict[str, Any], arrays: Any) -> bytes:
    """The flatbuffer of a graph of one operator."""
    model, graph, code, node = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT(), schema.OperatorT()
    model.version, model.buffers, graph.tensors = 3, [schema.BufferT()], []
    for wanted in case["tensors"]:
        tensor, grid = schema.TensorT(), schema.QuantizationParametersT()
        tensor.shape, tensor.type, tensor.quantization, tensor.buffer = wanted["shape"], TYPES[wanted["type"]], grid, 0
        tensor.name = f"t{len(graph.tensors)}"
        grid.scale, grid.zeroPoint = wanted["scale"], wanted["zero"]
        grid.quantizedDimension = wanted.get("axis", 0)
        if wanted.get("data"):
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(arrays[wanted["data"]]).tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(tensor)
    code.builtinCode = getattr(schema.BuiltinOperator, case["op"])
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), case.get("version", 3)
    name, values = case["options"]
    node.opcodeIndex, node.inputs, node.outputs = 0, case["inputs"], case["outputs"]
    if name:
        options = getattr(schema, f"{name}T")()
        for key, value in values.items():
            setattr(options, key, value)
        node.builtinOptions, node.builtinOptionsType = options, getattr(schema.BuiltinOptions, name)
    constant = {i for i, t in enumerate(case["tensors"]) if t.get("data")}
    graph.inputs = [i for i in case["inputs"] if i not in constant]
    graph.outputs, graph.operators = case["outputs"], [node]
    model.operatorCodes, model.subgraphs = [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def main() -> None:
    arrays = np.load(sys.argv[1])
    found = {}
    for case in json.loads(str(arrays["cases"])):
        content = built(case, arrays)
        for kernels, resolver in KERNELS.items():
            interpreter = Interpreter(model_content=content, experimental_op_resolver_type=resolver)
            interpreter.allocate_tensors()
            for i, detail in enumerate(interpreter.get_input_details()):
                interpreter.set_tensor(detail["index"], arrays[f"{case['name']}/{i}"])
            interpreter.invoke()
            found[f"{case['name']}/{kernels}"] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
