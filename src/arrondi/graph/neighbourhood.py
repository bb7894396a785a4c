"""A rounded graph in which some layers alone compute on codes: `rounded_around`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from arrondi.graph.ir import QDQ, Graph, Node
from arrondi.graph.layers import LAYERS


def rounded_around(graph: Graph, layers: Container[str]) -> Graph:
    """The graph without the grids that no one of these layers is beside.

    A layer computes on codes where both what it reads and what it makes are rounded; so a value stays rounded as long as one of them makes it or
    reads it, through sums, activations and whatever else is no layer.

    Args:
        graph: of `round_values`.
        layers: nodes that stay among codes; none of them gives the network in floating point.
    """
    near: dict[str, bool] = {}
    for nodes, ends in ((graph.nodes, "outputs"), (tuple(reversed(graph.nodes)), "inputs")):
        reached: dict[str, bool] = {}
        for node in nodes:
            came, goes = (node.inputs, node.outputs) if ends == "outputs" else (node.outputs, node.inputs)
            found = node.name in layers if _is_layer(node, graph) else any(reached.get(n, False) for n in came)
            if node.op == QDQ:
                near[node.name] = near.get(node.name, False) or found
            for name in goes:
                reached[name] = reached.get(name, False) or found
    return _without(graph, {n.name for n in graph.nodes if n.op == QDQ and len(n.inputs) > 1 and not near[n.name]})


def _is_layer(node: Node, graph: Graph) -> bool:
    return node.op in LAYERS and len(node.inputs) > 1 and node.inputs[1] in graph.constants


def _without(graph: Graph, gone: Container[str]) -> Graph:
    """The graph whose readers of these grids read what was rounded."""
    instead: Mapping[str, str] = {n.outputs[0]: n.inputs[0] for n in graph.nodes if n.name in gone}
    kept = (n for n in graph.nodes if n.name not in gone)
    return graph.with_nodes(replace(n, inputs=tuple(instead.get(i, i) for i in n.inputs)) for n in kept)
