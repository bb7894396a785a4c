"""Channels of consecutive layers made to reach equally far: `equalize`, and `absorb`, which moves high biases on. The function stays.

A chain is a layer, what leaves positive factors alone (ReLU and its like, pooling), and the layer that reads it and nobody else; depthwise layers
between are scaled on both sides at once, by the mean of all logarithms. A cap as of ReLU6 would depend on the factor, so it is taken away.

Source: Nagel et al. 2019, arXiv:1906.04721, sections 4.1 and 4.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from arrondi.graph.ir import Graph, Node
from arrondi.graph.program import Program

_HOMOGENEOUS: Final = frozenset(
    ("Relu", "LeakyRelu", "PRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
)
_FLATTENING: Final = frozenset(("Flatten", "Reshape", "Squeeze", "ReduceMean"))
"""Before a Gemm of as many inputs as there are channels; there they change the shape alone, or take a mean over space."""
_SWEEPS: Final = 40
_SETTLED: Final = 1e-3
_FARTHEST: Final = 1e4


@dataclass(frozen=True)
class Equalized:
    """What was done.

    Attributes:
        chains: names of the layers of each.
        between: (layer, layer that reads it) → the operators between.
        capped: activations that lost their cap.
        sweeps: over all chains.
    """

    chains: tuple[tuple[str, ...], ...]
    between: Mapping[tuple[str, str], tuple[str, ...]]
    capped: int
    sweeps: int

    @property
    def said(self) -> str:
        """One sentence for people."""
        lost = f", and {self.capped} activations lost their upper end" if self.capped else ""
        return f"Channels of {len(self.chains)} chains of layers were equalized in {self.sweeps} sweeps{lost}."


def equalize(graph: Graph) -> tuple[Graph, Equalized]:
    """Scale the channels of all chains until none changes any more.

    Args:
        graph: whose layers have biases of their own, where they have any.
    """
    links, caps = _links(graph)
    chains = _chains(graph, links)
    nodes = {n.name: n for n in graph.nodes}
    weights = {name: graph.constants[nodes[name].inputs[1]].astype(np.float64) for chain in chains for name in chain}
    biases = {
        name: graph.constants[n.inputs[2]].astype(np.float64) for name in weights if (n := nodes[name]).inputs[2:]
    }
    total = {name: np.ones(_outputs(nodes[name], weights[name])) for name in weights}
    sweeps = 0
    for _ in range(_SWEEPS if chains else 0):
        sweeps += 1
        if max(_sweep(chain, nodes, weights, biases, total) for chain in chains) < _SETTLED:
            break
    constants = dict(graph.constants)
    for name, weight in weights.items():
        constants[nodes[name].inputs[1]] = weight.astype(np.float32)
        if name in biases:
            constants[nodes[name].inputs[2]] = biases[name].astype(np.float32)
    used = {cap for (one, _), cap in caps.items() for chain in chains if one in chain[:-1]}
    made = [replace(n, op="Relu", inputs=n.inputs[:1], attrs={}) if n.name in used else n for n in graph.nodes]
    between = {pair: ops for pair, ops in links.items() if any(pair in itertools.pairwise(c) for c in chains)}
    return graph.with_nodes(made, constants), Equalized(tuple(map(tuple, chains)), between, len(used), sweeps)


@torch.no_grad()
def absorb(graph: Graph, done: Equalized, batches: Iterable[Sequence[torch.Tensor]]) -> tuple[Graph, int]:
    """Take out of a bias what practically always passes the ReLU behind it, and give it to the layer that reads it.

    Of a channel of mean μ and deviation σ that is μ - 3σ; there must be a bare ReLU between, and no zeros around what is read.

    Args:
        batches: inputs by which μ and σ are known.

    Returns:
        the graph, and how many channels gave something.
    """
    nodes = {n.name: n for n in graph.nodes}
    pairs = [p for p, ops in done.between.items() if ops == ("Relu",) and not any(nodes[p[1]].attrs.get("pads", [])) and all(len(nodes[n].inputs) > 2 for n in p)]  # fmt: skip
    nothing = torch.zeros((), dtype=torch.float64)
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {
        nodes[one].outputs[0]: (nothing, nothing, 0) for one, _ in pairs
    }

    def see(name: str, value: torch.Tensor) -> None:
        if name in sums:
            rows = value.double().movedim(1, -1).flatten(0, -2)
            first, second, count = sums[name]
            sums[name] = (first + rows.sum(0), second + rows.square().sum(0), count + len(rows))

    program, constants, moved = Program(graph), dict(graph.constants), 0
    for inputs in batches:
        program.watch(inputs, see)
    for one, other in pairs:
        first, second, count = sums[nodes[one].outputs[0]]
        mean = first / max(count, 1)
        high = (mean - 3 * (second / max(count, 1) - mean.square()).clamp(min=0).sqrt()).clamp(min=0).numpy()
        if not high.any():
            continue
        moved += int((high > 0).sum())
        weight = constants[nodes[other].inputs[1]].astype(np.float64)
        own, next_ = nodes[one].inputs[2], nodes[other].inputs[2]
        constants[own] = (constants[own] - high).astype(np.float32)
        constants[next_] = (constants[next_] + _through(nodes[other], weight, high)).astype(np.float32)
    return graph.with_nodes(graph.nodes, constants), moved


def _links(graph: Graph) -> tuple[dict[tuple[str, str], tuple[str, ...]], dict[tuple[str, str], str]]:
    """(layer, the one that alone reads it) → the operators between, and the node between that has a cap, if one has."""
    consumers, outputs = graph.consumers, {v.name for v in graph.outputs}
    layers = {n.name for n in graph.nodes if _is_layer(n, graph)}
    links: dict[tuple[str, str], tuple[str, ...]] = {}
    caps: dict[tuple[str, str], str] = {}
    for node in graph.nodes:
        if node.name not in layers:
            continue
        value, cap, flat = node.outputs[0], "", False
        between: list[str] = []
        while value not in outputs and len(consumers.get(value, [])) == 1:
            (reader,) = consumers[value]
            if reader.inputs.count(value) != 1 or reader.inputs[0] != value:
                break
            if reader.name in layers:
                channels = _outputs(node, graph.constants[node.inputs[1]])
                if _inputs(reader, graph.constants[reader.inputs[1]]) == channels and (reader.op == "Gemm" or not flat):
                    links[node.name, reader.name] = tuple(between)
                    if cap:
                        caps[node.name, reader.name] = cap
                break
            if reader.op == "Clip" and _floor(reader, graph) == 0:
                cap = reader.name
            elif reader.op in _FLATTENING:
                flat = True
            elif reader.op not in _HOMOGENEOUS:
                break
            between.append("Relu" if reader.op == "Clip" else reader.op)
            value = reader.outputs[0]
    return links, caps


def _floor(node: Node, graph: Graph) -> float | None:
    low = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
    return float(low) if low is not None and low.size == 1 else node.attrs.get("min")


def _is_layer(node: Node, graph: Graph) -> bool:
    """Whether its weights are its own, and known."""
    if node.op not in ("Conv", "Gemm") or len(node.inputs) < 2:
        return False
    if node.op == "Gemm" and (
        node.attrs.get("transA", 0) or {node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)} != {1.0}
    ):
        return False
    names = [n for n in node.inputs[1:] if n]
    return all(n in graph.constants and len(graph.consumers[n]) == 1 for n in names)


def _chains(graph: Graph, links: Mapping[tuple[str, str], tuple[str, ...]]) -> list[list[str]]:
    nodes, following = {n.name: n for n in graph.nodes}, dict(links.keys())
    read = set(following.values())
    found = []
    for first in following:
        if _depthwise(nodes[first], graph) and first in read:
            continue  # in the middle of a chain
        chain = [first]
        while chain[-1] in following and (len(chain) == 1 or _depthwise(nodes[chain[-1]], graph)):
            chain.append(following[chain[-1]])
        found.append(chain)
    return found


def _sweep(
    chain: Sequence[str], nodes: Mapping[str, Node], weights: dict[str, np.ndarray], biases: dict[str, np.ndarray], total: dict[str, np.ndarray]
) -> float:  # fmt: skip
    """Equalize one chain; how far its largest factor is from one."""
    first, *middle, last = chain
    reaches = [_reach_out(nodes[first], weights[first]), *(_reach_out(nodes[m], weights[m]) for m in middle)]
    reaches.append(_reach_in(nodes[last], weights[last]))
    if any(not r.size for r in reaches):
        return 0.0
    alive = np.all([r > 0 for r in reaches], axis=0)
    logs = np.array([np.log(np.where(alive, r, 1.0)) for r in reaches])
    mean, factor = logs.mean(0), np.ones(len(alive))
    farthest = 0.0
    for name, log in zip(chain[:-1], logs, strict=False):
        step = np.exp(log - mean)  # by which what this layer gives is divided, beyond what its input already is
        new = np.clip(total[name] * factor * step, 1 / _FARTHEST, _FARTHEST) / total[name]
        weights[name] = _scaled_out(nodes[name], weights[name], 1 / (new / factor))
        if name in biases:
            biases[name] = biases[name] / new
        total[name] *= new
        factor = new
        farthest = max(farthest, float(np.abs(new - 1).max()))
    weights[last] = _scaled_in(nodes[last], weights[last], factor)
    return farthest


def _depthwise(node: Node, graph: Graph) -> bool:
    weight = graph.constants[node.inputs[1]]
    return node.op == "Conv" and weight.shape[1] == 1 and node.attrs.get("group", 1) == weight.shape[0]


def _by_rows(node: Node) -> bool:
    return node.op == "Conv" or bool(node.attrs.get("transB", 0))


def _outputs(node: Node, weight: np.ndarray) -> int:
    return int(weight.shape[0] if _by_rows(node) else weight.shape[1])


def _inputs(node: Node, weight: np.ndarray) -> int:
    if node.op == "Conv":
        return int(weight.shape[1] * node.attrs.get("group", 1))
    return int(weight.shape[1] if _by_rows(node) else weight.shape[0])


def _reach_out(node: Node, weight: np.ndarray) -> np.ndarray:
    rows = weight if _by_rows(node) else weight.T
    return np.asarray(np.abs(rows.reshape(len(rows), -1)).max(1))


def _split(node: Node, weight: np.ndarray) -> np.ndarray:
    """(groups, outputs of a group, inputs of a group, places)."""
    rows = weight if _by_rows(node) else weight.T
    groups = node.attrs.get("group", 1)
    return rows.reshape(groups, len(rows) // groups, rows.shape[1], -1)


def _reach_in(node: Node, weight: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(_split(node, weight)).max((1, 3)).reshape(-1))


def _scaled_out(node: Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    if not _by_rows(node):
        return weight * factor
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _scaled_in(node: Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    split = _split(node, weight)
    scaled = split * factor.reshape(split.shape[0], 1, split.shape[2], 1)
    rows = scaled.reshape(weight.shape if _by_rows(node) else weight.T.shape)
    return rows if _by_rows(node) else rows.T


def _through(node: Node, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What a layer makes of an input that is the same everywhere, without its bias."""
    split = _split(node, weight).sum(3)
    return np.einsum("goi,gi->go", split, x.reshape(split.shape[0], split.shape[2])).reshape(-1)
