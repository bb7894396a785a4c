"""Training in int4: all three products of a layer multiply 4-bit codes, in lanes of 8 bits.

Owns: `INT4`, `LUQ`, `LSQ_ONLY`. Forward, both sides are rounded to learned steps; in `int4` after a block Hadamard transform, which
spreads outliers. Backward, `int4` splits a gradient into two 4-bit numbers and draws rows by their size (see `sampling`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError
from arrondi.kernels import hadamard
from arrondi.kernels.sides import extremes, integer_product, round_codes, scaled
from arrondi.nn.fake import even_stride, first_step, step_slope
from arrondi.training.first_batch import settle
from arrondi.training.geometry import Geometry
from arrondi.training.method import Arithmetic, Gradients, Layer, Passed, TrainingMethod, lanes, padding, seed
from arrondi.training.sampling import MOST, chances, drawn, logarithmic, split
from arrondi.training.scales import inverse, padded, rounded

_LOW, _HIGH = -8, 7
_CLIPPED: Final = 32
"""Added to codes whose value lay outside the range, so that one byte says both."""

_FINE: Final = 254
"""Parts of a step in which what rounding left is kept for the gradient of the step."""

_STRIP: Final = 1 << 17
"""Weights that are turned and rounded at a time."""

_BLOCKS: Final = (1, 8, 16, 32, 64, 128)

_ROWS: Final = 512
"""Rows of a side that its first step is found on."""

_TINY: Final = 2.0**-100


@dataclass(frozen=True)
class Int4Options:
    """Of `int4`.

    Attributes:
        block: numbers that the Hadamard transform mixes, a power of two, 1 for none; 0 for the best of 1, 8 … 128 on the first batch.
        sampling: how rows of gradients are drawn: by their leverage, uniformly (to compare), or none left out.
    """

    block: int = 0
    sampling: Literal["leverage", "uniform", "none"] = "leverage"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block < 0 or self.block & (self.block - 1):
            raise SchemeError(f"int4: block is 0 (searched) or a power of two, got {self.block}.")


@dataclass(frozen=True)
class PlainOptions:
    """Of `luq` and `lsq-only`, which have none."""


def _turned(x: torch.Tensor, block: int, *, back: bool = False) -> torch.Tensor:
    """(rows, width) times a block-diagonal orthonormal Hadamard matrix; the width is a multiple of the block."""
    return x if block < 2 else hadamard(x.reshape(-1, block), transposed=back).reshape(x.shape)


def _some(x: torch.Tensor) -> torch.Tensor:
    return x.detach()[:: even_stride(len(x), _ROWS)].float()


def _lost(x: torch.Tensor, block: int) -> float:
    """Share of x that rounding to 4 bits loses after the transform."""
    there = _turned(padded(x, block), block)
    step = first_step(there, _LOW, _HIGH).clamp_min(_TINY)
    lost = (there / step).clamp(_LOW, _HIGH).round() * step - there
    return float(lost.square().sum() / there.square().sum().clamp_min(_TINY))


def best_block(x: torch.Tensor, weight: torch.Tensor) -> int:
    """The block of the Hadamard transform after which 4-bit rounding of both sides of a product changes it least; 1 is none.

    Args:
        x, weight: (rows, width), (out, width) floating; some of their rows are looked at.
    """
    sides = [_some(x), _some(weight)]
    return min(_BLOCKS, key=lambda block: sum(_lost(side, block) for side in sides))


def _rounded(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Codes in [-8, 7]; those whose value lay at the ends or beyond have `_CLIPPED` added."""
    there = inverse(step).expand(x.shape[0])
    codes = round_codes(x, row=there, lowest=_LOW, highest=_HIGH)
    unit = 1 / there[:1]  # infinity where there is no step: nothing is outside
    outside = (x >= _HIGH * unit).logical_or_(x <= _LOW * unit)
    return codes.add_(outside, alpha=_CLIPPED)


def _plain(codes: torch.Tensor) -> torch.Tensor:
    return torch.where(codes > _HIGH, codes - _CLIPPED, codes)


def _settled(layer: Layer, x: torch.Tensor, weight: torch.Tensor, searched: bool) -> int:
    """The block, chosen with the first steps by the first batch."""

    def find() -> dict[str, torch.Tensor]:
        block = layer.options.block if searched else 1
        block = best_block(x, weight) if searched and not block else max(block, 1)
        x_step, weight_step = (first_step(_turned(padded(_some(s), block), block), _LOW, _HIGH) for s in (x, weight))
        # What is zero at first, as the last layer of a branch often is, gets the steps of usual numbers.
        x_step = torch.where(x_step > 0, x_step, 2 / _HIGH)
        weight_step = torch.where(weight_step > 0, weight_step, weight.shape[1] ** -0.5 / _HIGH)
        return {"block": torch.tensor(block), "step_x": x_step, "step_weight": weight_step}

    settle(layer, "block", find)
    return int(layer.kept["block"])


