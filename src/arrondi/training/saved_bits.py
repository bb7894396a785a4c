"""How many bits each saved activation is worth: `bits_by_sensitivity`.

Source: Chen et al. 2021, arXiv:2104.14129 (ActNN), section 4.3; here what a tensor's rounding does is measured, not estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from arrondi.errors import SchemeError
from arrondi.search.budget import choose_under
from arrondi.tensor.blocks import Bits
from arrondi.training.saved import compress_saved_activations

CHOICES: Final[tuple[Bits, ...]] = (2, 4, 8)
_PROBE: Final[Bits] = 4


def bits_by_sensitivity(model: nn.Module, loss: Callable[[], torch.Tensor], average: float) -> list[Bits]:
    """Bits for each tensor that `compress_saved_activations` encodes, so that the gradient loses least in the same memory.

    One tensor after the other is kept in 4 bits, all others exactly. The squared error C that this leaves in the gradient goes with
    the square of the step, so b bits leave C · (15 / (2ᵇ - 1))²; the sum is made least under the budget. Takes a training step for each
    tensor; gradients and buffers of the model stay what they were.

    Args:
        model: whose gradient is measured.
        loss: the forward pass on a batch, which gives a scalar. It must save the same tensors each time; random numbers repeat.
        average: bits a number, from 2 to 8.

    Returns:
        For `compress_saved_activations(bits=...)`, in the order in which the tensors are saved.

    Raises:
        SchemeError: the average is below 2 or above 8, or nothing is encoded.
    """
    if not CHOICES[0] <= average <= CHOICES[-1]:
        raise SchemeError(f"Saved activations take from 2 to 8 bits on average, got {average!r}.")
    exact, sizes = _gradient(model, loss, [32])
    if not sizes:
        raise SchemeError("This forward pass saves nothing that could be kept in fewer bits.")
    exactly: list[Bits] = [32] * len(sizes)
    losses = []
    for i in range(len(sizes)):
        found, _ = _gradient(model, loss, [*exactly[:i], _PROBE, 32])
        error = float((found - exact).square().sum())
        losses.append([error * ((2**_PROBE - 1) / (2**b - 1)) ** 2 for b in CHOICES])
    costs = [[float(size * b) for b in CHOICES] for size in sizes]
    return [CHOICES[i] for i in choose_under(losses, costs, average * sum(sizes))]


def _gradient(
    model: nn.Module, loss: Callable[[], torch.Tensor], bits: Sequence[Bits]
) -> tuple[torch.Tensor, list[int]]:
    """The gradient of all parameters with activations kept so, and the sizes of these."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(), compress_saved_activations(bits) as saved:
        torch.manual_seed(0)
        value = loss()
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return torch.cat([g.detach().double().flatten() for g in found if g is not None]), saved.sizes
