"""A graph as an ONNX file: `write_graph`, `to_onnx`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from arrondi.errors import OutputError, SchemeError
from arrondi.graph.ir import ARITHMETIC, QDQ, Graph, Node
from arrondi.graph.protos import node_proto
from arrondi.graph.read import onnx_package
from arrondi.graph.uneven import spelled

_TWO_BITS: Final = 25
"""The first operator set with codes of two bits."""
_MOST: Final = 1_900_000_000
"""Bytes of constants in one file; the format ends at two gigabytes."""
_SMALL: Final = 1024
"""Bytes of a constant that stays in the file all the same."""
_ALIGNED: Final = 4096
"""Where constants begin in a file of their own, so that runtimes can map them."""
_NEW_IR: Final = 13
_USUAL_IR: Final = 10
"""Versions of the file format: with two bits, and what runtimes of the last two years read."""


def write_graph(graph: Graph, path: str | Path) -> None:
    """Write a graph; a file that is there is replaced only when the new one is complete.

    Constants that are too large together for one file go into another beside it, `beside(path)`.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    part, apart = path.with_name(f".{path.name}.part"), beside(path)
    data = apart.with_name(f".{apart.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = to_onnx(graph)
        if _is_large(graph):
            data.unlink(missing_ok=True)  # what is there would be added to
            _put_apart(model, data, apart.name)
            os.replace(data, apart)
        part.write_bytes(model.SerializeToString())
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}).") from error
    finally:
        part.unlink(missing_ok=True)
        data.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """The file of the constants of a network that one file cannot hold."""
    return path.with_name(f"{path.name}.data")


def _is_large(graph: Graph) -> bool:
    return sum(v.nbytes for v in graph.constants.values()) > _MOST


def _put_apart(model: Any, data: Path, name: str) -> None:
    """The model without its large constants, which are written to a file that it will know by a name."""
    helper = onnx_package().external_data_helper
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data") or len(tensor.raw_data) < _SMALL:
                continue
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            start, held = file.tell(), tensor.raw_data
            file.write(held)
            helper.set_external_data(tensor, name, start, len(held))
            tensor.ClearField("raw_data")


def to_onnx(graph: Graph) -> Any:
    """The graph as a checked `onnx.ModelProto`.

    Raises:
        SchemeError: it was lowered to fixed-point arithmetic, which no operator of a file says.
    """
    if any(ARITHMETIC in node.attrs for node in graph.nodes):
        raise SchemeError(
            "Files hold float multipliers, and this network was lowered to fixed-point ones. Lower it with 'float'."
        )
    onnx = onnx_package()
    helper = onnx.helper
    nodes = [made for node in graph.nodes for made in _nodes(node, graph, onnx)]
    read = {name for node in nodes for name in node.input} | graph.results
    initializers = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in graph.constants.items() if n in read]
    ends = [
        [helper.make_tensor_value_info(v.name, helper.np_dtype_to_tensor_dtype(v.dtype), list(v.shape)) for v in values]
        for values in (graph.inputs, graph.outputs)
    ]
    domains = {node.op.rpartition(".")[0] for node in graph.nodes} - {""}
    narrow = any(np.asarray(v).dtype.name in ("int2", "uint2") for v in graph.constants.values())
    opset = max(graph.opset, _TWO_BITS) if narrow else graph.opset
    imports = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(d, graph.domains.get(d, 1)) for d in sorted(domains)),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, graph.name, *ends, initializers), opset_imports=imports, producer_name="arrondi"
    )
    model.ir_version = _NEW_IR if opset >= _TWO_BITS else _USUAL_IR
    if not domains and not _is_large(graph):
        onnx.checker.check_model(model)
    return model


def _nodes(node: Node, graph: Graph, onnx: Any) -> Iterable[Any]:
    """A node of the file, or the two or three that round a value."""
    helper = onnx.helper
    if node.op == "MatMul" and len(node.inputs) > 2:  # see `tidy`
        (output,) = node.outputs
        yield helper.make_node("MatMul", node.inputs[:2], [f"{output}_product"], node.name)
        yield helper.make_node("Add", [f"{output}_product", node.inputs[2]], [output], f"{node.name}_bias")
        return
    if "grid" in node.attrs:
        for spelled_node, constants in spelled(node, graph.constants[node.inputs[1]]):
            for name, value in constants.items():
                yield helper.make_node("Constant", [], [name], name, value=onnx.numpy_helper.from_array(value, name))
            yield helper.make_node(spelled_node.op, spelled_node.inputs, spelled_node.outputs, spelled_node.name)
        return
    if node.op != QDQ:
        yield node_proto(node.op, node.inputs, node.outputs, node.name, node.attrs)
        return
    x, *grid = node.inputs
    if not grid:
        made = [f"{node.outputs[0]}_{part}" for part in ("codes", "scale", "zero_point")]
        yield helper.make_node("DynamicQuantizeLinear", [x], made, f"{node.name}_quantize")
        yield helper.make_node("DequantizeLinear", made, node.outputs, f"{node.name}_dequantize")
        return
    attrs = {k: v for k, v in node.attrs.items() if k in ("axis", "block_size")}
    codes = f"{node.outputs[0]}_codes"
    if "low" in node.attrs:  # codes of fewer bits than their type: what is beyond them is cut off before
        ends = [f"{node.name}_low", f"{node.name}_high"]
        scale, zero = (graph.constants[name] for name in grid)
        for name, code in zip(ends, (node.attrs["low"], node.attrs["high"]), strict=True):
            end = onnx.numpy_helper.from_array(((code - zero.astype(np.int64)) * scale).astype(np.float32), name)
            yield helper.make_node("Constant", [], [name], name, value=end)
        yield helper.make_node("Clip", [x, *ends], [f"{node.name}_clipped"], f"{node.name}_clip")
        x = f"{node.name}_clipped"
    yield helper.make_node("QuantizeLinear", [x, *grid], [codes], f"{node.name}_quantize", **attrs)
    yield helper.make_node("DequantizeLinear", [codes, *grid], node.outputs, f"{node.name}_dequantize", **attrs)
