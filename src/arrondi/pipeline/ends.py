"""The first and the last layers of a network, which keep more bits where others have few: `ends_of`, `with_wider_ends`.

What enters the first layer is the data itself and what leaves the last one is the answer; both layers are small. Papers on few bits leave them at
eight (Nagel et al. 2020, arXiv:2004.10568, and those after it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from arrondi.formats import Scheme, get_format
from arrondi.graph import Graph
from arrondi.graph.layers import LAYERS
from arrondi.pipeline.recipe import Recipe

FEW: Final = 4
"""Bits of weights from which on down the ends are wider."""


def ends_of(graph: Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Layers that read the network's inputs through no other layer, and those whose outputs leave it through no other.

    What is made of inputs and constants alone is still input: a sum with what a layer made is not, nor a token that is spread over as many samples as
    the input has. Likewise a value is still output if all that reads it leaves, or it is one itself. A layer that is both is among the first alone.
    """
    names = {n.name for n in graph.nodes if n.op in LAYERS and len(n.inputs) > 1 and n.inputs[1] in graph.constants}
    early = {v.name for v in graph.inputs}
    first: list[str] = []
    for node in graph.nodes:
        flowing = [n for n in node.inputs if n and n not in graph.constants]
        if flowing and early.issuperset(flowing):
            if node.name in names:
                first.append(node.name)
            else:
                early |= set(node.outputs)
    leaves: set[str] = set()  # nodes from which everything leaves
    readers, results = graph.consumers, graph.results
    last: list[str] = []
    for node in reversed(graph.nodes):
        made = [n for n in node.outputs if n in results or n in readers]
        if made and all(n in results or leaves.issuperset(r.name for r in readers[n]) for n in made):
            if node.name in names:
                last.append(node.name)
            else:
                leaves.add(node.name)
    return tuple(first), tuple(n for n in reversed(last) if n not in first)


def read_by(graph: Graph, layers: Iterable[str]) -> list[str]:
    """What these layers multiply."""
    wanted = set(layers)
    return [node.inputs[0] for node in graph.nodes if node.name in wanted]


def has_few_bits(recipe: Recipe) -> bool:
    """Whether weights become integers of few bits."""
    schemes = [rule.scheme.weights for rule in recipe.rules if rule.scheme is not None]
    return any(s.format.kind == "integer" and s.format.bits <= FEW for s in schemes)


def of_bits(scheme: Scheme, bits: int | None) -> Scheme:
    """The scheme with integers of at least so many bits."""
    format = scheme.format
    if bits is None or format.kind != "integer" or format.bits >= bits:
        return scheme
    return replace(scheme, format=get_format(f"{'int' if format.qmin < 0 else 'uint'}{bits}"))


def with_wider_ends(recipe: Recipe, paths: Sequence[str], bits: int | None) -> Recipe:
    """The recipe with the modules `paths` at so many bits, by the methods that round them."""
    found = []
    for rule in recipe.rules:
        found.append(rule)
        scheme = rule.scheme
        if scheme is not None and paths and of_bits(scheme.weights, bits) != scheme.weights:
            found.append(
                replace(rule, scheme=replace(scheme, weights=of_bits(scheme.weights, bits)), targets=tuple(paths))
            )
    return replace(recipe, rules=tuple(found))
