"""What a kernel is: a few functions' worth of data, and the facts that they share about one weight.

Owns: `Kernel`, `Meta`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from arrondi.formats import ActivationScheme, Scheme
from arrondi.tensor.qtensor import QTensor

Tensors = dict[str, torch.Tensor]
"""The tensors that a kernel keeps of one weight, under names of its own choosing."""

Bound = Callable[[torch.Tensor], torch.Tensor]
"""A product with its weight and bias bound: x (..., in) → (..., out)."""


@dataclass(frozen=True)
class Meta:
    """The facts about one packed weight that are not tensors.

    Attributes:
        scheme: what its codes and scales mean.
        shape: (out, in).
        dtype: the floating type in which the product is computed.
        inputs: the scheme by which the kernel rounds x, None if x is multiplied as it is. Only a scheme that the kernel
            `rounds`; its static scale and zero point are tensors: `input_scale` (1,) float32, `input_zero_point` (1,) int32.
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    inputs: ActivationScheme | None = None


@dataclass(frozen=True)
class Kernel:
    """One way to multiply by a quantized matrix.

    Attributes:
        name: what `ARRONDI_KERNEL` and reports call it.
        refuse: (scheme, shape (out, in), dtype of x, device) → None if it can do it, else one sentence why not.
        prepack: (weight, dtype of x) → the tensors that `linear` needs, `codes` among them. Packed; never a float copy
            of the weight. They belong to this machine and this process, and are not a file format.
        unpack: (tensors of `prepack`, meta) → the weight again: the same codes, scales, zero points, offsets and scheme.
        linear: (x (..., in) of `meta.dtype`, tensors of `prepack`, meta, bias (out,) or None) → (..., out), same dtype.
        rounds: (weight scheme, scheme of the inputs) → whether `linear` rounds x by that scheme itself.
        bind: the same product for many calls: (tensors, meta, bias) → a function of x. None: made from `linear`.
    """

    name: str
    refuse: Callable[[Scheme, tuple[int, ...], torch.dtype, torch.device], str | None]
    prepack: Callable[[QTensor, torch.dtype], Tensors]
    unpack: Callable[[Tensors, Meta], QTensor]
    linear: Callable[[torch.Tensor, Tensors, Meta, torch.Tensor | None], torch.Tensor]
    rounds: Callable[[Scheme, ActivationScheme], bool] = lambda weights, inputs: False
    bind: Callable[[Tensors, Meta, torch.Tensor | None], Bound] | None = None
