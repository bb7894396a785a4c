"""Gradients of DistributedDataParallel in few bits.

Owns: `compress_gradients` and `GradientState`, the state of its hook.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from arrondi.arguments import Between, check_arguments, said
from arrondi.distributed.agreement import check_agreement
from arrondi.distributed.feedback import Feedback, Memory, Sender, generator_for
from arrondi.distributed.links import Links, default_group
from arrondi.distributed.parcel import Layout, Parcel, pieces_of
from arrondi.distributed.schemes import GRADIENT_SCHEMES, GradientScheme, check_world
from arrondi.distributed.scripts import SCALE_ROW, Exchange, Script, all_reduce, shared_scale
from arrondi.errors import DataError, SchemeError, unknown
from arrondi.tensor.blocks import Bits, BlockCodec, Rounding

_SMALL: Final = 2048
"""Numbers below which a parameter travels as it is, like all vectors."""


@dataclass
class GradientState:
    """What a hook keeps: its settings, the step, the errors of every parameter, and (not pickled) the process groups.

    After unpickling, give it to `compress_gradients` in place of the scheme's name; training goes on where it was. With another number
    of ranks, errors of parameters go along, and those of places in messages start from zero.

    Attributes:
        step: iterations seen.
        links: groups and counted bytes; None before registration and after unpickling.
    """

    scheme: GradientScheme
    codec: BlockCodec
    memory: Memory
    start_iter: int
    small: int
    seed: int
    per_node: int | None
    step: int = 0
    links: Links | None = None
    names: dict[int, str] = field(default_factory=dict)
    _layouts: dict[tuple[str, ...], Layout] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "links": None, "names": {}, "_layouts": {}}

    def attach(self, model: DistributedDataParallel) -> None:
        """Makes the groups and learns the names of the parameters; all ranks together."""
        group = model.process_group
        self.links = Links.of(group, self.per_node)
        check_world(self.scheme, self.links.topology)
        named = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        check_agreement(model.module.named_parameters(), group, values=True)
        if strange := next((name for name, p in named if not self.memory.fits(name, p.numel())), None):
            raise DataError(
                f"This state holds errors of another model: {strange} has another size there. Give the scheme's name to begin anew."
            )
        self.names = {id(p): name for name, p in named}

    def reduce(self, bucket: dist.GradBucket) -> torch.Tensor:
        """The mean gradient of a bucket, in its type."""
        assert self.links is not None
        flat = bucket.buffer()
        if self.step < self.start_iter or self.links.topology.world == 1:
            return self.links.run(_plain_mean(flat, self.links.topology.world))
        parameters = bucket.parameters()
        names = tuple(self.names[id(p)] for p in parameters)
        layout = self._layouts.get(names)
        if layout is None:
            block = SCALE_ROW if self.scheme.kind == "shared" else self.codec.block
            counts = [p.numel() for p in parameters]
            layout = Layout.of(pieces_of([p.shape for p in parameters], counts, self.small), block)
            self._layouts[names] = layout
        sizes = [(name, p.numel()) for name, p in zip(names, parameters, strict=True)]
        what = (self.seed, self.step, names[0], self.links.rank)
        generator = generator_for(flat.device, *what) if self.codec.rounding == "stochastic" else None
        sender = Sender(self.memory, f"{names[0]} … {names[-1]}", generator, layout, sizes)
        script = self._shared if self.scheme.kind == "shared" else self._blocks
        return self.links.run(script(flat.float(), layout, sender)).to(flat.dtype)

    def _blocks(self, flat: torch.Tensor, layout: Layout, sender: Sender) -> Script:
        assert self.links is not None
        topology = self.links.topology
        parcel = Parcel(self.codec, *layout.shares(topology.world))
        rows = layout.share(flat, topology.world)
        mean = yield from all_reduce(rows, topology, parcel, sender, flat=self.scheme.hops == "one")
        return layout.join(mean)

    def _shared(self, flat: torch.Tensor, layout: Layout, sender: Sender) -> Script:
        assert self.links is not None
        topology, fed = self.links.topology, self.memory.kind != "none"
        before = sender.errors(flat) if fed else None
        coded, plain = layout.sort(flat if before is None else flat + before).split((layout.coded, layout.plain))
        sent: list[torch.Tensor] = []
        parts = [coded, plain]
        if len(coded):
            parts[0] = yield from shared_scale(coded, topology, sent.append if fed else None)
        if len(plain):
            parts[1] = yield from _plain_mean(plain, topology.world)
        if before is not None:
            lost = torch.cat([coded - s for s in sent] + [torch.zeros_like(plain)])
            sender.keep(before, layout.unsort(lost))
        return layout.unsort(torch.cat(parts))


def compress_gradients(
    model: DistributedDataParallel,
    scheme: str | GradientState = "qgz",
    *,
    bits: Bits | None = None,
    block: Annotated[int, Between(1, 1 << 20)] | None = None,
    rounding: Rounding | None = None,
    error_feedback: Feedback | None = None,
    per_node: Annotated[int, Between(1, 1 << 20)] | None = None,
    start_iter: Annotated[int, Between(2, 1 << 40)] = 2,
    small: Annotated[int, Between(0, 1 << 40)] = _SMALL,
    seed: int = 0,
    beta: Annotated[float, Between(0, 1)] = 0.8,
    reset: Annotated[int, Between(1, 1 << 40)] = 1024,
    rank: Annotated[int, Between(1, 1 << 16)] = 1,
) -> Any:
    """Lets the gradients of a DistributedDataParallel model travel in few bits. Every rank calls it once, before the first forward.

    Biases, norms and parameters with fewer than `small` numbers travel in float32, in the same messages. NaN and infinity
    reach all ranks as NaN, at least in their block, for the GradScaler to see. The work is done at once, in the hook: it does not overlap
    with the backward pass.

    Args:
        scheme: a name of `GRADIENT_SCHEMES` ("int8", "block8", "block4", "qgz", "onebit", "powersgd"), or a state that was pickled.
        bits, block, rounding: of the messages, instead of the scheme's own; below 8 bits rounding is stochastic unless errors are fed back.
        error_feedback: "none", "ef" (float32, as large as the gradients) or "loco" (8 bits).
        per_node: ranks on one machine; default: what torchrun says, else one machine for all.
        start_iter: iterations that stay uncompressed; at least 2, since DDP forms its buckets anew after the first.
        seed: of stochastic rounding; every rank, step and bucket has noise of its own.
        beta, reset: of "loco": the moving average, and the steps after which errors are forgotten.
        rank: of powersgd's factors.

    Returns:
        The state of the hook: its `step`, its counted bytes (`links.count`). It can be pickled; for powersgd it is PyTorch's.

    Raises:
        SchemeError: no process group, no such scheme, a hook is registered already, or the world does not fit.
        DataError: ranks whose parameters differ, or a state of another model.
    """
    if isinstance(scheme, str) and scheme not in GRADIENT_SCHEMES:
        raise unknown("gradient scheme", scheme, GRADIENT_SCHEMES)
    default_group()
    if not isinstance(model, DistributedDataParallel):
        raise SchemeError(
            f"compress_gradients takes a torch DistributedDataParallel model, got {said(model)}. Wrap the model first; for fully_shard use compress_fsdp."
        )
    check_arguments(compress_gradients, locals())
    if model._comm_hooks:
        raise SchemeError(
            "This model has a communication hook already, and DDP takes one. Wrap the model in DistributedDataParallel anew for another."
        )
    if isinstance(scheme, GradientState):
        if (bits, block, rounding, error_feedback, per_node) != (None,) * 5:
            raise SchemeError("A state has settings of its own. Leave bits, block, rounding, error_feedback and per_node out, or give the scheme's name.")  # fmt: skip
        state = scheme
    else:
        found = GRADIENT_SCHEMES[scheme]
        given = (bits, block, rounding, error_feedback)
        if found.kind == "torch":
            return _power(model, given, start_iter, rank, seed)
        if found.kind == "shared" and given[:3] != (None, None, None):
            raise SchemeError(f"{found.name} has its own codes. Leave bits, block and rounding out, or use block8.")
        feedback = found.feedback if error_feedback is None else error_feedback
        if (bits or found.bits) == 1 and feedback == "none":
            raise SchemeError("One bit does not converge without error feedback. Set error_feedback to ef or loco.")
        codec = found.codec(bits, block, rounding, feedback)
        state = GradientState(found, codec, Memory(feedback, beta, reset), start_iter, small, seed, per_node)
    state.attach(model)
    model.register_comm_hook(state, _hook)
    return state


def _hook(state: GradientState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    mean = state.reduce(bucket)
    if bucket.is_last():
        if state.step >= state.start_iter:
            state.memory.tick(state.step)
        state.step += 1
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(mean)
    return done


def _plain_mean(flat: torch.Tensor, world: int) -> Script:
    total = yield Exchange("sum", "all", flat / world)
    return total


def _power(model: DistributedDataParallel, given: tuple[Any, ...], start_iter: int, rank: int, seed: int) -> Any:
    if given != (None, None, None, None):
        raise SchemeError("powersgd sends factors, not codes. Leave bits, block, rounding and error_feedback out.")
    for name, p in model.module.named_parameters():
        if p.requires_grad and p.ndim == 0:
            raise SchemeError(f"PyTorch's powersgd does not take parameters without an axis, as {name}. Give it the shape (1,), or use qgz.")  # fmt: skip
    check_agreement(model.module.named_parameters(), model.process_group, values=True)
    state = powerSGD_hook.PowerSGDState(
        model.process_group, matrix_approximation_rank=rank, start_powerSGD_iter=start_iter, random_seed=seed
    )
    model.register_comm_hook(state, _power_hook)
    return state


def _power_hook(state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """PyTorch's hook, waited for: it starts collectives in callbacks, which with gloo come in another order on every rank."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(powerSGD_hook.powerSGD_hook(state, bucket).wait())
    return done


# DDP looks for the classes themselves, which annotations are not in this module.
for _one in (_hook, _power_hook):
    _one.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]})
