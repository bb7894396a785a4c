"""Which scheme of a layout holds a quantized tensor: the same values where there is one, the nearest where there is none.

Owns: `chosen` and the `Choice` that it makes, and `stays`. Nothing is known of single layouts here: schemes are tried in the order of their size, and the
layout says which of them it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch

from arrondi.checkpoint import LayerValues, Layout, Placed
from arrondi.formats import FORMATS, Format, Granularity, LayerScheme, PerBlock, PerChannel, PerGroup
from arrondi.formats.presets import PRESETS
from arrondi.formats.scheme import ScaleType
from arrondi.tensor.distance import distance_of, requantized
from arrondi.tensor.express import expressed
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED

Verdict = Literal["exact", "rescaled", "requantized", "copied"]

_GROUPS: Final = (128, 64, 32, 16)
_BLOCKS: Final = PerBlock(128, 128)
"""Those of every fp8 file that has blocks."""
_STORED: Final[tuple[ScaleType, ...]] = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Choice:
    """What becomes of one tensor.

    Attributes:
        scheme: of its layer in the target.
        verdict: "exact": every value is the same number. "rescaled": up to the storage of scales and offsets. "requantized": rounded anew.
        error: the largest difference of a value.
        sqnr_db: of the new values to the old ones, of those that are rounded anew; else None.
    """

    scheme: LayerScheme
    verdict: Verdict
    error: float = 0.0
    sqnr_db: float | None = None


def chosen(values: LayerValues, placed: Placed, layout: Layout, wanted: LayerScheme | None = None) -> Choice | str:
    """The scheme in which a layout will hold a layer.

    Every candidate is written and read back by the layout's own rules: what a file would not give back the same is not called exact.

    Args:
        values: the layer.
        placed: how it is held now.
        layout: of the target.
        wanted: rounded anew to this scheme where no scheme holds the values; None: the smallest one that has as many bits.

    Returns:
        the choice, or, where the layout holds no such layer at all, its reason.
    """
    q = values.weight
    near: tuple[float, Choice] | None = None
    for scheme in _words(placed.scheme, _types(q)):
        if layout.refuse(replace(placed, scheme=scheme, storage="")) is not None:
            continue
        made = expressed(q, scheme.weights)
        if made is None:
            continue
        error = _difference(_kept(replace(values, weight=made), replace(placed, scheme=scheme), layout), q)
        if error == 0:
            return Choice(scheme, "exact")
        if near is None or error < near[0]:
            near = error, Choice(scheme, "rescaled", error)
    if near is not None:
        return near[1]
    return _rounded(values, placed, layout, wanted)


def converted(q: QTensor, choice: Choice) -> QTensor:
    """The tensor as its choice has it."""
    made = None if choice.verdict == "requantized" else expressed(q, choice.scheme.weights)
    return made if made is not None else requantized(q, choice.scheme.weights)


def _kept(values: LayerValues, placed: Placed, layout: Layout) -> QTensor:
    """A weight as a file in the layout gives it back."""
    as_planned = replace(placed, storage="", indexed=values.weight.group_index is not None)
    return _written(values, as_planned, layout)


def _written(values: LayerValues, placed: Placed, layout: Layout) -> QTensor:
    return layout.read(placed, layout.write(placed, values).__getitem__).weight


def stays(values: LayerValues, placed: Placed, layout: Layout) -> bool:
    """Whether a layer that its layout stores in one of several ways can be stored in that way again, and comes back the same."""
    if not placed.storage or layout.refuse(placed) is not None:
        return False
    return _difference(_written(values, placed, layout), values.weight) == 0


def _rounded(values: LayerValues, placed: Placed, layout: Layout, wanted: LayerScheme | None) -> Choice | str:
    q = values.weight
    own = wanted or layout.fit(placed.scheme)
    reason = layout.refuse(replace(placed, scheme=own, storage="", indexed=False)) or ""
    fits = []
    for scheme in map(layout.fit, [wanted] if wanted else _presets(placed.scheme)):
        why = layout.refuse(replace(placed, scheme=scheme, storage="", indexed=False))
        reason = reason or why or ""
        if why is None:
            fits.append(scheme)
    bits = placed.scheme.weights.format.bits
    for scheme in sorted(fits, key=lambda s: (s.weights.format.bits < bits, s.weights.format.bits)):
        made = requantized(q, scheme.weights)
        kept = _kept(replace(values, weight=made), replace(placed, scheme=scheme), layout)
        found = distance_of(q, kept)
        return Choice(scheme, "requantized", found.largest, round(found.sqnr_db, 2))
    return reason or "it holds no such layer"


def _presets(own: LayerScheme) -> Iterator[LayerScheme]:
    """Schemes of weights that have a name, with the inputs as they were."""
    for preset in PRESETS.values():
        if preset.inputs is None and preset.weights.nearest:
            yield replace(preset, inputs=own.inputs, outputs=own.outputs)


def _types(q: QTensor) -> tuple[ScaleType, ...]:
    """Types of scales, the narrowest that holds those of a tensor as they are first: what a layout widened comes back as it was."""
    scale = q.real_scale
    return tuple(sorted(_STORED, key=lambda name: not torch.equal(scale.to(STORED[name]).float(), scale)))


def _words(own: LayerScheme, types: tuple[ScaleType, ...]) -> Iterator[LayerScheme]:
    """Other schemes in which the values of one may be said, itself first.

    Before it comes only the zero point that wide offsets have been: layouts that lack zero points make float32 numbers of them.
    """
    w = own.weights
    if w.zero_point == "float" and w.scale == w.offset == "float32":
        yield replace(own, weights=replace(w, zero_point="integer", scale=types[0], signed=None))
    yield own
    if w.format.trellis is not None:
        return
    for format in _formats(w.format):
        for granularity in _granularities(w.granularity):
            for zero in ("none", "integer", "float"):
                if format.kind != "integer" and zero != w.zero_point:
                    continue
                for stored in ("e8m0", *types) if w.scale == "e8m0" else types:
                    if stored == "e8m0" and zero != "none":
                        continue
                    offset = "float32" if zero != "float" or stored == "e8m0" else stored
                    yield replace(own, weights=replace(
                        w, format=format, granularity=granularity, zero_point=zero, scale=stored, offset=offset, signed=None,
                    ))  # fmt: skip


def _granularities(own: Granularity) -> list[Granularity]:
    """The same, and all that are as fine or, should scales be equal, as coarse."""
    return list(dict.fromkeys([own, PerChannel(), *(PerGroup(n) for n in _GROUPS), _BLOCKS]))


def _formats(own: Format) -> list[Format]:
    """The same, and integers of other signs or more bits."""
    if own.kind != "integer":
        return [own]
    names = [f"{sign}{bits}" for bits in range(own.bits, 9) for sign in ("int", "uint")]
    return list(dict.fromkeys([own, *(FORMATS[n] for n in names if n in FORMATS)]))


def _difference(made: QTensor, q: QTensor) -> float:
    return distance_of(q, made).largest
