"""Nodes with constant weights as PyTorch's modules: `LAYERS` and `layer_of`.

A convolution that is padded more on one side has a module without padding; `padding_of` says what is put around its input before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn

from arrondi.graph.codes import tensor_of
from arrondi.graph.ir import Graph, Node
from arrondi.graph.recurrent import Recurrent, usual
from arrondi.graph.windows import edges, transposed_edges

_CONV: Final[Mapping[int, Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Final[Mapping[int, Any]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _constants(node: Node, graph: Graph) -> list[torch.Tensor] | None:
    """Weight and bias, if they are known and floating."""
    names = [n for n in node.inputs[1:] if n]
    if not names or any(n not in graph.constants for n in names):
        return None
    found = [tensor_of(graph.constants[n]) for n in names]
    return found if all(t.dtype == torch.float32 for t in found) else None


def _filled(module: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.reshape(-1).contiguous(), requires_grad=False)
    module.requires_grad_(False)
    filled: nn.Module = module
    return filled


def _conv(node: Node, graph: Graph) -> nn.Module | None:
    found = _constants(node, graph)
    if found is None or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "", "VALID"):
        return None  # how it is padded would depend on the size of the input
    weight, bias = found[0], found[1] if len(found) > 1 else None
    space, groups = weight.ndim - 2, node.attrs.get("group", 1)
    begin, end = edges(node.attrs, [0] * space, weight.shape[2:])
    if space not in _CONV:
        return None
    one = [1] * space
    begin = begin if begin == end else [0] * space
    with torch.device("meta"):
        made = _CONV[space](
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), tuple(node.attrs.get("strides", one)),
            tuple(begin), tuple(node.attrs.get("dilations", one)), groups, bias is not None,
        )  # fmt: skip
    return _filled(made, weight, bias)


def _conv_transpose(node: Node, graph: Graph) -> nn.Module | None:
    found = _constants(node, graph)
    plain = node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "") and "output_shape" not in node.attrs
    if found is None or not plain:
        return None
    weight, bias = found[0], found[1] if len(found) > 1 else None
    space, groups = weight.ndim - 2, node.attrs.get("group", 1)
    begin, end = transposed_edges(node.attrs, [0] * space, weight.shape[2:])
    if begin != end or space not in _TRANSPOSED:
        return None
    one, zero = [1] * space, [0] * space
    with torch.device("meta"):
        made = _TRANSPOSED[space](
            weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), tuple(node.attrs.get("strides", one)), tuple(begin),
            tuple(node.attrs.get("output_padding", zero)), groups, bias is not None, tuple(node.attrs.get("dilations", one)),
        )  # fmt: skip
    return _filled(made, weight, bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return _filled(made, weight, bias)


def _gemm(node: Node, graph: Graph) -> nn.Module | None:
    found = _constants(node, graph)
    attrs = node.attrs
    if found is None or attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return None
    weight = found[0] if attrs.get("transB", 0) else found[0].T
    bias = found[1] if len(found) > 1 else None
    if bias is not None and bias.numel() != weight.shape[0]:
        return None
    return _linear(weight, bias)


def _matmul(node: Node, graph: Graph) -> nn.Module | None:
    found = _constants(node, graph)
    return None if found is None or found[0].ndim != 2 else _linear(found[0].T, None)


def padding_of(node: Node, module: nn.Module) -> list[int]:
    """What is put around a layer's input before its module, last axis first, as `torch.nn.functional.pad` takes it."""
    if node.op != "Conv" or not isinstance(module, nn.modules.conv._ConvNd):
        return []
    begin, end = edges(node.attrs, [0] * len(module.kernel_size), module.kernel_size)
    return [] if begin == end else [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]


def _recurrent(node: Node, graph: Graph) -> nn.Module | None:
    names = [*node.inputs, *[""] * 4][1:4]
    if any(n and n not in graph.constants for n in names) or not usual(node.attrs):
        return None
    w, r, b = (tensor_of(graph.constants[n]) if n else None for n in names)
    return None if w is None or r is None else Recurrent(node.op, node.attrs, w, r, b)


def layers_in(node: Node, module: nn.Module) -> dict[str, str]:
    """Layer → where it lies in the node's module: the node itself, or the parts of a recurrent one."""
    if not isinstance(module, Recurrent):
        return {node.name: ""}
    return {f"{node.name}.{part}.{d}": f".{part}.{d}" for part in RECURRENT for d in range(len(getattr(module, part)))}


def read_beside(node: Node) -> tuple[str, ...]:
    """What a node's module reads when it runs: its input, and what follows the bias of a recurrent one."""
    return (node.inputs[0], *node.inputs[4:]) if node.op in ("LSTM", "GRU") else node.inputs[:1]


RECURRENT: Final[Mapping[str, int]] = {"enter": 1, "again": 2}
"""Part of a recurrent layer → which input of its node holds the weights."""

LAYERS: Final[Mapping[str, Callable[[Node, Graph], nn.Module | None]]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul,
    "LSTM": _recurrent, "GRU": _recurrent,
}  # fmt: skip
"""Operator → its module, None where its weights are not constant or no module computes it."""
