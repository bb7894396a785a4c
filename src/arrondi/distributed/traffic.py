"""How many bytes a training step moves, inside the machines and between them: arithmetic alone.

Owns: `traffic` and `parse_count`. For M numbers of b bytes on Y nodes with X ranks each, gathering them or reducing and scattering
them takes at least M·b·(X-1)/X bytes from every rank to its own node and M·b·(Y-1)/Y into every node; that is what is counted for
plain collectives and for those of two hops alike. An all-to-all among all ranks sends X times as much between the nodes.
Loads no library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Literal

from arrondi.arguments import Between, check_arguments
from arrondi.distributed.topology import Topology
from arrondi.errors import SchemeError

_SUFFIXES: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_MOST: Final = 10**18
_SHARED_ROW: Final = 1024
"""Numbers under a shared scale of int8."""
_SIGN_BLOCK: Final = 4096

Way = Literal["least", "one hop", "inside"]
"""Two hops, or the library's own collective; an all-to-all among all ranks; a gather inside the nodes alone."""


@dataclass(frozen=True)
class Hop:
    """One collective of a step.

    Attributes:
        bits: of a number on its way, with its share of the scales.
        code_bits: without that share.
    """

    collective: str
    bits: float
    code_bits: float
    way: Way = "least"

    def bytes(self, parameters: int, topology: Topology, bits: float) -> tuple[float, float]:
        """(inside the node, to other nodes) that one rank sends."""
        whole, per_node, nodes = parameters * bits / 8, topology.per_node, topology.nodes
        if self.way == "one hop":
            each = whole / topology.world
            return each * (per_node - 1), each * (topology.world - per_node)
        inside = whole * (per_node - 1) / per_node
        return inside, 0.0 if self.way == "inside" else whole / per_node * (nodes - 1) / nodes


@dataclass(frozen=True)
class Plan:
    """The collectives of a step under one scheme."""

    family: Literal["fsdp", "ddp"]
    name: str
    what: str
    hops: tuple[Hop, ...]


def parse_count(text: str) -> int:
    """A number as people write it.

    Raises:
        SchemeError: it is none, or below 1.

    >>> parse_count("7B"), parse_count("1.5b"), parse_count("350M"), parse_count("1000")
    (7000000000, 1500000000, 350000000, 1000)
    """
    found = re.fullmatch(
        r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([KMBGT]?)", text.strip().replace("_", ""), re.IGNORECASE | re.ASCII
    )
    count = round(float(found[1]) * _SUFFIXES[found[2].upper()]) if found else 0
    if not 1 <= count <= _MOST:
        raise SchemeError(
            f"--parameters takes a number from 1 to 1e18, with K, M, B or T behind it (7B, 350M), got {text!r}."
        )
    return count


def traffic(
    parameters: Annotated[int, Between(1, _MOST)],
    topology: Topology,
    *,
    element_bytes: Annotated[int, Between(1, 8)] = 2,
    weight_bits: Annotated[int, Between(1, 64)] = 8,
    gradient_bits: Annotated[int, Between(1, 64)] = 4,
    block: Annotated[int, Between(1, 1 << 20)] = 256,
) -> dict[str, Any]:
    """Bytes that a step moves, by scheme and collective.

    Args:
        parameters: numbers of the model; each rank has all their gradients once a step.
        element_bytes: of a number that is not compressed: 2 for fp16 and bf16.
        weight_bits, gradient_bits, block: of compressed messages; the scales of weights have 4 bytes, those of gradients 2.

    Returns:
        A document for programs. `ratio` is the plain scheme's bytes between nodes over this one's; `ratio_of_codes` leaves the scales out.

    Source: Wang et al. 2023, arXiv:2306.10209, table 1: 3 M for ZeRO-3, 0.75 M for ZeRO++.
    """
    check_arguments(traffic, locals())
    plans = _plans(8.0 * element_bytes, weight_bits, gradient_bits, block, topology)
    rows = [_row(plan, parameters, topology) for plan in plans]
    for row in rows:
        plain = next(r for r in rows if r["family"] == row["family"])
        for key, bytes_ in (("ratio", "inter_bytes_per_node"), ("ratio_of_codes", "inter_code_bytes_per_node")):
            row[key] = plain[bytes_] / row[bytes_] if row[bytes_] else None
    return {
        "parameters": parameters,
        "nodes": topology.nodes,
        "per_node": topology.per_node,
        "ranks": topology.world,
        "element_bytes": element_bytes,
        "weight_bits": weight_bits,
        "gradient_bits": gradient_bits,
        "block": block,
        "hpz_bytes_per_rank": parameters * element_bytes / topology.per_node if topology.two_hops else None,
        "schemes": rows,
    }  # fmt: skip


