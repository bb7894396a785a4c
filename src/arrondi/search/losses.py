"""What weights that are rounded cost a network, and what searches for widths ask of recipes: `loss_of`, `rounded_weight`, `with_bits`, `sole_rule`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from arrondi.errors import SchemeError
from arrondi.formats import LayerScheme, Scheme, get_format
from arrondi.graph import Program
from arrondi.pipeline.recipe import Recipe, Rule
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor


def sole_rule(recipe: Recipe) -> tuple[Rule, LayerScheme]:
    """The rule that rounds weights, and its scheme.

    Raises:
        SchemeError: there are several, or it does not round to integers.
    """
    rules = [rule for rule in recipe.rules if rule.scheme is not None]
    if len(rules) != 1 or rules[0].scheme is None or rules[0].scheme.weights.format.kind != "integer":
        raise SchemeError("A budget chooses widths for one rule that rounds to integers. Give --scheme and --method.")
    return rules[0], rules[0].scheme


def with_bits(scheme: Scheme, bits: int) -> Scheme:
    return replace(scheme, format=get_format(f"{'int' if scheme.format.qmin < 0 else 'uint'}{bits}"))


def rounded_weight(program: Program, path: str, scheme: Scheme) -> QTensor:
    return quantize_tensor(program.get_parameter(f"{path}.weight").detach().flatten(1), scheme)


def output_of(program: Program, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    output = program(*batch)
    return (output[0] if isinstance(output, tuple) else output).float()


def loss_of(
    program: Program,
    batches: Sequence[Sequence[torch.Tensor]],
    wanted: Sequence[torch.Tensor],
    weights: Mapping[str, QTensor],
) -> float:
    """What the network loses with these weights: the divergence of its classes, or the squared difference where it gives no classes."""
    parameters = {path: program.get_parameter(f"{path}.weight") for path in weights}
    before = {path: weight.detach().clone() for path, weight in parameters.items()}
    for path, weight in parameters.items():
        weight.copy_(weights[path].dequantize().reshape(weight.shape))
    total = count = 0.0
    try:
        for batch, reference in zip(batches, wanted, strict=True):
            given = output_of(program, batch)
            if reference.ndim == 2 and reference.shape[1] > 1:
                p, q = reference.log_softmax(1), given.log_softmax(1)
                total += float((p.exp() * (p - q)).sum())
                count += len(reference)
            else:
                total += float((given - reference).square().sum())
                count += float(reference.square().sum())
    finally:
        for path, weight in parameters.items():
            weight.copy_(before[path])
    return max(total / max(count, 1e-30), 1e-12)
