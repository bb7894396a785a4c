"""The static scales of inputs and outputs, as the package stores them beside a weight.

Owns: `activation_specs`, `write_activations` and `read_activations`. A static scale is `P.input_scale` (and `P.input_zero_point`);
of NVFP4 only the outer scale is static, and `P.input_global_scale` is its reciprocal. The same of outputs.
"""

from __future__ import annotations

import torch

from arrondi.checkpoint.layouts.checks import checked_grid
from arrondi.checkpoint.layouts.layout import LayerValues, Placed, Reader
from arrondi.formats import ActivationScheme
from arrondi.tensor.ranges.grid import STORED, Grid

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def activation_specs(placed: Placed) -> Specs:
    """The tensors of both sides, by suffix; none where scales are dynamic."""
    specs: Specs = {}
    for side, activations in _sides(placed):
        if activations.dynamic == "local":
            specs[f"{side}_global_scale"] = (torch.float32, (1,))
            continue
        specs[f"{side}_scale"] = (STORED[str(activations.scheme.scale)], (1,))
        if activations.scheme.zero_point == "integer":
            specs[f"{side}_zero_point"] = (torch.int8, (1,))
    return specs


def write_activations(placed: Placed, values: LayerValues) -> dict[str, torch.Tensor]:
    """Those tensors of the grids that `values` has."""
    tensors: dict[str, torch.Tensor] = {}
    for side, activations in _sides(placed):
        grid = values.inputs if side == "input" else values.outputs
        assert grid is not None, f"{placed.name}: the scheme asks for a static scale of {side}s, and none is given"
        if activations.dynamic == "local":
            tensors[f"{side}_global_scale"] = 1 / grid.scale.float().reshape(1)
            continue
        tensors[f"{side}_scale"] = grid.scale.reshape(1).to(STORED[str(activations.scheme.scale)])
        if grid.zero_point is not None:
            tensors[f"{side}_zero_point"] = grid.zero_point.to(torch.int8).reshape(1)
    return tensors


def read_activations(placed: Placed, read: Reader) -> tuple[Grid | None, Grid | None]:
    """The grids of inputs and outputs, as (1, 1) tensors; None where scales are dynamic."""
    prefix = placed.name.removesuffix("weight")
    found: dict[str, Grid] = {}
    for side, activations in _sides(placed):
        zero = None
        if activations.dynamic == "local":
            scale = 1 / read(f"{prefix}{side}_global_scale")
        else:
            scale = read(f"{prefix}{side}_scale").float()
            if activations.scheme.zero_point == "integer":
                zero = read(f"{prefix}{side}_zero_point").int().reshape(1, 1)
        grid = Grid(scale.reshape(1, 1), zero, None)
        found[side] = checked_grid(f"{prefix}{side}_scale", grid, activations.scheme.format)
    return found.get("input"), found.get("output")


def _sides(placed: Placed) -> list[tuple[str, ActivationScheme]]:
    """The sides that have something to store."""
    sides = {"input": placed.scheme.inputs, "output": placed.scheme.outputs}
    return [(side, a) for side, a in sides.items() if a is not None and a.dynamic is not True]
