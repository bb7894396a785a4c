"""Which ranks share a machine.

Owns: `Topology`, and `topology_of` a process group. Global rank r is rank r % per_node of node r // per_node, as torchrun numbers them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from arrondi.arguments import Between, check_fields
from arrondi.errors import SchemeError

Hop = Literal["all", "intra", "inter"]
"""All ranks; the ranks of one node; the ranks with the same place in every node."""


@dataclass(frozen=True)
class Topology:
    """`nodes` machines with `per_node` ranks each.

    >>> Topology(2, 4).peers(5, "intra"), Topology(2, 4).peers(5, "inter")
    ([4, 5, 6, 7], [1, 5])
    """

    nodes: Annotated[int, Between(1, 1 << 20)]
    per_node: Annotated[int, Between(1, 1 << 20)]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def two_hops(self) -> bool:
        """Whether there is something inside nodes and something between them."""
        return self.nodes > 1 and self.per_node > 1

    def peers(self, rank: int, hop: Hop) -> list[int]:
        """Global ranks that take part in an exchange of `rank`, in their order there."""
        node, local = divmod(rank, self.per_node)
        if hop == "intra":
            return [node * self.per_node + l for l in range(self.per_node)]
        if hop == "inter":
            return [n * self.per_node + local for n in range(self.nodes)]
        return list(range(self.world))

    def size(self, hop: Hop) -> int:
        return {"all": self.world, "intra": self.per_node, "inter": self.nodes}[hop]

    def beyond(self, hop: Hop) -> int:
        """How many of the other ranks of a hop are in another node."""
        return {"all": self.world - self.per_node, "intra": 0, "inter": self.nodes - 1}[hop]


def topology_of(world: int, per_node: int | None) -> Topology:
    """The topology of so many ranks.

    Args:
        per_node: ranks on one machine; None: what torchrun says (LOCAL_WORLD_SIZE), or one machine.

    Raises:
        SchemeError: `per_node` does not divide `world`.
    """
    said = per_node
    if said is None:
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        said = int(local) if local.isdecimal() and int(local) > 0 else world
        said = said if world % said == 0 else world
    if said < 1 or world % said:
        raise SchemeError(
            f"{world} ranks cannot stand {said} to a machine. Give a per_node that divides {world}, or leave it out."
        )
    return Topology(world // said, said)
