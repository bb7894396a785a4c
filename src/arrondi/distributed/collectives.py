"""Compressed collectives as plain functions of a tensor and a group.

Owns: `mean_all_reduce`, `mean_reduce_scatter`, `gather_shards` and `shared_scale_all_reduce`. All ranks call them together, as those of
`torch.distributed`; they block until they are done. A `Links` in place of the group keeps the groups of two hops from call to call.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from arrondi.arguments import said
from arrondi.distributed.links import Links
from arrondi.distributed.parcel import Parcel, whole
from arrondi.distributed.schemes import GRADIENT_SCHEMES, check_world
from arrondi.distributed.scripts import Encode, all_gather, all_reduce, reduce_scatter, shared_scale
from arrondi.errors import DataError, ShapeError
from arrondi.tensor.blocks import BlockCodec

Group = dist.ProcessGroup | Links | None


def mean_all_reduce(
    tensor: torch.Tensor,
    group: Group,
    codec: BlockCodec,
    generator: torch.Generator | None = None,
    *,
    flat: bool = False,
) -> torch.Tensor:
    """The mean over all ranks, bit for bit the same on each.

    Args:
        tensor: any shape, the same on all ranks, a float type.
        codec: of the messages.
        generator: of stochastic rounding, seeded differently on every rank.
        flat: one hop among all ranks, even where there are nodes.

    Returns:
        The tensor's shape and type.

    Source: Wang et al. 2023, arXiv:2306.10209 (two hops); with one hop it is the block-quantized all-reduce of two messages.
    """
    links = _links(tensor, group)
    layout = whole(tensor.numel(), codec.block)
    parcel = Parcel(codec, *layout.shares(links.topology.world))
    rows = layout.share(tensor.detach().reshape(-1).float(), links.topology.world)
    script = all_reduce(rows, links.topology, parcel, _encoding(generator), flat=flat)
    return layout.join(links.run(script)).view(tensor.shape).to(tensor.dtype)


def mean_reduce_scatter(
    tensor: torch.Tensor,
    group: Group,
    codec: BlockCodec,
    generator: torch.Generator | None = None,
    *,
    flat: bool = False,
) -> torch.Tensor:
    """The mean over all ranks of this rank's chunk.

    Args:
        tensor: (N · n,), chunk r for rank r.

    Returns:
        (n,) in the tensor's type.

    Source: Wang et al. 2023, arXiv:2306.10209, section 3.3 (qgZ).
    """
    links = _links(tensor, group)
    world = links.topology.world
    if tensor.ndim != 1 or len(tensor) % world:
        raise ShapeError(
            f"A reduce-scatter takes one axis that {world} ranks divide, got {tuple(tensor.shape)}. Pad it first."
        )
    parcel = Parcel(codec, len(tensor) // world)
    script = reduce_scatter(tensor.detach().view(world, -1), links.topology, parcel, _encoding(generator), flat=flat)
    return links.run(script).to(tensor.dtype)


def gather_shards(tensor: torch.Tensor, group: Group, codec: BlockCodec) -> torch.Tensor:
    """The shards of all ranks, decoded, bit for bit the same on each; the owner's, too.

    Args:
        tensor: any shape, the same on all ranks.

    Returns:
        (N, …) in the tensor's type.

    Source: Wang et al. 2023, arXiv:2306.10209, section 3.1 (qwZ).
    """
    links = _links(tensor, group)
    parcel = Parcel(codec, tensor.numel())
    script = all_gather(tensor.detach().reshape(-1), links.topology, parcel, _encoding())
    return links.run(script).view(-1, *tensor.shape).to(tensor.dtype)


def shared_scale_all_reduce(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """LightSeq's int8 all-reduce: the mean over all ranks, the same on each.

    Raises:
        SchemeError: more than 127 ranks.

    Source: Wang et al. 2021, LightSeq (NAACL industry track).
    """
    links = _links(tensor, group)
    check_world(GRADIENT_SCHEMES["int8"], links.topology)
    return links.run(shared_scale(tensor.detach().reshape(-1), links.topology)).view(tensor.shape).to(tensor.dtype)


def _encoding(generator: torch.Generator | None = None) -> Encode:
    """What every hop does with what it sends."""
    return lambda _, x, parcel: parcel.encode(x, generator)


def _links(tensor: torch.Tensor, group: Group) -> Links:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise DataError(f"Compressed collectives take a floating-point tensor, got {said(tensor)}.")
    return group if isinstance(group, Links) else Links.of(group)
