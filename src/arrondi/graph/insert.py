"""Grids put into a graph: `round_values` for what flows, `hold_codes` for weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import MissingExtraError, SchemeError
from arrondi.formats import Format, PerChannel, PerGroup, PerTensor, Scheme
from arrondi.graph.ir import QDQ, Graph, Node
from arrondi.graph.layers import RECURRENT, turned
from arrondi.graph.rules import RULES
from arrondi.graph.uneven import uneven
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.rows import stack_rows

_NARROW: Final = frozenset({"int2", "uint2", "int4", "uint4"})
"""Types that NumPy has through `ml_dtypes`."""


def code_type(format: Format) -> np.dtype[Any]:
    """The smallest type of ONNX that holds the codes of a format.

    Raises:
        SchemeError: there is none.
    """
    if format.kind == "integer":
        signed = format.qmin < 0
        bits = next((b for b in (2, 4, 8, 16) if format.bits <= b), None)
        name = f"{'' if signed else 'u'}int{bits}"
        if bits is not None:
            return np.dtype(getattr(_narrow_types(), name) if name in _NARROW else name)
    raise SchemeError(f"ONNX files hold integers of at most 16 bits here, got {format}. Use int8 or int4.")


def _narrow_types() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtraError("4-bit codes need the package ml_dtypes: pip install 'arrondi[onnx]'.") from error
    return ml_dtypes


def round_values(
    graph: Graph,
    grids: Mapping[str, tuple[Grid, Scheme]],
    groups: Mapping[str, int] | None = None,
    readers: Container[str] | None = None,
    apart: Mapping[str, str] | None = None,
) -> Graph:
    """The graph with values rounded where they are made.

    Args:
        grids: value → its grid (one scale) and the scheme of it.
        apart: operator → the uneven grid of what it makes, see `arrondi.graph.uneven`; of values that share none.
        groups: value → a number, the same for those that share a grid and its constants; None: none do.
        readers: nodes that read what is rounded; None: all operators of the table.
    """
    constants, renamed, made = dict(graph.constants), {}, {}
    first: dict[int, str] = {}
    makers, count = graph.producers, Counter(() if groups is None else groups.values())
    for name, (grid, scheme) in grids.items():
        kind = _of_values(scheme.format)
        given = f"{name}_rounded"
        stem = name if groups is None else first.setdefault(groups[name], name)
        zero = 0 if grid.zero_point is None else int(grid.zero_point)
        constants[f"{stem}_scale"] = np.array(grid.scale.item(), dtype=np.float32)
        constants[f"{stem}_zero_point"] = np.array(zero).astype(kind)
        read = (name, f"{stem}_scale", f"{stem}_zero_point")
        limits = _limits(scheme.format, kind)
        maker = makers[name].op if name in makers else ""
        if apart and maker in apart and (groups is None or count[groups[name]] == 1):
            high = float(grid.scale) * (scheme.format.qmax - zero)
            limits, constants[f"{stem}_scale"] = uneven(maker, apart[maker], scheme.format.bits, high)
            constants[f"{stem}_zero_point"] = np.zeros((), np.int8)
        made[name] = Node(f"{name}_grid", QDQ, read, (given,), limits)
        renamed[name] = given
    nodes = [made[v.name] for v in graph.inputs if v.name in made]
    for node in graph.nodes:
        reads = node.op in RULES if readers is None else node.name in readers
        nodes.append(replace(node, inputs=tuple(renamed.get(n, n) for n in node.inputs) if reads else node.inputs))
        nodes += [made[n] for n in node.outputs if n in made]
    return graph.with_nodes(nodes, constants)


def _of_values(format: Format) -> np.dtype[Any]:
    """What flows takes no room in the file: codes that do not fill a narrow type are bytes, as ONNX Runtime cuts off no others before it rounds."""
    kind = code_type(format)
    return (
        np.dtype("int8" if format.qmin < 0 else "uint8")
        if kind.name in _NARROW and "low" in _limits(format, kind)
        else kind
    )


def _limits(format: Format, kind: np.dtype[Any]) -> dict[str, Any]:
    """Codes of fewer bits than their type lie in a part of its range."""
    full = _narrow_types().iinfo(kind) if kind.name in _NARROW else np.iinfo(kind)
    own = (format.qmin, format.qmax)
    named = {"codes": kind.name}
    return named if own == (full.min, full.max) else {**named, "low": own[0], "high": own[1]}


def hold_codes(graph: Graph, weights: Mapping[str, QTensor]) -> Graph:
    """The graph with weights as codes, which a DequantizeLinear turns into numbers.

    Args:
        weights: node → its weight as a matrix (out, in · places of the kernel).

    Raises:
        SchemeError: ONNX cannot hold it.
    """
    constants = dict(graph.constants)
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = list(node.inputs)
        for place, held in _weights_of(node, weights, graph).items():
            made, parts, inputs[place] = _held_as(graph, node, inputs[place], held)
            constants |= parts
            nodes += made
        nodes.append(replace(node, inputs=tuple(inputs)))
    return graph.with_nodes(nodes, constants)


def _weights_of(node: Node, weights: Mapping[str, QTensor], graph: Graph) -> dict[int, QTensor]:
    """Which input of a node → its codes; the directions of a recurrent one below each other."""
    if node.name in weights:
        return {1: weights[node.name]}
    found = {}
    for part, place in RECURRENT.items() if node.op in ("LSTM", "GRU") else ():
        count = graph.constants[node.inputs[place]].shape[0] if node.inputs[place] in graph.constants else 0
        directions = [weights.get(f"{node.name}.{part}.{d}") for d in range(count)]
        kept = [q for q in directions if q is not None]
        if kept and len(kept) == count:
            found[place] = stack_rows(kept)
    return found


def _held_as(graph: Graph, node: Node, name: str, q: QTensor) -> tuple[list[Node], dict[str, np.ndarray], str]:
    """The nodes and constants that give a weight, and what it is called."""
    shape = graph.constants[name].shape
    groups = node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
    if groups > 1 and isinstance(q.scheme.granularity, PerChannel):
        return _held_in_groups(graph, node, name, q, groups)
    codes, scale, zero, attrs = _held(node, q, shape)
    given = next(graph.fresh(f"{name}_{node.name}_float" if len(graph.consumers[name]) > 1 else f"{name}_float"))
    stem = given.removesuffix("_float")
    parts = {"codes": codes, "scale": scale, **({} if q.zero_point is None else {"zero_point": zero})}
    constants = {f"{stem}_{part}": values for part, values in parts.items()}
    flat = codes.shape != shape
    read, made = tuple(constants), f"{stem}_matrix" if flat else given
    nodes = [Node(f"{stem}_dequantize", "DequantizeLinear", read, (made,), attrs)]
    if flat:
        constants[f"{stem}_shape"] = np.array(shape, np.int64)
        nodes.append(Node(f"{stem}_reshape", "Reshape", (made, f"{stem}_shape"), (given,)))
    return nodes, constants, given


def _held_in_groups(
    graph: Graph, node: Node, name: str, q: QTensor, groups: int
) -> tuple[list[Node], dict[str, np.ndarray], str]:
    """A transposed convolution in groups: its output channels lie along two axes of its weight, so codes lie (out, in of a group, …)
    in the file and are turned behind their scales."""
    inside, outside, *places = graph.constants[name].shape
    own = (groups * outside, inside // groups, *places)
    flipped = torch.flip(q.codes.reshape(own), tuple(range(2, len(own))))
    codes, scale, zero, attrs = _held(Node(node.name, "Conv", node.inputs, node.outputs), replace(q, codes=flipped.reshape(q.codes.shape)), own)  # fmt: skip
    given = next(graph.fresh(f"{name}_float"))
    stem = given.removesuffix("_float")
    parts = {"codes": codes, "scale": scale, **({} if q.zero_point is None else {"zero_point": zero})}
    constants = {f"{stem}_{part}": values for part, values in parts.items()}
    nodes = [Node(f"{stem}_dequantize", "DequantizeLinear", tuple(constants), (f"{stem}_rows",), attrs)]
    constants[f"{stem}_split"] = np.array((groups, outside, inside // groups, *places), np.int64)
    constants[f"{stem}_shape"] = np.array((inside, outside, *places), np.int64)
    order = [0, 2, 1, *range(3, 3 + len(places))]
    nodes += [
        Node(f"{stem}_in_groups", "Reshape", (f"{stem}_rows", f"{stem}_split"), (f"{stem}_parts",)),
        Node(f"{stem}_turn", "Transpose", (f"{stem}_parts",), (f"{stem}_turned",), {"perm": order}),
        Node(f"{stem}_reshape", "Reshape", (f"{stem}_turned", f"{stem}_shape"), (given,)),
    ]
    return nodes, constants, given


def hold_biases(graph: Graph, weights: Mapping[str, QTensor]) -> Graph:
    """The graph with biases of layers as int32 codes of scale S_x · S_w, as integer runtimes add them.

    Args:
        graph: with grids of what flows, stored ones.
        weights: layer → its weight; those whose scales are not one for an output, or all of them, keep a floating bias.
    """
    constants = dict(graph.constants)
    grids = {n.outputs[0]: n.inputs[1] for n in graph.nodes if n.op == QDQ and len(n.inputs) > 1}
    nodes: list[Node] = []
    for node in graph.nodes:
        q, bias = weights.get(node.name), node.inputs[2] if len(node.inputs) > 2 else ""
        step, own = constants.get(grids.get(node.inputs[0], "")) if node.inputs else None, constants.get(bias)
        plain = q is not None and isinstance(q.scale, torch.Tensor) and isinstance(q.scheme.granularity, PerTensor | PerChannel)  # fmt: skip
        if plain and q is not None and isinstance(q.scale, torch.Tensor) and step is not None and own is not None:
            scale = (step.reshape(()) * q.scale.float().reshape(-1).numpy()).astype(np.float32)
            limits = np.iinfo(np.int32)
            codes = np.round(own.reshape(-1).astype(np.float64) / scale).clip(limits.min, limits.max).astype(np.int32)
            stem = next(graph.fresh(f"{node.name}_bias"))
            read = (f"{stem}_codes", f"{stem}_scale")
            constants |= {read[0]: codes, read[1]: scale if len(scale) > 1 else scale.reshape(())}
            axis = {"axis": 0} if len(scale) > 1 else {}
            nodes.append(Node(f"{stem}_dequantize", "DequantizeLinear", read, (f"{stem}_float",), axis))
            node = replace(node, inputs=(*node.inputs[:2], f"{stem}_float", *node.inputs[3:]))
        nodes.append(node)
    return graph.with_nodes(nodes, constants)


def held_bits(q: QTensor) -> int:
    """Bits that a file needs for a weight: codes in ONNX's types, scales and zero points."""
    bits = next(b for b in (2, 4, 8, 16) if q.scheme.format.bits <= b)
    scales = q.scale.numel() if isinstance(q.scale, torch.Tensor) else 0
    zeros = 0 if q.zero_point is None else q.zero_point.numel()
    return bits * q.codes.numel() + 32 * scales + bits * zeros


