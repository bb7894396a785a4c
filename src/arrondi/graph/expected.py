"""Means of what flows through a network, channel by channel, as its normalizations tell them without data: `expected_means`.

Behind BatchNormalization a channel has the mean β and the deviation |γ|; taken as normal, what an activation makes of it has a mean in closed form.
Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix C.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch

from arrondi.graph.ir import Graph, Node

Array = np.ndarray
_SAME: Final = frozenset(("Identity", "GlobalAveragePool", "Flatten", "Reshape", "Squeeze", "Dropout"))
"""Operators after which a channel has the mean that it had; those that change shapes count where a layer has as many inputs."""


def clipped_mean(mu: Array, sigma: Array, low: float = -math.inf, high: float = math.inf) -> Array:
    """E[clip(x, low, high)] of normal x.

    Args:
        mu, sigma: mean and deviation, any one shape, float64.
    """
    mean, spread = torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)).clamp(min=1e-12)
    ends = [(torch.full_like(mean, end) - mean) / spread for end in (low, high)]
    below, under = (torch.special.ndtr(end) for end in ends)
    first, last = (torch.exp(-0.5 * end.square()) / math.sqrt(2 * math.pi) for end in ends)
    found = mean * (under - below) + spread * (first - last)
    found = found if low == -math.inf else found + low * below
    found = found if high == math.inf else found + high * (1 - under)
    made: Array = found.numpy()
    return made


def expected_means(graph: Graph) -> dict[str, Array]:
    """The mean of every channel of values whose normalizations are known.

    Args:
        graph: with its normalizations, before they are folded.

    Returns:
        value → (channels,), float64.
    """
    normal: dict[str, tuple[Array, Array]] = {}
    means: dict[str, Array] = {}
    for node in graph.nodes:
        known = [means.get(n) for n in node.inputs]
        found = None
        if node.op == "BatchNormalization" and all(n in graph.constants for n in node.inputs[1:3]):
            gamma, beta = (graph.constants[n].astype(np.float64) for n in node.inputs[1:3])
            normal[node.outputs[0]], found = (beta, np.abs(gamma)), beta
        elif node.op in ("Relu", "Clip", "LeakyRelu") and node.inputs[0] in normal:
            found = _activated(node, graph, *normal[node.inputs[0]])
        elif node.op in _SAME or (node.op == "AveragePool" and not any(node.attrs.get("pads", [0]))):
            found = known[0]
        elif node.op == "Add" and len(known) == 2 and known[0] is not None and known[1] is not None:
            found = known[0] + known[1] if known[0].shape == known[1].shape else None
        elif node.op == "Concat" and node.attrs.get("axis") == 1:
            parts = [m for m in known if m is not None]
            found = np.concatenate(parts) if len(parts) == len(known) else None
        if found is not None:
            means[node.outputs[0]] = found
    return means


def _activated(node: Node, graph: Graph, mu: Array, sigma: Array) -> Array | None:
    if node.op == "LeakyRelu":
        slope, above = node.attrs.get("alpha", 0.01), clipped_mean(mu, sigma, 0.0)
        return above + slope * (mu - above)
    ends = [0.0, math.inf] if node.op == "Relu" else [-math.inf, math.inf]
    for i, name in enumerate(node.inputs[1:3]):
        if name and name not in graph.constants:
            return None
        if name:
            ends[i] = float(graph.constants[name])
    return clipped_mean(mu, sigma, *ends)
