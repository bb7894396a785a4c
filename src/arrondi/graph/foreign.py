"""Operators of other sets than ONNX's own, computed by ONNX Runtime if it has them: `by_runtime`; and `check_known`, which refuses the others.

They stay in floating point and are counted. Gradients do not pass through them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from arrondi.errors import SchemeError
from arrondi.graph.ir import Graph, Node
from arrondi.graph.protos import node_proto
from arrondi.graph.read import onnx_package

_WITHOUT = "Without data they stay as they are, in floating point: leave calibration and evaluation data out, and round weights alone (W8A16, rtn) or inputs over their own ranges (w=int8/channel,a=uint8/tensor/asym)."


def check_known(graph: Graph, computed: Mapping[str, Any]) -> None:
    """Refuse a network with operators that cannot be run here.

    Args:
        computed: operators that need no runtime.

    Raises:
        SchemeError: it has some; the sentence names all of them, and how many there are.
    """
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if "." in node.op and node.op not in computed and not _has(node.op):
            counts[node.op] = counts.get(node.op, 0) + 1
    if counts:
        told = ", ".join(f"{op} ({count})" for op, count in counts.items())
        raise SchemeError(
            f"Neither ONNX nor ONNX Runtime on this machine knows {told}, so the network cannot be run on samples. {_WITHOUT}"
        )


def by_runtime(
    node: Node, inputs: Sequence[torch.Tensor | None], opset: int, domains: Mapping[str, int]
) -> tuple[torch.Tensor, ...]:
    """What a node computes.

    Args:
        domains: version of every operator set of others.

    Raises:
        SchemeError: the runtime does not know it, or cannot compute it on these inputs.
    """
    onnx = onnx_package()
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    wanted = [f"y{i}" if name else "" for i, name in enumerate(node.outputs)]
    feeds = {n: x.detach().cpu().numpy() for n, x in zip(names, inputs, strict=True) if x is not None}
    info, kind = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    ends = [info(n, kind(v.dtype), [None] * v.ndim) for n, v in feeds.items()]
    outputs = [onnx.helper.make_empty_tensor_value_info(n) for n in wanted if n]
    own = node.op.rpartition(".")[0]
    sets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(own, domains.get(own, 1))]
    graph = onnx.helper.make_graph([node_proto(node.op, names, wanted, "one", node.attrs)], "one", ends, outputs)
    model = onnx.helper.make_model(graph, opset_imports=sets)
    model.ir_version = 10
    try:
        values = _session(model.SerializeToString()).run(None, feeds)
    except ImportError as error:
        raise SchemeError(f"{node.name}: the operator {node.op} is run by ONNX Runtime, which is not installed. Install it (pip install onnxruntime), or leave data out.") from error  # fmt: skip
    except Exception as error:  # the runtime has many of its own
        line = str(error).strip().partition("\n")[0][:200]
        raise SchemeError(f"{node.name}: ONNX Runtime cannot compute the operator {node.op} ({line}). Export the network without it.") from error  # fmt: skip
    found = iter(values)
    return tuple(torch.from_numpy(np.array(next(found))) if name else torch.zeros(0) for name in wanted)


@functools.lru_cache(maxsize=64)
def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it cannot do is said in words of our own
    options.intra_op_num_threads = max(torch.get_num_threads(), 1)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _has(op: str) -> bool:
    """Whether the runtime has an operator; one that is not there, or does not say what it has, is asked when the network runs."""
    domain, _, name = op.rpartition(".")
    known = _schemas()
    return not known or (domain, name) in known


@functools.lru_cache(maxsize=1)
def _schemas() -> frozenset[tuple[str, str]]:
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        return frozenset((s.domain, s.name) for s in state.get_all_operator_schema())
    except (ImportError, AttributeError):
        return frozenset()
