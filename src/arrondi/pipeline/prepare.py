"""What is done to a network's graph before it is rounded and after: `rewritten` and `with_what_was_learned`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import SchemeError
from arrondi.graph import Graph, Program
from arrondi.graph.equalize import absorb, equalize
from arrondi.graph.expected import expected_means
from arrondi.measure.arrays import Arrays
from arrondi.pipeline.recipe import Recipe, Rule
from arrondi.pipeline.steps import STEPS
from arrondi.repair.bias import mean_shift

_BIASED: Final = ("Conv", "ConvTranspose", "Gemm")
"""Layers that can have a bias."""


def rewritten(graph: Graph, recipe: Recipe, calibration: Arrays | None, notes: list[str]) -> tuple[Graph, Recipe]:
    """The graph after what the recipe says of graphs, and the rest of the recipe.

    Args:
        notes: receives what people should know.
    """
    kinds = {rule.method for rule in recipe.rules}
    if "equalize" in kinds:
        graph, facts = equalize(with_biases(graph))
        notes.append(facts.said)
        if calibration is not None:
            graph, count = absorb(graph, facts, calibration.batches())
            notes.append(f"{count} channels gave a part of their bias to the layer behind them.")
    if any(STEPS[name].kind == "repair" for name in kinds):
        graph = with_biases(graph)
    if is_analytic(recipe) and "equalize" in kinds:
        raise SchemeError("The means that normalizations tell are those of channels before equalization. Leave equalize or bias-correction.analytic out.")  # fmt: skip
    gone = [rule for rule in recipe.rules if rule.method == "equalize" or _analytic(rule)]
    return graph, replace(recipe, rules=tuple(rule for rule in recipe.rules if rule not in gone))


def _analytic(rule: Rule) -> bool:
    return rule.method == "bias-correction" and bool(rule.options.get("analytic", False))


def is_analytic(recipe: Recipe) -> bool:
    """Whether biases are corrected by what normalizations tell."""
    return any(_analytic(rule) for rule in recipe.rules)


def correct_by_norms(program: Program, original: Graph, graph: Graph, before: Mapping[str, torch.Tensor]) -> list[str]:
    """Take out of every bias what rounding its weight shifts, on average over inputs as normalizations tell them.

    Args:
        program: with rounded weights; changed.
        original: with its normalizations.
        graph: what the program is made of, its values not yet rounded.
        before: layer → its weight as it was.

    Returns:
        the layers that were corrected.
    """
    means, read = expected_means(original), {node.name: node.inputs[0] for node in graph.nodes}
    done = []
    for layer, path in program.layers.items():
        module: Any = program.get_submodule(path)
        mean, old = means.get(read.get(layer, "")), before[layer]
        groups = getattr(module, "groups", 1)
        if mean is None or getattr(module, "bias", None) is None or len(mean) != old.shape[1] * groups:
            continue
        places, rows = old[0, 0].numel(), old.shape[0] // groups
        own = torch.from_numpy(mean).reshape(groups, -1).repeat_interleave(places, dim=1)
        weights = (w.detach().reshape(groups, rows, -1) for w in (old, module.weight))
        shift = torch.cat([mean_shift(*parts) for parts in zip(*weights, own, strict=True)])
        module.bias.data -= shift
        done.append(layer)
    return done


def with_biases(graph: Graph) -> Graph:
    """The graph in which every layer that can have a bias has one of its own, for what changes biases."""
    constants, nodes = dict(graph.constants), []
    for node in graph.nodes:
        weight = constants.get(node.inputs[1]) if node.op in _BIASED and len(node.inputs) > 1 else None
        if weight is not None and weight.dtype == np.float32 and (len(node.inputs) == 2 or not node.inputs[2]):
            by_column = node.op == "ConvTranspose" or (node.op == "Gemm" and not node.attrs.get("transB", 0))
            count = weight.shape[1] * node.attrs.get("group", 1) if by_column else weight.shape[0]
            name = next(graph.fresh(f"{node.name}_bias"))
            constants[name] = np.zeros(count, dtype=weight.dtype)
            node = replace(node, inputs=(*node.inputs[:2], name))
        nodes.append(node)
    return graph.with_nodes(nodes, constants)


def with_what_was_learned(graph: Graph, program: Program) -> Graph:
    """The graph with the biases, and the scales of what flows, that the program has now."""
    constants = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        path = program.layers.get(node.name)
        bias = None if path is None else getattr(program.get_submodule(path), "bias", None)
        if bias is not None and len(node.inputs) > 2:
            own = constants[node.inputs[2]]
            value = bias.detach().numpy().reshape(own.shape).astype(np.float32)
            if not np.array_equal(own, value):
                name = next(graph.fresh(f"{node.name}_bias"))
                constants[name] = value
                node = replace(node, inputs=(*node.inputs[:2], name, *node.inputs[3:]))
        if node.name in program.rounders:
            for name, part in zip(node.inputs[1:], ("scale", "zero_point"), strict=True):
                value, own = program.get_buffer(f"{program.rounders[node.name]}.{part}"), constants[name]
                constants[name] = value.numpy().reshape(own.shape).astype(own.dtype)
        nodes.append(node)
    return graph.with_nodes(nodes, constants)
