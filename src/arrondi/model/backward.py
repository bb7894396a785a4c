"""Gradients of a loss, unit by unit from the last to the first: `walk_back`, and two losses.

One unit is in memory at a time: its inputs were kept when the stream was walked forwards, it is run again on them with gradients
recorded, and the gradient of what entered it is the gradient of what the unit before it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from arrondi.errors import SchemeError
from arrondi.model.chain import Inputs
from arrondi.model.store import TreeStore
from arrondi.model.streams import Stream

Loss = Callable[[int, torch.Tensor], torch.Tensor]
"""(batch, what the model computes for it) → a number; the loss is the sum over batches."""

Choice = Callable[[int], Sequence[str]]
"""Unit → names of parameters or of modules."""


class Product(NamedTuple):
    """One call of a module: what went in, and the gradient of the loss with respect to what came out."""

    inputs: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """What the loss says of one unit on one batch.

    Attributes:
        unit, batch: which.
        output: gradient with respect to what the unit gives.
        params: gradient with respect to each parameter that was asked for; zeros where the batch does not reach it.
        modules: every call of each module that was asked for.
    """

    unit: int
    batch: int
    output: torch.Tensor
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, list[Product]] = field(default_factory=dict)


def _none(unit: int) -> Sequence[str]:
    return ()


def walk_back(stream: Stream, loss: Loss, *, params: Choice = _none, modules: Choice = _none) -> Iterator[Gradients]:
    """Go through a stream from its end to its beginning.

    Inputs that are rounded pass gradients on as if they were not (a straight-through estimate).

    Args:
        stream: keeps inputs, and was walked to its end.
        loss: of every batch.
        params: unit → parameters of it whose gradients are wanted.
        modules: unit → modules of it whose inputs and gradients of outputs are wanted.

    Yields:
        every unit, the last one first, on every batch, while the unit is filled.

    Raises:
        SchemeError: the stream keeps no inputs, or its units hand each other more than hidden states.
    """
    if not stream.keeps_inputs:
        raise SchemeError("Gradients need what entered every unit. Make the stream with keep_inputs=True.")
    if stream.shares_state:
        raise SchemeError(
            "The model's units hand each other more than hidden states, so gradients cannot be followed unit by unit. Use a method that needs no gradients."
        )
    units = stream.units
    with TreeStore(stream.budget, stream.folder) as leaving:
        with units.outer_loaded():
            for j in range(len(stream)):
                leaving.append(_of_end(stream, j, loss).cpu())
        for i in reversed(range(len(units))):
            units.fill(i)
            with ExitStack() as last:
                last.callback(units.drop, i)
                for j in range(len(stream)):
                    output = leaving[j].to(units.instance.device)
                    entering, found = _of_unit(stream, i, j, output, params(i), modules(i))
                    leaving[j] = entering.cpu()
                    yield found


def _of_end(stream: Stream, j: int, loss: Loss) -> torch.Tensor:
    """Gradient of the loss with respect to what the last unit gives."""
    hidden = stream.hidden(len(stream.units), j).requires_grad_()
    with torch.enable_grad():
        total = loss(j, stream.output_on(j, hidden))
        (found,) = torch.autograd.grad(total, hidden)
    return found


def _of_unit(
    stream: Stream, i: int, j: int, output: torch.Tensor, params: Sequence[str], modules: Sequence[str]
) -> tuple[torch.Tensor, Gradients]:
    """Gradients with respect to what enters a unit, and to what was asked for in it."""
    instance = stream.units.instance
    weights = [instance.parameter(p) for p in params]
    before = [w.requires_grad for w in weights]
    hidden = stream.hidden(i, j).requires_grad_()
    try:
        with torch.enable_grad(), _recorded(instance.model, modules) as calls:
            for weight in weights:
                weight.requires_grad_()
            result = stream.run_on(i, j, hidden)
        made = [given for name in modules for _, given in calls[name]]
        wanted = [hidden, *weights, *made]
        found = torch.autograd.grad(result, wanted, output, allow_unused=True)
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
    rest = iter(filled[1 + len(weights) :])
    products = {name: [Product(taken, next(rest)) for taken, _ in calls[name]] for name in modules}
    return filled[0], Gradients(i, j, output, dict(zip(params, filled[1:], strict=False)), products)


@contextmanager
def _recorded(model: Any, modules: Sequence[str]) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Inside, every call of these modules is noted: its first input and its output."""
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}
    with ExitStack() as undo:
        for name in modules:

            def hook(module: Any, args: Any, given: torch.Tensor, name: str = name) -> None:
                calls[name].append((args[0].detach(), given))

            undo.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield calls


def next_token_loss(batches: Sequence[Any]) -> Loss:
    """Mean cross-entropy of the next token over all batches of token ids (n, tokens)."""
    ids = [Inputs.of(b).kwargs["input_ids"] for b in batches]
    count = sum(b[:, 1:].numel() for b in ids)

    def loss(j: int, output: torch.Tensor) -> torch.Tensor:
        wanted = ids[j][:, 1:].to(output.device)
        logits = output[:, :-1].float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, wanted.flatten(), reduction="sum") / count

    return loss


def sampled_loss(causal: bool) -> Loss:
    """A loss whose gradients have the Fisher information of the model's own predictions as their second moment, at any weights.

    Args:
        causal: outputs are logits (n, tokens, vocabulary): cross-entropy of tokens drawn from what the model itself predicts, summed. If not,
            outputs are what is to be kept: their product with standard normal numbers, as of a Gaussian around them.
    """

    def loss(j: int, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(j)
        if not causal:
            return (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        logits = output.float().flatten(0, -2)
        drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, drawn.to(output.device), reduction="sum")

    return loss


def kl_loss(batches: Sequence[Any], reference: Callable[[int], torch.Tensor]) -> Loss:
    """Mean KL divergence from a reference over all positions of all batches.

    Args:
        batches: token ids (n, tokens).
        reference: batch → the logits that the model should have (n, tokens, vocabulary).
    """
    count = sum(Inputs.of(b).kwargs["input_ids"].numel() for b in batches)

    def loss(j: int, output: torch.Tensor) -> torch.Tensor:
        wanted = reference(j).to(output.device).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(output.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
        return kl / count

    return loss
