"""A node as ONNX's own message: `node_proto`. Attributes are plain values in a graph, and have a kind each in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arrondi.graph.ir import CODES
from arrondi.graph.read import onnx_package


def node_proto(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attrs: Mapping[str, Any]) -> Any:
    """An `onnx.NodeProto`.

    Args:
        op: see `Node`.
        attrs: numbers, texts, arrays (which are tensors in a file) and lists of them; `CODES` is left out.
    """
    helper = onnx_package().helper
    domain, _, kind = op.rpartition(".")
    made = helper.make_node(kind, inputs, outputs, name, domain=domain or None)
    made.attribute.extend(_attribute(key, value) for key, value in attrs.items() if key != CODES)
    return made


def _attribute(key: str, value: Any) -> Any:
    onnx = onnx_package()
    several = isinstance(value, list)
    parts = [onnx.numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for v in (value if several else [value])]  # fmt: skip
    if not parts:
        return onnx.helper.make_attribute(key, [], attr_type=onnx.AttributeProto.INTS)
    return onnx.helper.make_attribute(key, parts if several else parts[0])
