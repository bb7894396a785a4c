"""How activations meet the codes of a packed weight.

Owns: `Rounding`, `rounding_of`, `rounds`. They meet integer codes as integers: as two (bfloat16, float16) or three (float32)
digits in base 256 of their share in the largest of each 256 columns, which is as exact as the type they come in; or rounded to
a scheme of up to 8 bits, with one scale for the tensor (static), for each token, or for each group of a token's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from arrondi.errors import ShapeError
from arrondi.formats import ActivationScheme, Granularity, PerBlock, PerGroup, PerTensor, PerToken, Scheme
from arrondi.kernels.kernel import Meta
from arrondi.kernels.native_linear.coding import INTEGERS, STEP, coding_of
from arrondi.native import TYPES
from arrondi.tensor.ranges.grid import STORED

DIGITS: Final = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
"""Digits that are as exact as a type."""

_MOST_GROUP: Final = 512
"""Columns of x under one scale, where not the whole token is."""


class Rounding(NamedTuple):
    """To what activations are rounded, as native/bind_products.cpp reads it.

    Attributes:
        lowest, highest: codes, at least and at most.
        scale_type: number of the type that scales are rounded to.
        group: columns under one scale; 0: all of a token.
    """

    lowest: int
    highest: int
    scale_type: int
    group: int


def rounding_of(meta: Meta, kind: int) -> tuple[int, Rounding | None]:
    """(digits in which x meets the codes, 0 for floats; what it is rounded to, None where x keeps its own numbers)."""
    if meta.inputs is None:
        return DIGITS[meta.dtype] if kind in INTEGERS else 0, None
    scheme = meta.inputs.scheme
    digits = 1 if scheme.symmetric else 2
    group = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0
    stored = STORED[str(scheme.scale)] if meta.inputs.dynamic else torch.float32  # a static scale is read as it is
    return digits, Rounding(scheme.format.qmin, scheme.format.qmax, TYPES[stored], group)


def rounds(weights: Scheme, inputs: ActivationScheme) -> bool:
    """Whether the integer product takes these activations: integers of up to 8 bits, symmetric (signed, more than three
    levels, which have a rule of their own) or with an integer zero point, one scale for each token or group of columns, or
    a static one for all of them."""
    coding, scheme = coding_of(weights), inputs.scheme
    format = scheme.format
    if coding is None or coding.kind not in INTEGERS or format.kind != "integer":
        return False
    if scheme.zero_point != "integer" and not (scheme.symmetric and format.qmin < 0 and format.levels > 3):
        return False
    if inputs.dynamic is False:
        return isinstance(scheme.granularity, PerTensor) and scheme.scale in STORED
    return scheme.scale in ("float32", "bfloat16") and _groups_fit(weights, scheme.granularity)


def check_rounding(digits: int, rounding: Sequence[int] | None) -> Rounding | None:
    """The numbers of `rounding_of`, which the operator may be given by anybody.

    Raises:
        ShapeError: they are none that the kernels know.
    """
    if rounding is None:
        if digits not in (0, 2, 3):
            raise ShapeError(f"Activations that are not rounded are floats (0) or have 2 or 3 digits, got {digits}.")
        return None
    found = Rounding(*rounding) if len(rounding) == 4 else Rounding(0, 0, 0, 0)
    signed = -128 <= found.lowest < 0 and found.lowest < found.highest <= 127
    codes = signed if digits == 1 else digits == 2 and (signed or (found.lowest == 0 < found.highest <= 255))
    sizes = found.group == 0 or (STEP <= found.group <= _MOST_GROUP and found.group % STEP == 0)
    if not codes or not sizes or found.scale_type not in (TYPES[torch.float32], TYPES[torch.bfloat16]):
        raise ShapeError(
            f"The rounding of activations is lowest and highest code of up to 8 bits, type of the scales (float32, bfloat16) and columns under one (0, or {STEP} … {_MOST_GROUP} in steps of {STEP}), got {list(rounding)} in {digits} digits."
        )
    return found


def _groups_fit(weights: Scheme, activations: Granularity) -> bool:
    """Groups of activations must be of whole steps, and each made of groups of the weight or a part of one."""
    if not isinstance(activations, PerGroup):
        return isinstance(activations, PerToken)
    size, of_weight = activations.size, weights.granularity
    if size % STEP or size > _MOST_GROUP or weights.format.levels == 3 or isinstance(of_weight, PerBlock):
        return False
    return not isinstance(of_weight, PerGroup) or of_weight.size % size == 0 or size % of_weight.size == 0
