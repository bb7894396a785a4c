"""An ONNX file as what is verified: `network_subject`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from arrondi.checkpoint import Checkpoint
from arrondi.checkpoint.containers.graph_weights import CODES
from arrondi.errors import ArrondiError, SchemeError
from arrondi.graph import Graph, Program, lower, read_graph
from arrondi.graph.sizes import free_batch
from arrondi.measure.arrays import read_arrays
from arrondi.verification.consumers import NETWORK
from arrondi.verification.expected import OF_NETWORKS
from arrondi.verification.predict import Predicted
from arrondi.verification.prompt import numbers_for
from arrondi.verification.subject import Subject

_PACKED: Final = "com.microsoft.MatMulNBits"
_NEAR: Final[Mapping[str, float]] = {"onnxruntime": 2.0**-10, "openvino": 2.0**-6}
"""Consumer → how near to the middle of two codes, in steps, a value may go to either."""


def network_subject(path: str | Path, data: str | Path | None = None) -> Subject:
    """A network.

    Args:
        data: samples, as for `evaluate`; None: made-up numbers.

    Raises:
        FileFormatError: not a network; DataError: samples that do not fit.
        SchemeError: no ONNX file.
    """
    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise SchemeError(f"{path}: only .onnx files are run by other programs. Quantize it into one first.")
    graph = read_graph(path)
    if data is None:
        inputs, words = numbers_for(graph), "made-up numbers"
    else:
        samples = read_arrays(data, graph)
        batch = next(samples.batches())
        inputs = {v.name: x.numpy() for v, x in zip(graph.inputs, batch, strict=True)}
        words = f"the first {len(batch[0])} samples of {samples.source}"

    graph = _with_own_weights(graph, path)
    refusals = {"openvino": f"openvino does not know {unknown[0]}."} if (unknown := _not_openvino(graph)) else {}

    def predicted(consumers: Sequence[str]) -> Mapping[str, Predicted]:
        given = [torch.from_numpy(x) for x in inputs.values()]
        return _predicted(free_batch(graph), given, consumers)

    request = {"file": str(path.resolve())}
    return Subject(path, NETWORK, inputs, words, refusals, request, OF_NETWORKS.__getitem__, predicted)


def _with_own_weights(graph: Graph, path: Path) -> Graph:
    """Products with packed weights as products with what these mean here: else the operator would be computed by the runtime that is to be verified."""
    packed = [n for n in graph.nodes if n.op == _PACKED and not any(n.inputs[4:])]
    if not packed:
        return graph
    checkpoint, constants, turned = Checkpoint.open(path), dict(graph.constants), {}
    for node in packed:
        name = node.inputs[1].removesuffix(CODES)
        if name in checkpoint.placed:
            made = next(graph.fresh(f"{name}_dense"))
            constants[made] = np.ascontiguousarray(checkpoint.dense(name).T.numpy())
            turned[node.name] = replace(node, op="MatMul", inputs=(node.inputs[0], made), attrs={})
    return graph.with_nodes([turned.get(n.name, n) for n in graph.nodes], constants)


def _not_openvino(graph: Graph) -> list[str]:
    """Operators on codes, which it does not read."""
    ops = {node.op for node in graph.nodes}
    return sorted(op for op in ops if op.rpartition(".")[2].startswith(("QLinear", "QGemm", "QAttention")))


@torch.no_grad()
def _predicted(graph: Graph, given: Sequence[torch.Tensor], consumers: Sequence[str]) -> dict[str, Predicted]:
    """As the graph says, in floats; as kernels for integers do it, biases as codes; and with values near the middle of two codes moved."""
    program = Program(graph)
    exact = _named(program(*given))
    try:
        likely = _named(Program(lower(graph).graph)(*given))
    except ArrondiError:  # nothing in it can be computed in integers
        likely = exact
    found = {}
    for name in consumers:
        with _NearTies(_NEAR[name]):
            found[name] = Predicted(exact, likely, _named(program(*given)))
    return found


class _NearTies(TorchFunctionMode):
    """Lets `torch.round` go the other way where a number lies so near to the middle."""

    def __init__(self, near: float) -> None:
        super().__init__()
        self._near = near

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.round and args[0].is_floating_point():
            noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
            args = (args[0] + self._near * noise, *args[1:])
        return func(*args, **(kwargs or {}))


def _named(outputs: Any) -> dict[str, np.ndarray]:
    each = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"output_{i}": value.numpy() for i, value in enumerate(each)}
