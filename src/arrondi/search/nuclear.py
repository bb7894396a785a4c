"""What a width costs a layer by the nuclear norm of what it gives: `nuclear_losses`.

Ω = Σ_j σ_j(Y) · ‖Ŷ - Y‖²: a layer whose outputs are many-sided (large sum of singular values) is worth more bits. Needs no run of the whole network
for every width. Source: Liu et al. 2021, arXiv:2106.14156, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from arrondi.graph import Program
from arrondi.tensor.qtensor import QTensor

_SAMPLES: Final = 32
"""That are looked at."""


@torch.no_grad()
def nuclear_losses(
    program: Program, inputs: Sequence[torch.Tensor], choices: Mapping[str, Sequence[QTensor]]
) -> dict[str, list[float]]:
    """Layer's module → its loss for every choice of its weight.

    Args:
        program: with what flows rounded.
        inputs: of the network, a batch of samples.
        choices: layer's module → the weights that it may have.
    """
    found: dict[str, list[float]] = {}

    def look(path: str) -> Any:
        def see(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: Any) -> None:
            if path in found:
                return
            weight = module.get_parameter("weight")
            before, y = weight.detach().clone(), _matrices(output)
            worth = float(torch.linalg.svdvals(y.double()).sum(-1).mean())
            losses = []
            for q in choices[path]:
                weight.copy_(q.dequantize().reshape(weight.shape))
                # Not by calling the module, whose hook this is.
                losses.append(worth * float((_matrices(module.forward(*given)) - y).double().square().sum()))
            weight.copy_(before)
            found[path] = losses

        return see

    hooks = [program.get_submodule(path).register_forward_hook(look(path)) for path in choices]
    try:
        program(*(x[:_SAMPLES] for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _matrices(output: Any) -> torch.Tensor:
    """(samples, places or tokens, channels); a vector of a sample is one row."""
    y: torch.Tensor = output[0] if isinstance(output, tuple) else output
    if y.ndim > 3:  # an image: channels first
        return y.flatten(2).mT
    return y[:, None] if y.ndim == 2 else y
