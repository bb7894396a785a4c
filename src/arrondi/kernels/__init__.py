"""Matrix products with quantized weights: one table, and the choice from it.

Owns: `KERNELS`, `choose`, `explain`. A kernel is data (`Kernel`): a reason to refuse, a way to pack and to unpack, a way to multiply.
To add one: its file, a line in `KERNELS`, its test; the differential tests run over the table. `reference` is last and
takes everything; the kernels before it are faster where they do not refuse.

    >>> import torch
    >>> from arrondi.formats import parse_scheme
    >>> choose(parse_scheme("W4A16").weights, (64, 256), torch.float32, "cpu").name
    'native'
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from arrondi.errors import SchemeError, unknown
from arrondi.formats import ActivationScheme, Scheme
from arrondi.kernels.act_order import contiguous_groups, scattered_groups
from arrondi.kernels.binary import binary_linear, pack_signs, sign_tiles
from arrondi.kernels.hadamard import hadamard, hadamard_matrix
from arrondi.kernels.kernel import Bound, Kernel, Meta, Tensors
from arrondi.kernels.native_linear import NATIVE, TRELLIS, integer_linear
from arrondi.kernels.packed import decoded, decoded_rows, pack_weight, rows_at, unpack_weight
from arrondi.kernels.reference import REFERENCE
from arrondi.kernels.signs import SIGNS
from arrondi.kernels.torch_ops import TORCH_INT4, TORCH_INT8
from arrondi.kernels.triton_linear import TRITON

KERNELS: Final[Mapping[str, Kernel]] = MappingProxyType(
    {k.name: k for k in (SIGNS, NATIVE, TRELLIS, TORCH_INT4, TORCH_INT8, TRITON, REFERENCE)}
)
"""Every kernel by name, the preferred ones first."""

FORCE: Final = "ARRONDI_KERNEL"
"""Environment variable with the name of the only kernel to use."""


def choose(
    scheme: Scheme,
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    plain: bool = True,
    inputs: ActivationScheme | None = None,
) -> Kernel:
    """The first kernel of the table that can do it, or the one that the environment variable `ARRONDI_KERNEL` names.

    Args:
        scheme: of the weight.
        shape: of the weight, (out, in).
        x_dtype: in which the product is computed.
        device: where the weight lies.
        plain: False for a weight whose groups are scattered over the columns.
        inputs: how x is rounded at every call; None if it is not, or not always.

    Raises:
        SchemeError: no kernel can, or the one asked for cannot, or it does not exist; the message has the reason.
    """
    reasons = explain(scheme, shape, x_dtype, device, plain=plain, inputs=inputs)
    forced = os.environ.get(FORCE, "").strip()
    if forced:
        if forced not in KERNELS:
            raise unknown(f"kernel in {FORCE}:", forced, KERNELS)
        reasons = [(name, reason) for name, reason in reasons if name == forced]
    for name, reason in reasons:
        if reason is None:
            return KERNELS[name]
    advice = (
        f"{FORCE} asks for it: unset it, or set it to reference."
        if forced
        else "Use a 2-D weight and a floating dtype."
    )
    name, reason = reasons[-1]
    raise SchemeError(
        f"Kernel {name} cannot run {scheme} of shape {tuple(shape)} in {x_dtype} on {device}: {reason} {advice}"
    )


def explain(
    scheme: Scheme,
    shape: tuple[int, ...],
    x_dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    plain: bool = True,
    inputs: ActivationScheme | None = None,
) -> list[tuple[str, str | None]]:
    """Every kernel in order of preference with the sentence why it refuses, None if it does not.

    Takes the arguments of `choose`.
    """
    where = torch.device(device)
    scattered = None if plain else "It takes weights with contiguous groups."
    apart = None if scheme.apart is None else "It takes weights of which nothing is kept apart."
    reasons = []
    for name, kernel in KERNELS.items():
        own = None if kernel is REFERENCE else scattered or apart
        if kernel is SIGNS and (inputs is None or not SIGNS.rounds(scheme, inputs)):
            own = own or "It multiplies the signs of inputs that are rounded to signs, with one stored scale."
        reasons.append((name, own or kernel.refuse(scheme, tuple(shape), x_dtype, where)))
    return reasons


__all__ = [
    "FORCE",
    "KERNELS",
    "Bound",
    "Kernel",
    "Meta",
    "Tensors",
    "binary_linear",
    "choose",
    "contiguous_groups",
    "decoded",
    "decoded_rows",
    "explain",
    "hadamard",
    "hadamard_matrix",
    "integer_linear",
    "pack_signs",
    "pack_weight",
    "rows_at",
    "scattered_groups",
    "sign_tiles",
    "unpack_weight",
]
