"""Weights and gradients of `fully_shard` in few bits.

Owns: `compress_fsdp` and the two collectives that it puts in the place of FSDP2's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from arrondi.arguments import Between, check_arguments, said
from arrondi.distributed.agreement import check_agreement
from arrondi.distributed.feedback import Feedback, Memory, Sender, generator_for
from arrondi.distributed.links import Count, Links, default_group, gather_single, scatter_single
from arrondi.distributed.parcel import Layout, Parcel, Piece, whole
from arrondi.distributed.scripts import all_gather, reduce_scatter
from arrondi.distributed.topology import topology_of
from arrondi.errors import SchemeError
from arrondi.tensor.blocks import Bits, BlockCodec, Rounding

Width = Literal["int8", "int4", "int2", "none"]

_BITS: Final[dict[str, Bits]] = {"int8": 8, "int4": 4, "int2": 2}
_SMALL: Final = 2048
"""Numbers below which a parameter travels as it is, like all vectors."""
_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ShardedState:
    """What `compress_fsdp` put in.

    Attributes:
        count: bytes that this rank has sent since, by where they went.
        memory: errors of the gradients; "none" keeps none.
    """

    weights: Width
    gradients: Width
    memory: Memory
    links: list[Links] = field(default_factory=list)

    @property
    def count(self) -> Count:
        return Count(sum(link.count.intra for link in self.links), sum(link.count.inter for link in self.links))


class _Alloc:
    """Buffers as FSDP2 makes them itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class QuantizedAllGather(_Alloc):
    """qwZ: the shards travel in few bits; every rank, the owner too, computes with the decoded weights.

    A group that is smaller than the shards' own is the secondary copy inside a node (hpZ, `reshard_after_forward=ranks per node`):
    it holds decoded weights already, and its gather stays as it is.
    """

    def __init__(self, links: Links, codec: BlockCodec, pieces: Sequence[Piece]) -> None:
        self.links, self.codec = links, codec
        self.layout = Layout.of(pieces, codec.block)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        topology, world = self.links.topology, dist.get_world_size(group)
        layout = _fitting(self.layout, len(input_tensor), self.codec.block)
        if world != topology.world or input_tensor.dtype not in _TYPES or not layout.coded:
            inside = topology if world == topology.world else topology_of(world, min(world, topology.per_node))
            self.links.count.least("all_gather", output_tensor.nbytes, inside)
            work: dist.Work | None = gather_single(output_tensor, input_tensor, group, async_op)
            return work
        parcel = Parcel(self.codec, layout.coded, layout.plain, input_tensor.dtype)
        script = all_gather(layout.sort(input_tensor), topology, parcel, Sender(Memory(), ""))
        rows = self.links.run(script)
        output_tensor.view(world, -1).copy_(layout.unsort(rows))
        return None


class QuantizedReduceScatter(_Alloc):
    """qgZ: gradients travel in few bits and two hops, decoded before every sum."""

    def __init__(
        self, links: Links, codec: BlockCodec, pieces: Sequence[Piece], memory: Memory, key: str, seed: int
    ) -> None:
        self.links, self.codec, self.memory, self.key, self.seed = links, codec, memory, key, seed
        self.layout = Layout.of(pieces, codec.block)
        self.step = 0

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.AVG,
        async_op: bool = False,
    ) -> dist.Work | None:
        topology = self.links.topology
        layout = _fitting(self.layout, len(output_tensor), self.codec.block)
        if input_tensor.dtype not in _TYPES or not layout.coded:
            self.links.count.least("reduce_scatter", input_tensor.nbytes, topology)
            work: dist.Work | None = scatter_single(output_tensor, input_tensor, op, group, async_op)
            return work
        if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
            raise SchemeError(
                "Compressed gradients are averaged or summed, and FSDP asks for a scaled sum. Tell the model to force sums (set_force_sum_reduction_for_comms)."
            )
        what = (self.seed, self.step, self.key, self.links.rank)
        generator = generator_for(input_tensor.device, *what) if self.codec.rounding == "stochastic" else None
        parcel = Parcel(self.codec, layout.coded, layout.plain)
        rows = layout.sort(input_tensor.view(topology.world, -1).float())
        # Of a buffer with other parameters than foreseen nobody knows whose errors they are: they are not kept.
        memory = self.memory if layout is self.layout else Memory()
        sender = Sender(memory, self.key, generator)
        mean = self.links.run(reduce_scatter(rows, topology, parcel, sender))
        output_tensor.copy_(layout.unsort(mean if op == dist.ReduceOp.AVG else mean * topology.world))
        self.memory.tick(self.step)
        self.step += 1
        return None