def _plans(plain: float, weight_bits: int, gradient_bits: int, block: int, topology: Topology) -> Iterable[Plan]:
    weights, gradients = weight_bits + 32 / block, gradient_bits + 16 / block
    forward, backward, reduced = ("all-gather, forward", "all-gather, backward", "reduce-scatter")
    of = {
        "forward": Hop(forward, plain, plain), "backward": Hop(backward, plain, plain), "reduced": Hop(reduced, plain, plain),
        "qforward": Hop(forward, weights, weight_bits), "qbackward": Hop(backward, weights, weight_bits),
        "inside": Hop(backward, plain, plain, "inside"), "qreduced": Hop(reduced, gradients, gradient_bits),
    }  # fmt: skip

    def sharded(name: str, what: str, *hops: str) -> Plan:
        return Plan("fsdp", name, what, tuple(of[h] for h in hops))

    yield sharded("zero3", "ZeRO-3, FSDP2: nothing compressed", "forward", "backward", "reduced")
    yield sharded("qwz", f"weights in {weight_bits} bits", "qforward", "qbackward", "reduced")
    if topology.two_hops:
        yield sharded("hpz", "a second copy of the weights inside each node", "forward", "inside", "reduced")
    yield sharded("qgz", f"gradients in {gradient_bits} bits", "forward", "backward", "qreduced")
    if topology.two_hops:
        yield sharded("all", "ZeRO++: qwz, hpz and qgz", "qforward", "inside", "qreduced")

    def replicated(name: str, what: str, scatter: Hop, gather: Hop, *more: Hop) -> Plan:
        return Plan("ddp", name, what, (scatter, gather, *more))

    def both(bits: float, code: float, way: Way = "least") -> tuple[Hop, Hop]:
        return Hop("reduce", bits, code, way), Hop("gather", bits, code)

    yield replicated("ddp", "DDP: nothing compressed", *both(plain, plain))
    yield replicated("int8", "LightSeq: shared scales", *both(8, 8), Hop("scales", 64 / _SHARED_ROW, 0))
    for bits in (8, 4):
        yield replicated(f"block{bits}", f"{bits} bits, one hop", *both(bits + 16 / block, bits, "one hop"))
    yield replicated("qgz", f"{gradient_bits} bits, two hops", *both(gradients, gradient_bits))
    yield replicated("onebit", "signs, one hop", *both(1 + 16 / _SIGN_BLOCK, 1, "one hop"))


def _row(plan: Plan, parameters: int, topology: Topology) -> dict[str, Any]:
    hops, inside, outside, codes = [], 0.0, 0.0, 0.0
    for hop in plan.hops:
        intra, inter = hop.bytes(parameters, topology, hop.bits)
        codes += hop.bytes(parameters, topology, hop.code_bits)[1] * topology.per_node
        hops.append({**asdict(hop), **_places(intra, inter, topology)})
        inside, outside = inside + intra, outside + inter
    return {
        "family": plan.family,
        "name": plan.name,
        "what": plan.what,
        "hops": hops,
        **_places(inside, outside, topology),
        "inter_code_bytes_per_node": codes,
    }


def _places(intra: float, inter: float, topology: Topology) -> dict[str, float]:
    return {
        "intra_bytes_per_rank": intra,
        "inter_bytes_per_rank": inter,
        "intra_bytes_per_node": intra * topology.per_node,
        "inter_bytes_per_node": inter * topology.per_node,
    }