def _held(node: Node, q: QTensor, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Codes in the shape of the weight, scales, zero points, and along which axis they go."""
    kind = code_type(q.scheme.format)
    if (
        not isinstance(q.scale, torch.Tensor)
        or q.offset is not None
        or q.group_index is not None
        or q.apart is not None
    ):
        raise SchemeError(
            f"{node.name}: ONNX holds plain scales and zero points, got {q.scheme}. Use int8/channel or int4/g32."
        )
    zeros = torch.zeros_like(q.scale, dtype=torch.int32) if q.zero_point is None else q.zero_point
    flipped = (node.op == "Gemm" and not node.attrs.get("transB", 0)) or node.op == "MatMul"
    matrix = q.codes.T if flipped else q.codes
    if node.op == "ConvTranspose":
        groups = node.attrs.get("group", 1)
        kernel = q.codes.reshape(groups * shape[1], shape[0] // groups, *shape[2:])
        matrix = turned(kernel, groups)
    if node.op in ("LSTM", "GRU"):  # directions below each other: a scale a row has one axis
        shape = (shape[0] * shape[1], shape[2])
    codes = matrix.reshape(shape).numpy().astype(kind)
    match q.scheme.granularity:
        case PerTensor():
            return codes, _array(q.scale.reshape(()), np.float32), _array(zeros.reshape(()), kind), {}
        case PerChannel(0) if node.op != "ConvTranspose" or node.attrs.get("group", 1) == 1:
            axis = 1 if flipped or node.op == "ConvTranspose" else 0
            return codes, _array(q.scale.reshape(-1), np.float32), _array(zeros.reshape(-1), kind), {"axis": axis}
        case PerGroup(size) if len(shape) == 2 and shape[0 if flipped else 1] % size == 0:
            scale, zeros = (part.T if flipped else part for part in (q.scale, zeros))
            return (
                codes,
                _array(scale, np.float32),
                _array(zeros, kind),
                {"axis": 0 if flipped else 1, "block_size": size},
            )
    raise SchemeError(f"{node.name}: ONNX cannot hold {q.scheme} of shape {shape}. Use int8/channel or int4/channel.")


def _array(part: torch.Tensor, kind: Any) -> np.ndarray:
    return np.ascontiguousarray(part.detach().cpu().numpy().astype(kind))
