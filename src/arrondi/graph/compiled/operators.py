"""Nodes as native steps: `EMITTERS`. An emitter adds the steps of a node and says so, or adds nothing and says no."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arrondi.graph.compiled import products, values
from arrondi.graph.compiled.builder import Emitter
from arrondi.graph.compiled.moves import index_moves, joins, looks_up, passes

_MOVED: Final = (
    "Transpose", "Slice", "Split", "Pad", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Resize",
)  # fmt: skip
EMITTERS: Final[Mapping[str, Emitter]] = {
    "QuantizeLinear": values.quantize, "DequantizeLinear": values.dequantize, "QLinearConv": products.conv, "com.microsoft.QGemm": products.gemm,
    "QLinearMatMul": products.matmul, "com.microsoft.QLinearAdd": values.pair, "com.microsoft.QLinearMul": values.pair, "MaxPool": values.largest,
    "com.microsoft.QLinearGlobalAveragePool": values.global_mean, "com.microsoft.QLinearAveragePool": values.average, "LeakyRelu": values.leaky, "ConvInteger": products.sums,
    "MatMulInteger": products.sums, "Clip": values.clip, "Cast": looks_up, "com.microsoft.QLinearConcat": joins,
    **dict.fromkeys(("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"), passes), **dict.fromkeys(_MOVED, index_moves),
}  # fmt: skip
"""Operator → what adds its steps."""
