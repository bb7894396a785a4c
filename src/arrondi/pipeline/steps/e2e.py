"""`e2e`: scales, norms and biases of the whole quantized model, learned on what the original says (end-to-end tuning).

Codes stay. The loss is the divergence of the next token from the original's, or, of a model without a vocabulary, the squared error of
its outputs; the last eighth of the calibration batches is not learned on and says after which pass to stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import torch
from torch.nn import functional as F

from arrondi.arguments import Between
from arrondi.errors import DataError
from arrondi.measure.compare import is_causal
from arrondi.model import Inputs, Instance, Site, Source, model_output
from arrondi.pipeline.finished import Finished
from arrondi.pipeline.step import Choice, Declared, Step
from arrondi.pipeline.steps.learning import StandIns, norms_and_biases
from arrondi.pipeline.steps.options import Share
from arrondi.repair.soft import SoftScale, learns_scales

_HELD: Final = 8
"""Every so-manieth batch is held out."""
_WARM: Final = 5
"""Steps in which the rate rises."""
_OUTPUT_BYTES: Final = 64 << 20
"""Of one model's outputs in memory at once."""
_COPIES: Final = 5
"""The model in float32: two of them, what stands in for weights, its gradient, and what passes through."""


def e2e(
    finished: Finished,
    sites: Sequence[Site],
    *,
    passes: Annotated[int, Between(1, 1000)] = 4,
    rate: Share = 0.0,
    scales: bool = True,
    norms: bool = True,
) -> None:
    """Learn scales, norms and biases of the whole model on the outputs of the original.

    Args:
        passes: over the calibration batches.
        rate: of Adam, relative to the size of what is learned; 0 is 0.04 / 2^bits of the narrowest weights.
        scales: learn the scales of the weights.
        norms: learn norms and biases.

    Raises:
        DataError: a single batch cannot be both learned from and held out.
    """
    packed = finished.packed(sites)
    soft = {
        name: SoftScale.of(q)
        for name, q in packed.items()
        if scales and learns_scales(q.scheme) and q.group_index is None
    }
    tensors = norms_and_biases(finished.plan.source, sites, outside=True) if norms else ()
    stand = StandIns(finished.instance, sites, soft, {name: finished.tensor(name) for name in tensors})
    if len(finished.batches) < 2:
        raise DataError("e2e holds a part of the calibration text out, and there is one batch. Give more --samples.")
    if not stand.parameters:
        return
    held = max(len(finished.batches) // _HELD, 1)
    tuner = _Tuner(finished.original, finished.instance, stand, finished.batches[:-held], finished.batches[-held:])
    bits = min((packed[name].scheme.format.bits for name in soft), default=4)
    losses = tuner.learn(passes, rate or 0.04 / 2**bits)
    finished.facts |= {"passes": passes, "held_out": losses, "held_out_batches": held}
    if min(losses) < losses[0]:
        finished.replace({name: s.hard() for name, s in soft.items()})
        for name, value in stand.plain_values().items():
            finished.change(name, value)


@dataclass
class _Tuner:
    """The loop.

    Attributes:
        original, instance: filled models.
        stand: what stands in for the parameters of the second.
        batches, held: learned from, and held out.
    """

    original: Instance
    instance: Instance
    stand: StandIns
    batches: Sequence[Inputs]
    held: Sequence[Inputs]

    def learn(self, passes: int, rate: float) -> list[float]:
        """Go on while the loss on what is held out falls; the best is left in `stand`.

        Returns:
            the loss on what is held out before the first pass and after every one.
        """
        optimizer = torch.optim.Adam(self.stand.parameters, lr=rate, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(0)
        losses, best = [self.total()], [p.detach().clone() for p in self.stand.parameters]
        steps, done = passes * len(self.batches), 0
        for _ in range(passes):
            for j in torch.randperm(len(self.batches), generator=generator).tolist():
                optimizer.param_groups[0]["lr"] = rate * min(1, (done + 1) / _WARM) * (1 - done / steps)
                optimizer.zero_grad()
                self._descend(self.batches[j])
                optimizer.step()
                self.stand.limit()
                done += 1
            losses.append(self.total())
            if losses[-1] == min(losses):
                best = [p.detach().clone() for p in self.stand.parameters]
        with torch.no_grad():
            for parameter, value in zip(self.stand.parameters, best, strict=True):
                parameter.copy_(value)
        return losses

    def _descend(self, batch: Inputs) -> None:
        """Add up the gradient of a batch, a few windows at a time."""
        loss = _loss_of(self.original)
        for part, share in _parts(batch, self.original):
            with torch.no_grad():
                wanted = model_output(self.original, part)
            with torch.enable_grad(), self.stand.held():
                self.stand.add_gradient(share * loss(wanted, model_output(self.instance, part)))

    @torch.no_grad()
    def total(self) -> float:
        """The mean loss of what is held out."""
        loss, sum_ = _loss_of(self.original), 0.0
        with self.stand.held():
            for batch in self.held:
                for part, share in _parts(batch, self.original):
                    sum_ += share * float(loss(model_output(self.original, part), model_output(self.instance, part)))
        return sum_ / len(self.held)


def _parts(batch: Inputs, original: Instance) -> Iterator[tuple[Inputs, float]]:
    """A batch in parts whose outputs fit in memory, and which share of it each is. Only token ids alone can be parted."""
    ids = batch.kwargs.get("input_ids")
    if ids is None or batch.args or len(batch.kwargs) > 1:
        yield batch, 1.0
        return
    config: Any = getattr(original.model, "config", None)
    width = getattr(config.get_text_config(), "vocab_size", 1) if hasattr(config, "get_text_config") else 1
    rows = max(_OUTPUT_BYTES // (4 * width * ids.shape[1]), 1)
    for part in ids.split(rows):
        yield Inputs.of(part), len(part) / len(ids)


def _loss_of(original: Instance) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return _divergence if hasattr(original.model, "config") and is_causal(original.model) else _squared


def _divergence(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """KL(original ‖ quantized) of the next token, mean over positions, in nats."""
    wanted, given = (x.flatten(0, -2).log_softmax(-1) for x in (wanted, given))
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def _squared(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Squared error relative to the squares that are wanted."""
    return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)


def _if_it_fits(source: Source, sites: Sequence[Site], **options: object) -> Choice:
    """All sites, if this machine's memory can hold both models."""
    needed = _COPIES * 4 * sum(p.numel() for p in source.model.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not sites or needed <= there:
        return Choice((tuple(sites),) if sites else ())
    why = f"both models in memory need some {needed / 1e9:.0f} GB of this machine's {there / 1e9:.0f} GB"
    return Choice((), {why: tuple(s.name for s in sites)})


def _norms_change(source: Source, sites: Sequence[Site], *, norms: bool = True, **options: object) -> Declared:
    return Declared(changed=norms_and_biases(source, sites, outside=True) if norms else ())


STEP = Step(
    "e2e", "repair", "end-to-end tuning of scales and norms, as in EfficientQAT (Chen et al. 2024, arXiv:2407.11062)",
    apply=e2e, needs=frozenset({"batches"}), scope="whole", declare=_norms_change, choose=_if_it_fits, cost=10_000.0,
)  # fmt: skip
