"""Round to nearest: the baseline that every other method must beat.

Owns: `rtn`, `nearest`, `refuse_rtn` and `pays_to_search`. Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2 (affine quantizer). Ties
go to even, as in IEEE 754.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from arrondi.arguments import check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError
from arrondi.formats import Scheme
from arrondi.rounding.options import Power
from arrondi.rounding.trellis import refuse_trellis, trellis
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.nearest import own_numbers, quantize_tensor, quantize_with, store_grid
from arrondi.tensor.qtensor import Parts, QTensor
from arrondi.tensor.ranges.exponents import EXPONENT_RULES
from arrondi.tensor.ranges.search import search_grid
from arrondi.tensor.ranges.squares import stepped
from arrondi.tensor.ranges.superblocks import is_superblock
from arrondi.tensor.ranges.weighted import FOUR_OVER_SIX, shares_outer_scale, weighted_parts

Range = Literal["auto", "absmax", "search", "four-over-six", "floor", "ceil", "even", "best"]


def refuse_rtn(scheme: Scheme, options: Mapping[str, Any]) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    range = options.get("range", "auto")
    if scheme.format.trellis is not None:
        plain = range == "auto"
        return (
            refuse_trellis(scheme, {})
            if plain
            else f"A trellis has no range to choose, got range={range}. Leave it out."
        )
    if not scheme.nearest:
        return own_numbers(scheme)
    if range in EXPONENT_RULES and scheme.scale != "e8m0":
        return f"range={range} is a rule for power-of-two scales, got {scheme}. Use range=search."
    if range == "four-over-six" and (
        scheme.format.name != "fp4_e2m1" or scheme.scale == "e8m0" or not scheme.symmetric
    ):
        return f"range=four-over-six is for fp4 with finer scales than powers of two, got {scheme}. Use range=search."
    return None


def rtn(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    range: Range = "auto",
    power: Power = 2.5,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """The nearest code of every weight.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: what it becomes.
        moment: second moment of the inputs (n = K); with range="search" its diagonal weighs the columns.
        range: "absmax" spans the whole group; "search" tries narrower ranges and takes the one with the least error; "auto"
            searches where that gains much for little time, see `pays_to_search`. "four-over-six" lays the largest magnitude of
            each fp4 block on 6 or on 4. "floor", "ceil", "even" and "best" are the rules of power-of-two scales.
        power: exponent of the error that the search minimises; 2 for super-blocks, int8 in small groups and ggml's codebook.
        name: for messages.
        facts: not used; accepted so that every method is called alike.

    Raises:
        SchemeError: another `range`, or one that does not go with the scheme.
        DataError: NaN or infinity in the weight.
    """
    with named(name):
        check_arguments(rtn, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    importance = None if moment is None else moment.diagonal().to(weight.device)
    return nearest(weight, scheme, importance, range=range, power=power, name=name)


def nearest(
    weight: torch.Tensor,
    scheme: Scheme,
    importance: torch.Tensor | None = None,
    *,
    range: Range = "auto",
    power: float = 2.5,
    name: str = "weight",
) -> QTensor:
    """`rtn` with arguments that are known to be good.

    Args:
        importance: (K,) what an error in each column weighs in a search, for example the mean square of its input.
    """
    if scheme.format.trellis is not None and range == "auto":
        return trellis(weight, scheme, name=name)  # rings are searched as wholes, but no column makes up for another
    if range == "auto":
        range = "search" if pays_to_search(scheme) else "absmax"
    refusal = refuse_rtn(scheme, {"range": range})
    if refusal:
        raise SchemeError(f"{name}: {refusal}")
    if range in EXPONENT_RULES:
        return quantize_tensor(weight, scheme, rule=range, name=name)
    if range == "absmax" or weight.numel() == 0:
        return quantize_tensor(weight, scheme, rule="full" if is_superblock(scheme) else "auto", name=name)
    with named(name):
        if range == "four-over-six":
            grid = weighted_parts(weight, scheme, importance, magnitude=False, widths=FOUR_OVER_SIX, turns=0, name=name)
        else:
            grid = searched(weight.detach(), scheme, importance, power, name)
    return quantize_with(weight, scheme, grid, name=name)


def pays_to_search(scheme: Scheme) -> bool:
    """Whether a searched range is worth its time: integers of less than 8 bits or in small groups, super-blocks, power-of-two scales.

    Measured on Gaussian weights (squared error, searched over absmax, groups of 128) and one core: int2 0.44, int3 0.62, int4
    0.77, int6 0.91 in some 30 s for 10⁹ weights; MXFP8 0.82, MXFP6 0.96, MXFP4 0.94, of which only three scales are tried.
    Integers of 8 bits gain 0-2 % there but 18 % in groups of 32, fp8 with plain scales 1-3 %. ggml's codebook, laid out for such searches, gains
    28 % in 160 s. Other fp4 and codebooks gain 12-16 %, but take an hour or more
    for 10⁹ weights: ask for them. Ternary and binary scales are the best ones already. It depends on the scheme alone, so that every
    machine gives the same codes.
    """
    format = scheme.format
    coarse = format.kind == "integer" and format.levels > 3 and format.bits < 8
    return scheme.scale == "e8m0" or coarse or is_superblock(scheme) or stepped(scheme)


def searched(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None, power: float, name: str) -> Parts:
    """The searched grid as it is kept; scales that are quantized in turn are tried as they will read back."""
    if is_superblock(scheme) or stepped(scheme):
        return weighted_parts(weight, scheme, importance, magnitude=False, name=name)
    if shares_outer_scale(scheme):
        return weighted_parts(weight, scheme, importance, magnitude=False, power=power, name=name)
    return store_grid(search_grid(weight, scheme, importance, power=power), scheme, tuple(weight.shape), name=name)
