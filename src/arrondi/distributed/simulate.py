"""Scripts of all ranks of any topology in one process, in lockstep.

Owns: `simulate`. What it gives is bit for bit what the ranks would get, since the scripts are the same; sums of exchanges are taken in
the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from arrondi.distributed.links import Count
from arrondi.distributed.scripts import Exchange, Script
from arrondi.distributed.topology import Topology
from arrondi.errors import ShapeError


class Simulated(NamedTuple):
    """What every rank ends up with, and what it sent."""

    results: list[torch.Tensor]
    counts: list[Count]


def simulate(scripts: Sequence[Script], topology: Topology) -> Simulated:
    """Runs one script for each rank.

    Raises:
        ShapeError: another number of scripts than ranks, or scripts that do not ask for the same exchanges.
    """
    if len(scripts) != topology.world:
        raise ShapeError(f"{topology.world} ranks need as many scripts, got {len(scripts)}.")
    counts = [Count() for _ in scripts]
    answers: list[torch.Tensor] | None = None
    while True:
        asked: list[Exchange] = []
        results: list[torch.Tensor] = []
        for rank, script in enumerate(scripts):
            try:
                asked.append(next(script) if answers is None else script.send(answers[rank]))
            except StopIteration as end:
                results.append(end.value)
        if len(results) == len(scripts):
            return Simulated(results, counts)
        if results or len({(e.kind, e.hop, e.payload.shape, e.payload.dtype) for e in asked}) != 1:
            raise ShapeError("The ranks ask for different exchanges: they have other shapes or other schemes.")
        for count, exchange in zip(counts, asked, strict=True):
            count.add(exchange, topology)
        answers = [_answer(rank, asked, topology) for rank in range(topology.world)]


def _answer(rank: int, asked: Sequence[Exchange], topology: Topology) -> torch.Tensor:
    kind, hop, _ = asked[rank]
    peers = topology.peers(rank, hop)
    payloads = [asked[p].payload for p in peers]
    if kind == "all_to_all":
        return torch.stack([payload[peers.index(rank)] for payload in payloads])
    stacked = torch.stack(payloads)
    if kind == "all_gather":
        return stacked
    # In the type of the payload, as the library does it: a sum of int8 that overflows would wrap.
    return stacked.amax(dim=0) if kind == "max" else stacked.sum(dim=0, dtype=stacked.dtype)
