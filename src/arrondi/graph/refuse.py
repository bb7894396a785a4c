"""Networks in which nothing can be rounded, said before any work: `check_rounded`."""

from __future__ import annotations

from arrondi.errors import SchemeError
from arrondi.graph.ir import Graph
from arrondi.graph.layers import LAYERS

_ON_CODES = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "com.microsoft.QGemm", "com.microsoft.DynamicQuantizeLSTM")  # fmt: skip


def check_rounded(graph: Graph) -> None:
    """Refuse a network that is quantized already, or computes in other numbers than float32.

    Args:
        graph: after `tidy`.

    Raises:
        SchemeError: it is so, or has no layer with constant weights.
    """
    makers = graph.producers
    codes = [
        n.name for n in graph.nodes
        if n.op in _ON_CODES or (n.op in LAYERS and any(m in makers and _of_codes(makers[m].op, makers[m].inputs, graph) for m in n.inputs[1:2]))
    ]  # fmt: skip
    if codes:
        raise SchemeError(f"The network is quantized already: {len(codes)} layers have weights of codes ({codes[0]} is the first). Give the network in floating point.")  # fmt: skip
    weights = [graph.constants[n.inputs[1]] for n in graph.nodes if n.op in LAYERS and len(n.inputs) > 1 and n.inputs[1] in graph.constants]  # fmt: skip
    others = sorted({w.dtype.name for w in weights if w.dtype.name != "float32"})
    if weights and len(others) and all(w.dtype.name != "float32" for w in weights):
        raise SchemeError(
            f"The network computes in {' and '.join(others)}, and float32 is rounded here. Export it in float32."
        )
    if not weights:
        raise SchemeError("The network has no layer (convolution, matrix product, LSTM, GRU) with constant weights, so there is nothing to round.")  # fmt: skip


def _of_codes(op: str, inputs: tuple[str, ...], graph: Graph) -> bool:
    return op == "DequantizeLinear" and inputs[0] in graph.constants