def _strips(rows: int, width: int) -> Iterator[slice]:
    """Rows of a weight that are worked on at a time: they stay in cache, and their memory is used again."""
    size = max(_STRIP // max(width, 1), 1)
    return (slice(start, start + size) for start in range(0, rows, size))


def _weight_codes(weight: torch.Tensor, block: int, step: torch.Tensor) -> torch.Tensor:
    """Codes of a turned weight, (out, padded in) int8."""
    width = weight.shape[1] + -weight.shape[1] % block
    codes = torch.empty((weight.shape[0], width), dtype=torch.int8, device=weight.device)
    there = inverse(step)
    for strip in _strips(*codes.shape):
        turned = _turned(padded(weight[strip], block).float(), block)
        codes[strip] = round_codes(turned, row=there.expand(len(turned)), lowest=_LOW, highest=_HIGH)
    return codes


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    layer: Layer,
    *,
    turn: bool = False,
) -> tuple[torch.Tensor, Passed]:
    taps = weight.reshape(-1, x.shape[1])  # the transform mixes the features of a point, so it does not meet windows
    block = _settled(layer, x, taps, turn)
    there = _turned(padded(x, block).float(), block)
    step_x, step_weight = (layer.learned[name].detach().abs().reshape(()) for name in ("step_x", "step_weight"))
    codes, of_weight = _rounded(there, step_x), _weight_codes(taps, block, step_weight).reshape(len(weight), -1)
    plain = _plain(codes)
    sums = integer_product(geometry.matrix(plain), of_weight)
    unsound = _of_rows(0 * extremes(there), geometry)  # a learned step would hide what is not finite
    y = scaled(sums, step_x * step_weight + unsound, None, bias, x.dtype)
    left = round_codes(there * inverse(step_x) - plain, row=torch.full((len(there),), float(_FINE)))
    return y, Passed((codes, left, of_weight, weight, step_x, step_weight), (block,))


