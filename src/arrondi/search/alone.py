"""A layer of a network as a network of its own, to be timed: `layer_alone`; what calls cost beside it: `nothing_of`; and which layers take as long: `alike`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from arrondi.graph import Graph, Node, Value
from arrondi.graph.codes import INTEGERS
from arrondi.graph.ir import CODES, QDQ
from arrondi.graph.rules import RULES


def layer_alone(graph: Graph, layer: str, values: Mapping[str, torch.Tensor]) -> Graph:
    """The layer and the activations behind it: from codes to codes where what it reads and makes is rounded.

    Args:
        graph: whose layer it is, its weight as it is stored.
        values: what flows through the graph for the inputs that are meant; names of rounded values may be missing.
    """
    makers = graph.producers
    node = next(n for n in graph.nodes if n.name == layer)
    nodes, front = [node], makers.get(node.inputs[0])
    while (after := graph.only_reader(nodes[-1].outputs[0])) is not None and RULES.get(after.op) == "activation":
        nodes.append(after)
    leaving, entering = nodes[-1].outputs[0], node.inputs[0]
    shape = tuple(values[leaving].shape)
    back = graph.consumers.get(leaving, [])
    inside = [*_weights(node, makers, graph), *nodes]
    constants = dict(graph.constants)
    x = Value(entering, np.dtype(np.float32), ())
    if front is not None and front.op == QDQ and "grid" not in front.attrs:
        x = Value(f"{entering}_codes", np.dtype(front.attrs[CODES]), ())
        inside.insert(0, Node(front.name, "DequantizeLinear", (x.name, *front.inputs[1:]), front.outputs))
    x = replace(x, shape=tuple(values[entering if front is None or front.op != QDQ else front.inputs[0]].shape))
    output = Value(leaving, np.dtype(np.float32), shape)
    if len(back) == 1 and back[0].op == QDQ and "grid" not in back[0].attrs:
        output = Value(f"{leaving}_codes", np.dtype(back[0].attrs[CODES]), shape)
        inside += _to_codes(back[0], output.name, constants)
    made = {n for one in inside for n in one.outputs}
    others = dict.fromkeys(n for one in inside for n in one.inputs if n and n not in made and n not in constants)
    beside = [
        Value(n, values[_before(n, makers)].numpy().dtype, tuple(values[_before(n, makers)].shape))
        for n in others
        if n != x.name
    ]
    whole = replace(graph, name=layer, inputs=(x, *beside), outputs=(output,), shapes={})
    return whole.with_nodes(inside, constants)


def _before(name: str, makers: Mapping[str, Node]) -> str:
    """What a rounded value was."""
    maker = makers.get(name)
    return maker.inputs[0] if maker is not None and maker.op == QDQ else name


def _to_codes(node: Node, codes: str, constants: dict[str, np.ndarray]) -> list[Node]:
    """What a file has of a QDQ up to its codes."""
    x, scale, zero = node.inputs
    made: list[Node] = []
    if "low" in node.attrs:
        ends = [f"{codes}_low", f"{codes}_high"]
        for name, code in zip(ends, (node.attrs["low"], node.attrs["high"]), strict=True):
            constants[name] = np.asarray((code - int(constants[zero])) * constants[scale], np.float32)
        made.append(Node(f"{node.name}_clip", "Clip", (x, *ends), (f"{codes}_clipped",)))
        x = f"{codes}_clipped"
    return [*made, Node(node.name, "QuantizeLinear", (x, scale, zero), (codes,), {CODES: node.attrs[CODES]})]


def _weights(node: Node, makers: Mapping[str, Node], graph: Graph) -> list[Node]:
    """The nodes that make a layer's weights from constants."""
    known = set(graph.constants)
    found: list[Node] = []
    wanted = [makers[n] for n in node.inputs[1:] if n in makers]
    while wanted:
        made = wanted.pop()
        found.insert(0, made)
        wanted += [makers[n] for n in made.inputs if n in makers]
    for made in found:
        known |= set(made.outputs) if known.issuperset(n for n in made.inputs if n) else set()
    return [made for made in found if known.issuperset(made.outputs)]


def nothing_of(graph: Graph) -> Graph:
    """A network that gives its input back: what a call costs beside the layer."""
    x = graph.inputs[0]
    node = Node("nothing", "Identity", (x.name,), ("given",))
    return replace(graph, inputs=(x,), outputs=(Value("given", x.dtype, x.shape),)).with_nodes([node])


def numbers_for(graph: Graph) -> list[torch.Tensor]:
    """Inputs of the shapes and types that it takes: noise."""
    generator, found = torch.Generator().manual_seed(0), []
    for value in graph.inputs:
        shape = tuple(n for n in value.shape if isinstance(n, int))
        if value.dtype.kind == "f":
            found.append(torch.randn(shape, generator=generator))
        else:
            low, high, kind = INTEGERS[value.dtype.name]
            codes = torch.randint(low, high + 1, shape, generator=generator)
            found.append(
                torch.from_numpy(codes.numpy().astype(value.dtype)) if value.dtype.name == "uint16" else codes.to(kind)
            )
    return found


def alike(graph: Graph) -> Any:
    """The same for graphs that compute as much in the same way: operators, what they are told, and shapes, not numbers."""
    numbered: dict[str, int] = {}
    parts: list[Any] = [(v.dtype.name, v.shape) for v in (*graph.inputs, *graph.outputs)]
    for node in graph.nodes:
        places = tuple(numbered.setdefault(n, len(numbered)) for n in (*node.inputs, *node.outputs))
        parts.append((node.op, places, repr(sorted(node.attrs.items(), key=lambda item: item[0]))))
        parts += [
            (graph.constants[n].dtype.name, graph.constants[n].shape) for n in node.inputs if n in graph.constants
        ]
    return tuple(parts)
