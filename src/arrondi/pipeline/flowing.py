"""What flows between the layers of a network becomes: `flowing_scheme`, and `rounded_flow`, the graph in which it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from arrondi.errors import SchemeError
from arrondi.formats import ActivationScheme, Format, PerTensor, PerToken, Scheme, integer
from arrondi.graph import (
    Graph,
    Places,
    Program,
    check_dynamic,
    has_attention,
    observe,
    places,
    product_places,
    round_values,
)
from arrondi.graph.faint import FAINT, clearness
from arrondi.measure.arrays import Arrays
from arrondi.pipeline.ends import ends_of, of_bits, read_by
from arrondi.pipeline.recipe import Recipe
from arrondi.tensor.ranges.observed import grid_from_range

_SIXTEEN: Final = {
    True: Format("int16", "integer", 16, -(2**15), 2**15 - 1),
    False: Format("uint16", "integer", 16, 0, 2**16 - 1),
}
"""Signed → sixteen bits, which only what flows has."""
_WIDE: Final = 8
"""Bits with which sums can be rounded too."""
_FIRST: Final = 21
"""The first operator set whose quantizers know them."""


@dataclass(frozen=True)
class Ranges:
    """How ranges of what flows are found.

    Attributes:
        observer, options: see `arrondi.calibration.OBSERVERS`.
        ends: bits of what the first and the last layers read; None: as others.
        faint: whether values that eight bits drown get sixteen, see `arrondi.graph.faint`.
        rounded: "all" values that integer operators read, or those that "products" read.
        uneven: operator → the uneven grid of what it makes, see `arrondi.graph.uneven`.
    """

    observer: str = "mse"
    options: Mapping[str, Any] = field(default_factory=dict)
    ends: int | None = None
    faint: bool = True
    rounded: str = "all"
    uneven: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Flow:
    """A graph in which what flows is rounded.

    Attributes:
        graph: the graph.
        found: which values are rounded.
        ranges: of them.
        wide: those that have sixteen bits.
    """

    graph: Graph
    found: Places
    ranges: Mapping[str, tuple[float, float]]
    wide: tuple[str, ...]


def flowing_scheme(recipe: Recipe) -> ActivationScheme | None:
    """What flows between layers becomes: one stored grid a tensor, with a zero point unless the scheme says static itself; or, where
    it is asked for one dynamic scale a tensor, that."""
    found = {rule.scheme.inputs for rule in recipe.rules if rule.scheme is not None}
    if len(found) > 1:
        raise SchemeError("What flows between layers has one scheme in a network. Give all rules the same inputs.")
    inputs = next(iter(found), None)
    if inputs is None:
        return None
    own = inputs.scheme
    if own.format.kind != "integer":
        raise SchemeError(f"What flows through an ONNX file is rounded to integers, got {own}. Use W8A8 or W4A8.")
    if isinstance(own.granularity, PerToken):  # of language models; an image has no tokens
        own = replace(own, granularity=PerTensor(), zero_point="integer", format=_unsigned(own.format))
    if inputs.dynamic is True and isinstance(inputs.scheme.granularity, PerTensor):
        check_dynamic(inputs)
        return inputs
    return ActivationScheme(replace(own, scale="float32"), False)


def which_values(graph: Graph, asked: str | None, flowing: ActivationScheme | None) -> str:
    """Which values are rounded: what is asked for, else "products" in networks with attention and few bits, else "all".

    Raises:
        SchemeError: it is neither.
    """
    if asked not in (None, "all", "products"):
        raise SchemeError(f"Rounded is all or products, got {asked!r}.")
    few = flowing is not None and flowing.scheme.format.bits < _WIDE
    return asked or ("products" if few and has_attention(graph) else "all")


def _unsigned(format: Format) -> Format:
    """The same codes counted from zero: what ONNX Runtime's integer products on x86 take without a detour."""
    return (
        integer(format.bits, signed=False) if format.kind == "integer" and format.levels == 2**format.bits else format
    )


def rounded_flow(graph: Graph, scheme: Scheme, calibration: Arrays, how: Ranges) -> Flow:
    """The graph with what flows rounded, by ranges that calibration samples show.

    Args:
        scheme: what values become.
        calibration: the samples.
        how: the ranges are found.
    """
    products = how.rounded == "products"
    program, found = Program(graph), product_places(graph) if products else places(graph)
    firsts, lasts = ends_of(graph)
    wider = of_bits(scheme, how.ends)
    apart = {found.values[n]: wider for n in read_by(graph, {*firsts, *lasts}) if n in found.values}
    ends = observe(program, calibration.batches(), found.values, scheme, how.observer, how.options, apart)
    # What is joined shares a grid where it has as many bits; the grid then reaches over all that share it.
    alike = {n: ends[g] for n, g in found.values.items() if apart.get(g, scheme) == scheme}
    groups = found.values if products else places(graph, alike).values
    first = {group: name for name, group in reversed(list(groups.items()))}
    members = {group: [ends[found.values[n]] for n, g in groups.items() if g == group] for group in first}
    spans = {group: (min(low for low, _ in some), max(high for _, high in some)) for group, some in members.items()}
    schemes = {group: apart.get(found.values[name], scheme) for group, name in first.items()}
    grids = {group: grid_from_range(*spans[group], own) for group, own in schemes.items()}
    wide: list[str] = []
    if how.faint and scheme.format.bits == 8 and graph.opset >= _FIRST:
        limits = {g: (grids[g], own.format.qmin, own.format.qmax) for g, own in schemes.items()}
        clear = clearness(program, calibration.batches(), groups, limits)
        for group in (g for g, decibels in clear.items() if decibels < FAINT):
            schemes[group] = replace(scheme, format=_SIXTEEN[scheme.format.qmin < 0])
            grids[group] = grid_from_range(*spans[group], schemes[group])
            wide += [n for n, g in groups.items() if g == group]
    chosen = {n: (grids[g], schemes[g]) for n, g in groups.items()}
    ranges = {n: spans[g] for n, g in groups.items()}
    return Flow(round_values(graph, chosen, groups, found.readers, how.uneven), found, ranges, tuple(wide))
