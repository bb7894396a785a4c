"""Scripts on process groups, and the bytes that they send.

Owns: `Links` (the groups of a topology), `run`, `Count`. Process groups are made by all ranks in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from arrondi.distributed.scripts import Exchange, Script
from arrondi.distributed.topology import Hop, Topology, topology_of
from arrondi.errors import SchemeError

gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Their names since torch 2.13, and before."""


@dataclass
class Count:
    """Bytes that one rank sent, by where they went.

    Messages between two ranks are counted one by one. Of a sum or a maximum, which the library does in its own way, it is what
    must be sent at least: reduced inside the nodes, then between them.
    """

    intra: float = 0.0
    inter: float = 0.0

    def add(self, exchange: Exchange, topology: Topology) -> None:
        size = exchange.payload.numel() * exchange.payload.element_size()
        hop = exchange.hop
        peers, beyond = topology.size(hop) - 1, topology.beyond(hop)
        if exchange.kind in ("max", "sum"):
            self.intra += 2 * size * (topology.per_node - 1) / topology.per_node
            self.inter += 2 * size / topology.per_node * (topology.nodes - 1) / topology.nodes
            return
        each = size / topology.size(hop) if exchange.kind == "all_to_all" else size
        self.intra += each * (peers - beyond)
        self.inter += each * beyond

    def least(self, kind: Literal["all_gather", "reduce_scatter"], whole: int, topology: Topology) -> None:
        """Counts a collective of the library over `whole` bytes of all ranks: what any algorithm must send."""
        if kind == "all_gather":
            own = whole / topology.world
            self.intra += own * (topology.per_node - 1) * topology.nodes
            self.inter += own * (topology.nodes - 1)
        else:
            self.intra += whole * (topology.per_node - 1) / topology.per_node
            self.inter += whole / topology.per_node * (topology.nodes - 1) / topology.nodes


@dataclass
class Links:
    """The process groups of a topology, seen from one rank."""

    topology: Topology
    rank: int
    groups: dict[Hop, dist.ProcessGroup]
    count: Count = field(default_factory=Count)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, per_node: int | None = None) -> Links:
        """Makes the groups of the two hops; all ranks of `group` call it together.

        Args:
            group: of the ranks; None: all of them.
            per_node: ranks on one machine; None: what torchrun says, or one machine.

        Raises:
            SchemeError: there is no process group, or `per_node` does not divide its size.
        """
        group = default_group() if group is None else group
        topology = topology_of(dist.get_world_size(group), per_node)
        rank = dist.get_rank(group)
        groups: dict[Hop, dist.ProcessGroup] = {"all": group}
        if topology.two_hops:
            members = dist.get_process_group_ranks(group)
            hops: tuple[Hop, Hop] = ("intra", "inter")
            for hop in hops:
                for first in range(topology.world):
                    peers = topology.peers(first, hop)
                    if peers[0] == first:  # once for each group
                        made = dist.new_group([members[p] for p in peers], use_local_synchronization=True)
                        if rank in peers:
                            groups[hop] = made
        return cls(topology, rank, groups)

    def run(self, script: Script) -> torch.Tensor:
        """Carries a script out; blocks until it is done."""
        try:
            exchange = next(script)
            while True:
                exchange = script.send(self._exchange(exchange))
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result

    def _exchange(self, exchange: Exchange) -> torch.Tensor:
        kind, hop, payload = exchange
        group = self.groups[hop]
        self.count.add(exchange, self.topology)
        payload = payload.contiguous()
        if kind == "all_to_all":
            result = torch.empty_like(payload)
            dist.all_to_all_single(result, payload, group=group)
            return result
        if kind == "all_gather":
            result = payload.new_empty((dist.get_world_size(group), *payload.shape))
            gather_single(result.view(-1), payload.view(-1), group=group)
            return result
        result = payload.clone()
        dist.all_reduce(result, dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM, group=group)
        return result


def default_group() -> dist.ProcessGroup:
    """The group of all ranks.

    Raises:
        SchemeError: there is none yet.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise SchemeError("There is no process group. Call torch.distributed.init_process_group first, on every rank.")
    group = dist.group.WORLD
    assert group is not None
    return group