def compress_fsdp(
    model: torch.nn.Module,
    *,
    weights: Width = "int8",
    gradients: Width = "int4",
    block: Annotated[int, Between(1, 1 << 20)] = 256,
    per_node: Annotated[int, Between(1, 1 << 20)] | None = None,
    error_feedback: Feedback = "none",
    rounding: Rounding | None = None,
    small: Annotated[int, Between(0, 1 << 40)] = _SMALL,
    seed: int = 0,
    beta: Annotated[float, Between(0, 1)] = 0.8,
    reset: Annotated[int, Between(1, 1 << 40)] = 1024,
) -> ShardedState:
    """ZeRO++ for a model of `fully_shard`: weights are gathered and gradients reduced in few bits. Every rank calls it once.

    The shards, and so the optimizer, stay in full precision; only what travels is rounded, and all ranks compute with the same
    decoded weights. Vectors (biases, norms), parameters with fewer than `small` numbers and shards of less than a block travel as they
    are, in the same messages. The third part of ZeRO++, a copy of the weights inside each node (hpZ), is FSDP's own:
    `fully_shard(module, reshard_after_forward=ranks per node)`; gathers of that copy stay as they are, and so does the all-reduce of
    hybrid sharding.

    Args:
        weights, gradients: bits of a number on its way; "none" leaves them as they are, counted all the same.
        block: numbers under one scale: float32 for weights, bfloat16 for gradients.
        per_node: ranks on one machine; default: what torchrun says, else one machine for all.
        error_feedback: of gradients: "none", "ef" (float32, as large as the whole gradient) or "loco" (8 bits).
        rounding: of gradients; default: stochastic below 8 bits without error feedback, else nearest. Weights go to nearest.
        small: numbers of a parameter below which it is not coded.
        seed: of stochastic rounding; every rank, step and module has noise of its own.
        beta, reset: of "loco".

    Returns:
        The state, with the bytes counted at the collectives.

    Raises:
        SchemeError: no process group, no module of `fully_shard`, compressed already, or a per_node that does not divide the ranks.
        DataError: ranks whose parameters differ in names, shapes or types.

    Source: Wang et al. 2023, arXiv:2306.10209 (ZeRO++).
    """
    default_group()
    check_arguments(compress_fsdp, locals())
    if not hasattr(FSDPModule, "set_custom_reduce_scatter"):
        raise SchemeError(
            f"torch {torch.__version__} does not let fully_shard's collectives be replaced. Install a newer one."
        )
    modules: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, FSDPModule)]
    parts = [(name, module, group) for name, module in modules for group in _groups(module)]
    if not parts:
        raise SchemeError(
            f"compress_fsdp takes a model of torch's fully_shard, got {said(model)}. Call fully_shard first."
        )
    if any(
        isinstance(group._all_gather_comm, _Alloc) or isinstance(group._reduce_scatter_comm, _Alloc)
        for *_, group in parts
    ):
        raise SchemeError("The collectives of this model are compressed already. Call compress_fsdp once.")
    noisy = gradients in ("int4", "int2") and error_feedback == "none"
    how: Rounding = rounding or ("stochastic" if noisy else "nearest")
    state = ShardedState(weights, gradients, Memory(error_feedback, beta, reset))
    links: dict[int, Links] = {}
    for name, module, group in parts:
        if len(_groups(module)) > 1:
            raise SchemeError(
                f"{name or 'The model'} shards its parameters over several meshes, which torch's custom collectives do not take."
            )
        process_group = group.mesh_info.shard_process_group
        if id(process_group) not in links:
            links[id(process_group)] = Links.of(process_group, per_node)
            check_agreement(model.named_parameters(), process_group, values=False)
        link = links[id(process_group)]
        # What is not compressed is only counted: without pieces nothing is coded.
        codec = BlockCodec(_BITS.get(weights, 8), block, propagate=True)
        pieces = _pieces(group.fsdp_params if weights != "none" else (), small, block)
        module.set_custom_all_gather(QuantizedAllGather(link, codec, pieces))
        codec = BlockCodec(_BITS.get(gradients, 8), block, rounding=how, side="bfloat16", propagate=True)
        trained = (p for p in group.fsdp_params if p.sharded_param.requires_grad)
        pieces = _pieces(trained if gradients != "none" else (), small, block)
        module.set_custom_reduce_scatter(QuantizedReduceScatter(link, codec, pieces, state.memory, name, seed))
    state.links = list(links.values())
    return state


def _groups(module: Any) -> list[Any]:
    """The parameter groups of a module of `fully_shard`; a release of torch before 2.13 has one at most."""
    state = module._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    if many is None:
        many = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(many)


def _pieces(parameters: Iterable[Any], small: int, block: int) -> list[Piece]:
    """The shards of one rank as they follow each other in FSDP's buffers; the same for all ranks, since shards are padded."""
    pieces = []
    for p in parameters:
        shard = p.padded_sharded_param_size.numel()
        pieces.append(Piece(shard, len(p._orig_size) > 1 and p._orig_size.numel() >= small and shard >= block))
    return pieces


def _fitting(layout: Layout, count: int, block: int) -> Layout:
    """The layout of a buffer; of one with other parameters than foreseen (some got no gradient) nothing is known."""
    return layout if layout.count == count or not layout.pieces else whole(count, block)
