"""What a network says of sizes, said otherwise: padding that depends on the input's size as numbers (`fixed_edges`), and shapes that name the number
of samples without it (`free_batch`), so that layers are layers and any number of samples goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from arrondi.graph.ir import Graph, Node, Value
from arrondi.graph.windows import edges, transposed_edges

_SAME = ("SAME_UPPER", "SAME_LOWER")


def fixed_edges(graph: Graph) -> Graph:
    """Convolutions whose padding is "same" with that padding in numbers, where the size of what they read is known or does not matter."""
    nodes: list[Node] = []
    for node in graph.nodes:
        pads = _pads(node, graph) if node.attrs.get("auto_pad") in _SAME else None
        if pads is not None:
            kept = {k: v for k, v in node.attrs.items() if k != "auto_pad"}
            node = replace(node, attrs={**kept, "pads": pads})
        nodes.append(node)
    return graph.with_nodes(nodes)


def _pads(node: Node, graph: Graph) -> list[int] | None:
    weight = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op not in ("Conv", "ConvTranspose") or weight is None or "output_shape" in node.attrs:
        return None
    kernel, shape = weight.shape[2:], _shape(graph, node.inputs[0])
    whole = [n for n in shape[2:] if isinstance(n, int)]
    if len(whole) != len(kernel):
        if any(s != 1 for s in node.attrs.get("strides", ())):
            return None
        whole = [1] * len(kernel)  # any: what a window without strides needs depends on nothing else
    begin, end = (edges if node.op == "Conv" else transposed_edges)(node.attrs, whole, kernel)
    return [*begin, *end] if min(*begin, *end) >= 0 else None


def free_batch(graph: Graph) -> Graph:
    """Of a network with a fixed number of samples: shapes that begin with it take it from what is reshaped, which is the same."""
    count = batch_of(graph)
    if count is None:
        return graph
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        target = constants.get(node.inputs[1]) if node.op == "Reshape" and not node.attrs.get("allowzero", 0) else None
        shape = _shape(graph, node.inputs[0]) if target is not None else ()
        if target is not None and target.size > 1 and int(target[0]) == count and shape[:1] == (count,):
            name = next(graph.fresh(f"{node.outputs[0]}_shape"))
            constants[name] = np.array([0, *target[1:]], np.int64)
            node = replace(node, inputs=(node.inputs[0], name))
        nodes.append(node)
    return graph.with_nodes(nodes, constants)


def batch_of(graph: Graph) -> int | None:
    """How many samples a network always takes; None where they may be any number."""
    counts = {v.shape[axis] for v, axis in zip(graph.inputs, sample_axes(graph), strict=True) if axis is not None}
    (count,) = counts if len(counts) == 1 else (None,)
    return count if isinstance(count, int) else None


def sample_axes(graph: Graph, values: Sequence[Value] | None = None) -> tuple[int | None, ...]:
    """Along which axis of every input samples lie: the first, or, as in first states of recurrent layers, the one whose size is that of
    the first axis of another input; None for a number without axes, which is the same for all samples.

    Args:
        values: the graph's outputs, to ask for theirs instead.
    """
    first = [v.shape[0] for v in graph.inputs if v.shape]
    count = next((n for n in first if isinstance(n, str)), first[0] if first else None)
    return tuple(_axis(v.shape, count) for v in (graph.inputs if values is None else values))


def _axis(shape: tuple[int | str | None, ...], count: int | str | None) -> int | None:
    if not shape:
        return None
    places = [i for i, n in enumerate(shape) if n == count and n is not None]
    return places[0] if isinstance(shape[0], int) and len(places) == 1 else 0


def _shape(graph: Graph, name: str) -> tuple[int | str | None, ...]:
    found = graph.shapes.get(name)
    return found if found is not None else next((v.shape for v in graph.inputs if v.name == name), ())
