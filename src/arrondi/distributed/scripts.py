"""The algorithms of compressed communication, each written once for one rank.

Owns: `reduce_scatter`, `all_gather`, `all_reduce` and `shared_scale`. A script is a generator that yields an `Exchange` whenever it
needs other ranks, gets its result back, and returns what the rank ends up with. So the same lines run on process groups (`links`)
and for 64 ranks in one process (`simulate`). Nothing is ever summed in few bits: what arrives is decoded first, but for
`shared_scale`, whose sums of codes cannot overflow. All sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Final, Literal, NamedTuple

import torch

from arrondi.distributed.parcel import Parcel
from arrondi.distributed.topology import Hop, Topology

SCALE_ROW: Final = 1024
"""Numbers that share a scale in `shared_scale`, LightSeq's hidden size."""
QUANTILE: Final = 0.99
"""Of the magnitudes of a row, what its scale spans in `shared_scale`."""


class Exchange(NamedTuple):
    """What a rank asks for, and gets:

    "all_to_all": (G, ...) → (G, ...): row i goes to the i-th rank of the hop, row i comes from it.
    "all_gather": (...) → (G, ...).
    "max", "sum": (...) → (...), in the type of the payload.
    """

    kind: Literal["all_to_all", "all_gather", "max", "sum"]
    hop: Hop
    payload: torch.Tensor


Script = Generator[Exchange, torch.Tensor, torch.Tensor]
Encode = Callable[[str, torch.Tensor, Parcel], torch.Tensor]
"""(site, numbers (..., width), parcel) → messages (..., nbytes). Sites: "worker" is the first that a gradient passes, "node" the
second of two hops, "server" the sum that its owner sends to all."""


def reduce_scatter(
    rows: torch.Tensor, topology: Topology, parcel: Parcel, encode: Encode, *, flat: bool = False
) -> Script:
    """The mean over all ranks of a rank's own row: messages to all, decoded, then summed.

    Args:
        rows: (N, width), what this rank has for each of the N ranks.
        flat: one all-to-all among all ranks, even where nodes would make two hops cheaper.

    Returns:
        (width,) float32. The error against a flat exchange grows by √2 with two hops, whatever N is.

    Source: Wang et al. 2023, arXiv:2306.10209, section 3.3 (qgZ): messages are reordered so that the first hop brings to local rank l
    the rows of all ranks with local rank l.
    """
    if topology.world == 1:
        return rows[0].float()
    if flat or not topology.two_hops:
        messages = yield Exchange("all_to_all", "all", encode("worker", rows, parcel))
        return parcel.decode(messages).sum(dim=0) / topology.world
    messages = encode("worker", rows, parcel).view(topology.nodes, topology.per_node, parcel.nbytes).transpose(0, 1)
    messages = yield Exchange("all_to_all", "intra", messages.contiguous())
    inside = parcel.decode(messages).sum(dim=0)
    messages = yield Exchange("all_to_all", "inter", encode("node", inside, parcel))
    return parcel.decode(messages).sum(dim=0) / topology.world


def all_gather(row: torch.Tensor, topology: Topology, parcel: Parcel, encode: Encode) -> Script:
    """The rows of all ranks, bit for bit the same everywhere: the owner takes the decoded one, too.

    Between nodes first and inside them then, so that every byte enters a node once.

    Args:
        row: (width,).

    Returns:
        (N, width) float32.

    Source: Wang et al. 2023, arXiv:2306.10209, section 3.1 (qwZ).
    """
    message = encode("server", row, parcel)
    if not topology.two_hops:
        messages = yield Exchange("all_gather", "all", message)
        return parcel.decode(messages)
    across = yield Exchange("all_gather", "inter", message)
    inside = yield Exchange("all_gather", "intra", across)
    return parcel.decode(inside.transpose(0, 1).reshape(topology.world, -1))


def all_reduce(rows: torch.Tensor, topology: Topology, parcel: Parcel, encode: Encode, *, flat: bool = False) -> Script:
    """The mean over all ranks of all rows, the same everywhere: `reduce_scatter`, then `all_gather`."""
    own = yield from reduce_scatter(rows, topology, parcel, encode, flat=flat)
    if topology.world == 1:
        return own[None]
    return (yield from all_gather(own, topology, parcel, encode))


Shared = Callable[[torch.Tensor], None]
"""Told what this rank's numbers became, times the world size (for error feedback)."""


def shared_scale(flat: torch.Tensor, topology: Topology, told: Shared | None = None) -> Script:
    """LightSeq's all-reduce: codes on scales that all ranks share are summed as int8, which cannot overflow.

    A rank has the codes -t … t with t = ⌊127 / N⌋ only, and clips what lies beyond the 0.99 quantile of its row; a row with fewer
    numbers than that takes its largest, and so do all rows with error feedback: what is clipped in every step would pile up there
    for ever. A row with NaN or infinity on any rank comes back as NaN.

    Args:
        flat: (n,).

    Returns:
        (n,) float32, the mean, the same on all ranks.

    Source: Wang et al. 2021, LightSeq (NAACL industry track); its gradient communication quantization.
    """
    levels = 127 // topology.world
    rows = torch.nn.functional.pad(flat.float(), (0, -len(flat) % SCALE_ROW)).view(-1, SCALE_ROW)
    wanted = yield Exchange("max", "all", _spans(rows, len(flat), largest=told is not None))
    scale = (wanted / 127)[:, None]
    usable = scale.isfinite() & (scale > 0)
    units = torch.where(usable, rows / torch.where(usable, scale, 1.0) / topology.world, 0.0)
    codes = units.clamp_(-levels, levels).round_().to(torch.int8)
    if told is not None:
        told((codes * torch.where(usable, scale * topology.world, 0.0)).view(-1)[: len(flat)])
    total = yield Exchange("sum", "all", codes)
    mean = total * torch.where(scale.isfinite(), scale, torch.nan)
    return mean.view(-1)[: len(flat)]


def _spans(rows: torch.Tensor, count: int, *, largest: bool) -> torch.Tensor:
    """What the codes of each row span on this rank; infinite where something is not finite, which a maximum carries along."""
    sizes = rows.abs()
    if largest:
        return torch.where(rows.isfinite().all(dim=1), sizes.amax(dim=1), torch.inf)
    top = sizes.topk(_rank_of(SCALE_ROW), dim=1).values
    spans = torch.where(top[:, -1] > 0, top[:, -1], top[:, 0])
    if last := count % SCALE_ROW:  # the row that was filled up has fewer numbers to take a quantile of
        spans[-1] = top[-1, min(_rank_of(last), last) - 1]
        spans[-1] = torch.where(spans[-1] > 0, spans[-1], top[-1, 0])
    return torch.where(rows.isfinite().all(dim=1), spans, torch.inf)


def _rank_of(count: int) -> int:
    """How many magnitudes reach the quantile."""
    return max(math.ceil(round(count * (1 - QUANTILE), 9)), 1)


def effective_bits(world: int) -> float:
    """Bits that a rank's number has in `shared_scale`.

    >>> [round(effective_bits(w), 2) for w in (2, 4, 8, 16, 32, 64)]
    [6.99, 5.98, 4.95, 3.91, 2.81, 1.58]
    """
    return math.log2(2 * (127 // world) + 1)
