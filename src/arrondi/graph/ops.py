"""What ONNX's operators compute, in PyTorch: `OPERATORS`, and `evaluate` for one node.

Gradients pass through all of them. An operator that is not in the table is computed by the reference evaluator of the `onnx` package,
in NumPy: slowly, and without gradients; one of another set by ONNX Runtime (`arrondi.graph.foreign`).
Source: the ONNX operator specification, operator sets 13 to 23.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from arrondi.errors import SchemeError
from arrondi.graph.codes import dequantize, dynamic, quantize, rounded, tensor_of
from arrondi.graph.foreign import by_runtime
from arrondi.graph.integers import (
    conv_integer,
    matmul_integer,
    qgemm,
    qlinear_add,
    qlinear_average,
    qlinear_concat,
    qlinear_conv,
    qlinear_global_average,
    qlinear_matmul,
    qlinear_mul,
)
from arrondi.graph.ir import QDQ, Node, Unusual
from arrondi.graph.protos import node_proto
from arrondi.graph.read import onnx_package
from arrondi.graph.recurrent import dynamic_lstm, gru, lstm
from arrondi.graph.uneven import on_uneven
from arrondi.graph.windows import average_pool, conv, conv_transpose, max_pool, pad, resize

Tensor = torch.Tensor
Operator = Callable[..., Any]
"""(attributes, *inputs, None where one is left out) → a tensor, or a tuple of them."""


def evaluate(
    node: Node, inputs: Sequence[Tensor | None], opset: int, domains: Mapping[str, int] | None = None
) -> tuple[Tensor, ...]:
    """What a node computes.

    Args:
        opset, domains: versions of ONNX's operators and of those of others.

    Raises:
        SchemeError: it cannot be computed on these inputs.
    """
    made = OPERATORS.get(node.op)
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    if made is not None:
        with contextlib.suppress(Unusual, NotImplementedError):
            found = made(node.attrs, *given)
            values: tuple[Tensor, ...] = found if isinstance(found, tuple) else (found,)
            if len(values) >= len(node.outputs):
                return values
    if "." in node.op:
        return by_runtime(node, inputs, opset, domains or {})
    return _by_reference(node, inputs, opset)


_NOTHING: Final = torch.zeros(0)
"""In the place of an output that nobody wants."""


def _by_reference(node: Node, inputs: Sequence[Tensor | None], opset: int) -> tuple[Tensor, ...]:
    onnx = onnx_package()
    from onnx.reference import ReferenceEvaluator

    names = [name if x is not None else "" for name, x in zip(node.inputs, inputs, strict=True)]
    proto = node_proto(node.op, names, node.outputs, node.name, node.attrs)
    feeds = {n: x.detach().cpu().numpy() for n, x in zip(node.inputs, inputs, strict=True) if x is not None}
    outputs = [n for n in node.outputs if n]
    info = onnx.helper.make_tensor_value_info
    known = [info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()]
    graph = onnx.helper.make_graph(
        [proto], "one", known, [onnx.helper.make_empty_tensor_value_info(n) for n in outputs]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        values = ReferenceEvaluator(model).run(outputs, feeds)
    except Exception as error:  # the reference evaluator raises whatever NumPy does
        raise SchemeError(f"{node.name}: the operator {node.op} cannot be computed here ({error}).") from error
    found = {n: tensor_of(np.atleast_1d(v).reshape(np.shape(v))) for n, v in zip(outputs, values, strict=True)}
    return tuple(found.get(name, _NOTHING) for name in node.outputs)


def _axes(attrs: Mapping[str, Any], given: Tensor | None) -> list[int] | None:
    return list(attrs["axes"]) if "axes" in attrs else None if given is None else given.tolist()


def _reduce(of: Callable[..., Tensor]) -> Operator:
    def reduced(attrs: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
        if not x.numel():
            raise Unusual("nothing")
        wanted = _axes(attrs, axes)
        if wanted is None or not wanted:
            if attrs.get("noop_with_empty_axes", 0):
                return x
            wanted = list(range(x.ndim))
        return of(x, dim=wanted, keepdim=bool(attrs.get("keepdims", 1)))

    return reduced


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.ndim for d in dim), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _gemm(attrs: Mapping[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = (m.mT if attrs.get(key, 0) else m for m, key in ((a, "transA"), (b, "transB")))
    y = attrs.get("alpha", 1.0) * (a @ b)
    return y if c is None else y + attrs.get("beta", 1.0) * c


def _batch_norm(attrs: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if attrs.get("training_mode", 0):
        raise Unusual("training")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, attrs.get("epsilon", 1e-5))


def _layer_norm(attrs: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = attrs.get("axis", -1) % x.ndim
    y = F.layer_norm(x, x.shape[axis:], None, None, attrs.get("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def _instance_norm(attrs: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=attrs.get("epsilon", 1e-5))


def _group_norm(attrs: Mapping[str, Any], x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, attrs["num_groups"], scale, bias, attrs.get("epsilon", 1e-5))


def _flat_softmax(of: Callable[..., Tensor]) -> Operator:
    return lambda attrs, x: of(x, dim=attrs.get("axis", -1))


def _clip(attrs: Mapping[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _gelu(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attrs.get("approximate", "none"))


def _reshape(attrs: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    sizes = shape.tolist()
    if not attrs.get("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    axis = attrs.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(attrs: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(attrs, axes)
    return x.squeeze() if wanted is None else x.squeeze(tuple(wanted))


def _unsqueeze(attrs: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = _axes(attrs, axes) or []
    for axis in sorted(a % (x.ndim + len(wanted)) for a in wanted):
        x = x.unsqueeze(axis)
    return x


def _slice(
    attrs: Mapping[str, Any],
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    count = len(starts)
    along = list(range(count)) if axes is None else axes.tolist()
    by = [1] * count if steps is None else steps.tolist()
    for axis, start, end, step in zip(along, starts.tolist(), ends.tolist(), by, strict=True):
        index = torch.tensor(
            range(*slice(start, end, step).indices(x.shape[axis]))
            if step > 0
            else _back(start, end, step, x.shape[axis])
        )
        x = x.index_select(axis, index.to(x.device, torch.long))
    return x


def _back(start: int, end: int, step: int, size: int) -> list[int]:
    """Indices of a slice that goes backward; ONNX's ends are clamped, where Python's −1 would mean the last."""
    start = min(start + size if start < 0 else start, size - 1)
    end = max(end + size if end < 0 else end, -1)
    return list(range(start, end, step))


def _gather(attrs: Mapping[str, Any], x: Tensor, index: Tensor) -> Tensor:
    axis = attrs.get("axis", 0) % x.ndim
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1)
    return x.index_select(axis, flat).reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _split(attrs: Mapping[str, Any], x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = attrs.get("axis", 0)
    if sizes is not None:
        return x.split(sizes.tolist(), axis)
    count = attrs["num_outputs"]
    return x.split(-(-x.shape[axis] // count), axis)


def _depth_to_space(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    block = attrs["blocksize"]
    if attrs.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    return (
        x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)
    )


def _space_to_depth(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    block = attrs["blocksize"]
    if attrs.get("mode", "DCR") != "DCR":
        raise Unusual("another order of channels")
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // block, block, w // block, block)
    return split.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)


def _expand(attrs: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _shape(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.tensor(x.shape[attrs.get("start", 0) : attrs.get("end", x.ndim)], dtype=torch.long)


def _cast(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    kind = onnx_package().helper.tensor_dtype_to_np_dtype(attrs["to"])
    if kind.kind == "V" or kind.isbuiltin != 1:
        raise Unusual(f"numbers of type {kind}")
    return x.to(torch.from_numpy(np.zeros(1, kind)).dtype)


def _constant_of_shape(attrs: Mapping[str, Any], shape: Tensor) -> Tensor:
    value = attrs.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(np.array(value))
    return fill.reshape(()).expand(tuple(shape.tolist())).clone()


def _leaky(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return F.leaky_relu(x, attrs.get("alpha", 0.01))


def _hard_sigmoid(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return (attrs.get("alpha", 0.2) * x + attrs.get("beta", 0.5)).clamp(0, 1)


def _elu(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return F.elu(x, attrs.get("alpha", 1.0))


def _selu(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    return attrs.get("gamma", 1.0507009873554805) * F.elu(x, attrs.get("alpha", 1.6732632423543772))


def _dropout(
    attrs: Mapping[str, Any], x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if training is not None and bool(training):
        raise Unusual("training")
    return x, torch.ones_like(x, dtype=torch.bool)


def _across_channels(attrs: Mapping[str, Any], x: Tensor) -> Tensor:
    if attrs["size"] % 2 == 0:
        raise Unusual("windows that reach farther on one side")
    return F.local_response_norm(
        x, attrs["size"], attrs.get("alpha", 1e-4), attrs.get("beta", 0.75), attrs.get("bias", 1.0)
    )


def _prelu(attrs: Mapping[str, Any], x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _power(attrs: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _divide(attrs: Mapping[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.dtype.is_floating_point else torch.div(x, y, rounding_mode="trunc")


def _plain(of: Callable[..., Tensor]) -> Operator:
    return lambda attrs, *x: of(*x)


def _folded(of: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def all_of(attrs: Mapping[str, Any], x: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            x = of(x, other)
        return x

    return all_of


def _on_grid(attrs: Mapping[str, Any], x: Tensor, *grid: Tensor) -> Tensor:
    return on_uneven(attrs, x, grid[0]) if "grid" in attrs else rounded(attrs, x, *grid)


def _matmul(attrs: Mapping[str, Any], x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product, and what `tidy` has added to it."""
    given = torch.matmul(x, y)
    return given if bias is None else given + bias


