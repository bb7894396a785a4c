"""What a mutant makes of the rounding of inputs, before the package's own rounding.

Owns: `inputs_apart`.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from arrondi.checkpoint import Checkpoint
from arrondi.tensor.nearest import fake_quantize

TIES: Final = 0.02
"""Share of numbers that may differ: the package adds a zero point before it rounds, so a tie may fall to the other side."""


def inputs_apart(schemes: dict[str, Any], checkpoint: Checkpoint, names: list[str]) -> str | None:
    """What is wrong with how the inputs of these weights are rounded, None if nothing is."""
    for name in names:
        inputs, args = checkpoint.placed[name].scheme.inputs, schemes[name].input_activations
        if (inputs is None) != (args is None):
            return f"the inputs of {name} are rounded here or by the package, not by both"
        if inputs is None or inputs.scheme.scale == "e8m0" or (inputs.dynamic == "local" and args.scale_dtype is None):
            continue  # nothing, or what is known to differ: `checkpoint/readers.py`, and NVFP4 of before `scale_dtype`
        values = checkpoint.layer(name)
        x = torch.randn(2, 12, checkpoint.placed[name].matrix_shape[1], generator=torch.Generator().manual_seed(5))
        found = fake_quantize(x, inputs.scheme, values.inputs)
        wanted = package_rounding(x, args, values.inputs)
        if float(((found - wanted).abs() > 1e-5 * wanted.abs() + 1e-7).float().mean()) > TIES:
            return f"the inputs of {name} are rounded otherwise than the package does: {inputs}"
    return None


def package_rounding(x: torch.Tensor, args: Any, grid: Any) -> torch.Tensor:
    """`x` as the package rounds it, with the stored part of the grid."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as packages_fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    if args.dynamic is False:
        zero = None if grid.zero_point is None else grid.zero_point.reshape(1)
        return packages_fake_quantize(x, grid.scale.reshape(1), zero, args)
    outer = None if grid is None else 1 / grid.scale.reshape(1)
    scale, zero = compute_dynamic_scales_and_zp(x, args, module=None, global_scale=outer)
    return packages_fake_quantize(x, scale, zero, args, global_scale=outer)
