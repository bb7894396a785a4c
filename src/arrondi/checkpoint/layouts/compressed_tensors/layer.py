"""One layer as the package stores it: its weight in one of the formats, and the static scales of its inputs and outputs.

Owns: `specs`, `write`, `read_layer` and `storage_name`.
"""

from __future__ import annotations

import torch

from arrondi.checkpoint.containers.writer import TensorSpec
from arrondi.checkpoint.layouts.checks import checked
from arrondi.checkpoint.layouts.compressed_tensors.activations import (
    activation_specs,
    read_activations,
    write_activations,
)
from arrondi.checkpoint.layouts.compressed_tensors.storage import STORAGE, format_of
from arrondi.checkpoint.layouts.compressed_tensors.transposed import stored_form, transpose
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader


def storage_name(placed: Placed) -> str:
    """The format that this layer is stored in."""
    return placed.storage or str(format_of(placed.scheme))


def specs(placed: Placed) -> list[TensorSpec]:
    """The tensors that a layer becomes."""
    prefix, form = placed.name.removesuffix("weight"), stored_form(placed)
    stored = STORAGE[storage_name(form)].specs(form) | activation_specs(placed)
    return [(prefix + suffix, dtype, shape) for suffix, (dtype, shape) in stored.items()]


def write(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors with their numbers."""
    prefix, form = placed.name.removesuffix("weight"), stored_form(placed)
    weight = transpose(values.weight, form.scheme.weights) if placed.transposed else values.weight
    stored = STORAGE[storage_name(form)].write(form, weight) | write_activations(placed, values)
    return {prefix + suffix: tensor for suffix, tensor in stored.items()}


def read_layer(placed: Placed, reader: Reader) -> LayerValues:
    """The numbers of a layer, checked."""
    prefix, form = placed.name.removesuffix("weight"), stored_form(placed)
    storage = STORAGE[storage_name(form)]
    weight = checked(
        placed.name, storage.read(form, {suffix: reader(prefix + suffix) for suffix in storage.specs(form)})
    )
    if placed.transposed:
        weight = transpose(weight, placed.scheme.weights)
    return LayerValues(weight, *read_activations(placed, reader))