def _mean_of(attrs: Mapping[str, Any], *x: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*x)).mean(0)


OPERATORS: Final[Mapping[str, Operator]] = {
    "Conv": conv, "ConvTranspose": conv_transpose, "MaxPool": max_pool, "AveragePool": average_pool, "Pad": pad, "Resize": resize,
    "LSTM": lstm, "GRU": gru, "Gemm": _gemm, "MatMul": _matmul,
    "GlobalAveragePool": lambda attrs, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda attrs, x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
    "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm, "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm, "LRN": _across_channels,
    "Relu": _plain(torch.relu), "LeakyRelu": _leaky, "PRelu": _prelu, "Elu": _elu, "Selu": _selu, "Clip": _clip,
    "Sigmoid": _plain(torch.sigmoid), "HardSigmoid": _hard_sigmoid, "HardSwish": _plain(F.hardswish), "Tanh": _plain(torch.tanh),
    "Softplus": _plain(F.softplus), "Mish": _plain(F.mish), "Gelu": _gelu, "Erf": _plain(torch.erf),
    "Swish": lambda attrs, x: x * torch.sigmoid(attrs.get("alpha", 1.0) * x),
    "Softmax": _flat_softmax(torch.softmax), "LogSoftmax": _flat_softmax(torch.log_softmax),
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _divide, "Pow": _power,
    "Sum": _folded(torch.add), "Max": _folded(torch.maximum), "Min": _folded(torch.minimum), "Mean": _mean_of,
    "Neg": _plain(torch.neg), "Abs": _plain(torch.abs), "Sqrt": _plain(torch.sqrt), "Exp": _plain(torch.exp), "Log": _plain(torch.log),
    "Reciprocal": _plain(torch.reciprocal), "Sin": _plain(torch.sin), "Cos": _plain(torch.cos), "Floor": _plain(torch.floor),
    "Ceil": _plain(torch.ceil), "Round": _plain(torch.round), "Sign": _plain(torch.sign), "Not": _plain(torch.logical_not),
    "And": _plain(torch.logical_and), "Or": _plain(torch.logical_or),
    "Equal": _plain(torch.eq), "Less": _plain(torch.lt), "Greater": _plain(torch.gt),
    "LessOrEqual": _plain(torch.le), "GreaterOrEqual": _plain(torch.ge), "Where": _plain(torch.where),
    "ReduceMean": _reduce(torch.mean), "ReduceSum": _reduce(torch.sum), "ReduceMax": _reduce(torch.amax), "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product), "ReduceL2": _reduce(lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt()),
    "ReduceSumSquare": _reduce(lambda x, dim, keepdim: x.square().sum(dim, keepdim)),
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Slice": _slice, "Gather": _gather,
    "Transpose": lambda attrs, x: x.permute(attrs.get("perm", list(range(x.ndim))[::-1])),
    "Concat": lambda attrs, *x: torch.cat(x, attrs["axis"]), "Split": _split, "Expand": _expand, "Shape": _shape, "Cast": _cast,
    "Tile": lambda attrs, x, repeats: x.repeat(repeats.tolist()),
    "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "ConstantOfShape": _constant_of_shape,
    "QuantizeLinear": quantize, "DequantizeLinear": dequantize, "DynamicQuantizeLinear": dynamic, QDQ: _on_grid,
    "QLinearConv": qlinear_conv, "QLinearMatMul": qlinear_matmul, "ConvInteger": conv_integer, "MatMulInteger": matmul_integer,
    "com.microsoft.QLinearAdd": qlinear_add, "com.microsoft.QLinearMul": qlinear_mul, "com.microsoft.QGemm": qgemm,
    "com.microsoft.QLinearAveragePool": qlinear_average, "com.microsoft.QLinearGlobalAveragePool": qlinear_global_average,
    "com.microsoft.QLinearConcat": qlinear_concat, "com.microsoft.DynamicQuantizeLSTM": dynamic_lstm,
    "Identity": lambda attrs, x: x, "Dropout": _dropout,
}  # fmt: skip
"""Operator → what it computes."""