def _of_rows(values: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Values of points, added up over the points of each row of the product."""
    return geometry.matrix(values[:, None]).sum(1)


def _learn(weight: torch.Tensor, options: Any) -> dict[str, torch.Tensor]:
    return {"step_x": torch.zeros(1), "step_weight": torch.zeros(1)}


def _finish(
    by_x: torch.Tensor | None, by_weight: torch.Tensor | None, passed: Passed, geometry: Geometry, features: int
) -> Gradients:
    """Gradients of rounded sides → of what was rounded, turned back, and of the steps."""
    codes, left, of_weight, weight, _, step_weight = passed.whole
    (block,) = passed.facts
    learned = {}
    if by_x is not None:
        by_x = geometry.back(by_x)
        plain = _plain(codes).float()
        there = plain + left.float() / _FINE
        there = torch.where(codes > _HIGH, torch.where(plain < 0, float(_LOW), float(_HIGH)), there)
        learned["step_x"] = step_slope(there, plain, by_x, _LOW, _HIGH).reshape(1)
        by_x = _turned(by_x * (codes <= _HIGH), block, back=True)[:, :features]
    if by_weight is not None:
        of_weight, by_weight = (side.reshape(-1, codes.shape[1]) for side in (of_weight, by_weight))
        taps = weight.reshape(-1, features)
        total = torch.zeros((), device=weight.device)
        there = inverse(step_weight)
        for strip in _strips(*by_weight.shape):
            turned = _turned(padded(taps[strip], block).float(), block) * there
            slope = by_weight[strip]
            total += step_slope(turned, of_weight[strip], slope, _LOW, _HIGH, of_weight.numel())
            by_weight[strip] = _turned(slope * ((turned > _LOW) & (turned < _HIGH)), block, back=True)
        learned["step_weight"] = total.reshape(1)
        by_weight = by_weight[:, :features].reshape(weight.shape)
    return by_x, by_weight, learned


def _chances(sizes: torch.Tensor, budget: float, how: str) -> torch.Tensor:
    if how == "none":
        return torch.ones_like(sizes)
    if how == "uniform":
        return torch.full_like(sizes, budget / max(len(sizes), 1)).clamp_max(1)
    return chances(sizes, budget)


def _sampled(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    """Both products from two 4-bit halves of the gradient, of whose 2 · rows about as many as there are rows are multiplied."""
    codes, _, of_weight, _, step_x, step_weight = passed.whole
    halves = split(slope, seed())
    generator = torch.Generator().manual_seed(seed())
    x = _plain(codes)
    parts = ((halves.coarse, halves.scale), (halves.fine, halves.scale / (2 * MOST)))
    sizes = torch.cat([part.float().norm(dim=1) * scale for part, scale in parts])
    rows, how = len(slope), layer.options.sampling
    by_x = by_weight = None
    if wanted[0]:
        by_x = torch.zeros((rows, of_weight.shape[1]), dtype=torch.float32, device=slope.device)
        for (part, scale), p in zip(parts, _chances(sizes, rows, how).split(rows), strict=True):
            kept, more = drawn(p, generator)
            sums = integer_product(part[kept], of_weight.T)
            by_x.index_add_(0, kept, scaled(sums, more * scale * step_weight, None, None, torch.float32))
        by_x += 0 * halves.scale  # of what is not finite no row is drawn, and nothing may hide it
    if wanted[1]:
        leverage = sizes * _of_rows(x.float().square().sum(1), geometry).sqrt().repeat(2)
        windows = geometry.matrix(x)
        for (part, scale), p in zip(parts, _chances(leverage, rows, how).split(rows), strict=True):
            kept, more = drawn(p, generator)
            # The weights of rows stand inside the sum: rows take them in and are rounded anew, by output.
            again = rounded(part[kept].to(torch.bfloat16), row=more, by_column=True, seed=seed())
            sums = integer_product(again.codes.T, windows[kept].T)
            half = scaled(sums, again.scale * scale * step_x, None, None, torch.float32)
            by_weight = half if by_weight is None else by_weight.add_(half)
        assert by_weight is not None
        by_weight += 0 * halves.scale
    return _finish(by_x, by_weight, passed, geometry, layer.features)


def _plain_products(
    slopes: torch.Tensor,
    scale: torch.Tensor,
    passed: Passed,
    geometry: Geometry,
    layer: Layer,
    wanted: tuple[bool, bool],
) -> Gradients:
    """Both products from one matrix of codes with one scale."""
    codes, _, of_weight, _, step_x, step_weight = passed.whole
    by_x = by_weight = None
    if wanted[0]:
        sums = integer_product(slopes, of_weight.T)
        by_x = scaled(sums, (scale * step_weight).expand(len(sums)), None, None, torch.float32)
    if wanted[1]:
        sums = integer_product(slopes.T, geometry.matrix(_plain(codes)).T)
        by_weight = scaled(sums, (scale * step_x).expand(len(sums)), None, None, torch.float32)
    return _finish(by_x, by_weight, passed, geometry, layer.features)


def _luq(slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]) -> Gradients:
    return _plain_products(*logarithmic(slope, seed()), passed, geometry, layer, wanted)


def _nearest(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    scale = extremes(slope).amax() / MOST if slope.numel() else torch.zeros(())
    codes = round_codes(slope, row=inverse(scale).expand(len(slope)), lowest=-MOST, highest=MOST)
    return _plain_products(codes, scale, passed, geometry, layer, wanted)


def _arithmetic(layer: Layer, device: str, *, backward: str) -> Arithmetic:
    way = lanes(device, 4) + padding("inputs", layer.features, int(layer.kept.get("block", 1)))
    return f"int4 × int4 → int32{way}", f"{backward}{way}", f"{backward}{way}"


INT4: Final = TrainingMethod(
    "int4",
    "Hadamard transform and learned steps forward; gradients as two 4-bit halves, rows drawn by leverage.",
    "Xi et al., 2023, arXiv:2306.11987",
    Int4Options,
    partial(_forward, turn=True),
    _sampled,
    partial(_arithmetic, backward="2 × (int4 × int4) → int32"),
    _learn,
)

LUQ: Final = TrainingMethod(
    "luq",
    "Learned steps forward; gradients as unbiased powers of two.",
    "Chmiel et al., 2021, arXiv:2112.10769",
    PlainOptions,
    _forward,
    _luq,
    partial(_arithmetic, backward="4-bit powers of two × int4 → int32"),
    _learn,
)

LSQ_ONLY: Final = TrainingMethod(
    "lsq-only",
    "Learned steps forward; gradients to the nearest of 15 levels.",
    "Esser et al., 2020, arXiv:1902.08153",
    PlainOptions,
    _forward,
    _nearest,
    partial(_arithmetic, backward="int4 × int4 → int32"),
    _learn,
)
