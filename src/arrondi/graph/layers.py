"""Nodes with constant weights as PyTorch's modules: `LAYERS` and `layer_of`.

A convolution that is padded more on one side has a module without padding, and a transposed one is a convolution over an input with zeros in it;
`padding_of` says what is done to its input before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from arrondi.graph.codes import tensor_of
from arrondi.graph.ir import Graph, Node
from arrondi.graph.recurrent import Recurrent, usual
from arrondi.graph.windows import edges, transposed_edges

_CONV: Final[Mapping[int, Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
    """A convolution over its input with zeros put between the numbers; its kernel is turned round."""
    found = _constants(node, graph)
    plain = node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "") and "output_shape" not in node.attrs
    if found is None or not plain:
        return None
    weight, bias = found[0], found[1] if len(found) > 1 else None
    space, groups = weight.ndim - 2, node.attrs.get("group", 1)
    if space not in _CONV:
        return None
    with torch.device("meta"):
        made = _CONV[space](
            weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), 1, 0,
            tuple(node.attrs.get("dilations", [1] * space)), groups, bias is not None,
        )  # fmt: skip
    return _filled(made, turned(weight, groups), bias)


def turned(weight: Any, groups: int) -> Any:
    """The kernel (in, outputs of a group, …) of a transposed convolution as (out, inputs of a group, …), turned round in space.

    A tensor, or an array. The same again, with outputs and inputs exchanged, is the inverse.
    """
    inside, outside, *places = weight.shape
    split = weight.reshape(groups, inside // groups, outside, *places)
    swapped = (split.swapaxes(1, 2)).reshape(groups * outside, inside // groups, *places)
    axes = tuple(range(2, swapped.ndim))
    return (
        swapped.flip(axes)
        if isinstance(swapped, torch.Tensor)
        else swapped[(slice(None), slice(None), *[slice(None, None, -1)] * len(axes))]
    )


@dataclass(frozen=True)
class Margin:
    """What is done to a layer's input before its module.

    Attributes:
        gaps: numbers along each axis of space, between which zeros are put: one more than there are zeros; () for none.
        padding: as `torch.nn.functional.pad` takes it, last axis first; negative numbers cut.
    """

    gaps: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if any(n > 1 for n in self.gaps):
            sizes = [(n - 1) * gap + 1 for n, gap in zip(x.shape[2:], self.gaps, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *sizes)
            wide[(slice(None), slice(None), *(slice(None, None, gap) for gap in self.gaps))] = x
            x = wide
        return nn.functional.pad(x, self.padding) if any(self.padding) else x


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
    return None if found is None or found[0].ndim != 2 else _linear(found[0].T, found[1] if len(found) > 1 else None)


def padding_of(node: Node, module: nn.Module) -> Margin:
    """What is put into and around a layer's input before its module."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return Margin()
    space = len(module.kernel_size)
    if node.op == "ConvTranspose":
        zero = [0] * space
        begin, end = transposed_edges(node.attrs, zero, module.kernel_size)
        more = node.attrs.get("output_padding", zero)
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        low = [span - b for span, b in zip(spans, begin, strict=True)]
        high = [span - e + m for span, e, m in zip(spans, end, more, strict=True)]
        gaps = tuple(node.attrs.get("strides", [1] * space))
        return Margin(gaps, tuple(n for pair in zip(reversed(low), reversed(high), strict=True) for n in pair))
    begin, end = edges(node.attrs, [0] * space, module.kernel_size)
    if begin == end:
        return Margin()
    return Margin((), tuple(n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair))


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
