"""Rewrites that leave what a network computes the same, but say it as runtimes like to read it: `PASSES`, and `tidy`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from arrondi.graph.fold import fold, fold_norms, join_biases, with_bias
from arrondi.graph.ir import Graph, Node
from arrondi.graph.sizes import fixed_edges, free_batch


def tidy(graph: Graph, seen: list[tuple[str, int]] | None = None) -> Graph:
    """The graph after all passes.

    Args:
        seen: receives the name of every pass, and how many operators there are after it.
    """
    for name, run in PASSES.items():
        graph = run(graph)
        if seen is not None:
            seen.append((name, len(graph.nodes)))
    return graph


def _pool(graph: Graph) -> Graph:
    """ReduceMean over all axes of space → GlobalAveragePool, which runtimes compute in integers."""
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        ndim = _ndim(graph, node.inputs[0]) if node.op == "ReduceMean" else None
        axes = None if ndim is None else _axes(node, constants)
        if ndim is None or ndim < 3 or axes is None or sorted(a % ndim for a in axes) != list(range(2, ndim)):
            nodes.append(node)
            continue
        if node.attrs.get("keepdims", 1):
            nodes.append(Node(node.name, "GlobalAveragePool", node.inputs[:1], node.outputs))
            continue
        between = next(graph.fresh(f"{node.outputs[0]}_pooled"))
        nodes.append(Node(node.name, "GlobalAveragePool", node.inputs[:1], (between,)))
        nodes.append(Node(f"{node.name}_flat", "Flatten", (between,), node.outputs, {"axis": 1}))
    return graph.with_nodes(nodes, constants)


def _axes(node: Node, constants: Mapping[str, np.ndarray]) -> list[int] | None:
    if "axes" in node.attrs:
        return list(node.attrs["axes"])
    name = node.inputs[1] if len(node.inputs) > 1 else ""
    return [int(a) for a in constants[name].reshape(-1)] if name in constants else None


def _ndim(graph: Graph, name: str) -> int | None:
    """How many axes a value has, where that is known."""
    shape = graph.shapes.get(name, next((v.shape for v in graph.inputs if v.name == name), None))
    return None if shape is None else len(shape)


def _merge_slices(graph: Graph) -> Graph:
    """A slice of a slice, along other axes, that nobody else reads → one slice."""
    constants = dict(graph.constants)
    merged: dict[str, Node] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        before = merged.get(node.inputs[0]) if node.op == "Slice" else None
        own, theirs = (_slice_parts(n, constants) if n is not None else None for n in (node, before))
        alone = before is not None and graph.only_reader(before.outputs[0]) is not None
        if before is None or own is None or theirs is None or not alone or {*own[2]} & {*theirs[2]}:
            nodes.append(node)
        else:
            names = []
            for part, (first, second) in zip(
                ("starts", "ends", "axes", "steps"), zip(theirs, own, strict=True), strict=True
            ):
                name = f"{node.outputs[0]}_{part}"
                constants[name] = np.array([*first, *second], np.int64)
                names.append(name)
            nodes.remove(before)
            nodes.append(replace(node, inputs=(before.inputs[0], *names)))
        if node.op == "Slice":
            merged[node.outputs[0]] = nodes[-1]
    return graph.with_nodes(nodes, constants)


def _slice_parts(node: Node, constants: Mapping[str, np.ndarray]) -> tuple[list[int], ...] | None:
    """Starts, ends, axes (none negative) and steps, where they are known."""
    names = [*node.inputs[1:]]
    if len(names) < 3 or any(n not in constants for n in names if n):
        return None
    parts = [[int(v) for v in constants[n].reshape(-1)] for n in names if n]
    if len(parts) == 3:
        parts.append([1] * len(parts[0]))
    return tuple(parts) if len(parts) == 4 and min(parts[2]) >= 0 else None


PASSES: Final[Mapping[str, Callable[[Graph], Graph]]] = {
    "constants computed": fold,
    "padding in numbers": fixed_edges,
    "any number of samples": free_batch,
    "normalizations folded into layers": fold_norms,
    "products of matrices with their bias": with_bias,
    "means over space": _pool,
    "slices of slices": _merge_slices,
    "other products with their bias": join_biases,
}
"""Name → pass, in the order in which they run."""
