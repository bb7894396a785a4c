"""LightSeq's int8 training: both sides of a product and its result are codes of a byte.

Owns: `LIGHTSEQ`, `LightseqOptions`, and what its integer inference shares: `Clips`, `positive`, `offset_of`, `widened`. The clip of what enters is learned by what lies beyond it; the clip of the
weight is its range; the clip of what leaves follows what was seen, from one step to the next, since the factor by which sums become
codes has to be known before they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError
from arrondi.kernels.clipping import MOST, clip_codes, masked, narrow, widen
from arrondi.kernels.sides import extremes, integer_product, scaled
from arrondi.training.first_batch import settle
from arrondi.training.geometry import Geometry, Tokens
from arrondi.training.method import Arithmetic, Gradients, Layer, Passed, TrainingMethod, lanes

LEAST: Final = 1e-6
"""Of clips, which stay positive."""

_UNKNOWN: Final = 16.0
"""The first clip where the first batch says nothing: LightSeq's own."""


@dataclass(frozen=True)
class LightseqOptions:
    """Of `lightseq`.

    Attributes:
        outputs: "int8": sums are rounded to a byte, which is what a kernel hands on; "int32": they keep what they are.
        inputs: "signed", or "unsigned": a ReLU is part of it, and codes are of what it gives; this needs int32 outputs.
        speed: share of the largest sum of a step in the next step's clip of outputs.
    """

    outputs: Literal["int8", "int32"] = "int8"
    inputs: Literal["signed", "unsigned"] = "signed"
    speed: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.speed <= 1:
            raise SchemeError(f"lightseq: speed is between 0 and 1, got {self.speed}.")
        if self.inputs == "unsigned" and self.outputs == "int8":
            raise SchemeError(
                "lightseq: unsigned inputs add an offset to every output, on which a byte would be wasted: take outputs='int32'."
            )


def positive(clip: torch.Tensor) -> torch.Tensor:
    """A clip as products use it: () float32, at least `LEAST`."""
    return clip.detach().float().reshape(()).clamp_min(LEAST)


def first_clip(sizes: torch.Tensor) -> torch.Tensor:
    """The clip that a learned one begins with: the largest size that is finite."""
    sizes = sizes[torch.isfinite(sizes)]
    largest = sizes.amax().float() if sizes.numel() else sizes.new_zeros(())
    return torch.where(largest > LEAST, largest, torch.full_like(largest, _UNKNOWN))


def offset_of(of_weight: torch.Tensor, clip: torch.Tensor, clip_weight: torch.Tensor) -> torch.Tensor:
    """What the offset of unsigned inputs adds to every output: clip / 2 · Σ weight, by the weight that is multiplied.

    Args:
        of_weight: (out, in) int8.
        clip, clip_weight: () float32.

    Returns:
        (out,) float32.
    """
    return of_weight.sum(1, dtype=torch.int32).float() * (clip / 2 * (clip_weight / MOST))


class Clips(NamedTuple):
    """The clips of one product: of what enters, of the weight, and of what leaves where that is narrowed."""

    inputs: torch.Tensor
    weight: torch.Tensor
    outputs: torch.Tensor | None
    unsigned: bool

    @property
    def factor(self) -> torch.Tensor:
        """By which sums become codes."""
        assert self.outputs is not None
        return self.inputs * self.weight / (self.outputs * MOST)

    @property
    def unit(self) -> torch.Tensor:
        """What a code that leaves is worth, or a sum."""
        if self.outputs is not None:
            return self.outputs / MOST
        return self.inputs * self.weight / (MOST**2 * (2 if self.unsigned else 1))


def widened(
    codes: torch.Tensor, clips: Clips, bias: torch.Tensor | None, unsound: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What leaves a product as numbers.

    Args:
        codes: (rows, out), int8, or sums as int32.
        clips: of the product.
        bias: (out,) float32, with the offset of unsigned inputs in it, or None.
        unsound: (rows,) float32, 0, or NaN in rows of which something was not finite, which codes would hide.
        dtype: of the result.
    """
    row = clips.unit + unsound
    return widen(codes, row, bias, dtype) if codes.dtype == torch.int8 else scaled(codes, row, None, bias, dtype)


def _products(
    x: torch.Tensor,
    weight: torch.Tensor,
    clip: torch.Tensor,
    clip_weight: torch.Tensor,
    geometry: Geometry,
    layer: Layer,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Sums, codes of x, which of it lay beyond the clip, and codes of the weight."""
    unsigned = layer.options.inputs == "unsigned"
    codes, beyond = clip_codes(x, clip, unsigned=unsigned, marked=True)
    of_weight = clip_codes(weight, clip_weight).codes
    return integer_product(geometry.matrix(codes), of_weight), codes, beyond, of_weight


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, layer: Layer
) -> tuple[torch.Tensor, Passed]:
    options: LightseqOptions = layer.options
    if options.inputs == "unsigned" and not isinstance(geometry, Tokens):
        raise SchemeError(
            "lightseq: unsigned inputs are for linear layers; a convolution pads with zeros, which have a code there."
        )
    sizes = extremes(geometry.units(x))
    clip_weight = extremes(weight).amax().clamp_min(LEAST)

    def find() -> dict[str, torch.Tensor]:
        clip = first_clip(x.detach().amax().reshape(1) if options.inputs == "unsigned" and x.numel() else sizes)
        if options.outputs == "int32":
            return {"clip": clip}
        sums = _products(x, weight, clip, clip_weight, geometry, layer)[0]
        return {"clip": clip, "clip_out": first_clip(_largest(sums) * (clip * clip_weight / MOST**2).reshape(1))}

    settle(layer, "begun", find)
    clip = positive(layer.learned["clip"])
    sums, codes, beyond, of_weight = _products(x, weight, clip, clip_weight, geometry, layer)
    unsound = geometry.spread(0 * sizes) + 0 * clip_weight
    clip_out = None if options.outputs == "int32" else positive(layer.kept["clip_out"].to(x.device))
    bias = None if bias is None else bias.detach().float()
    if options.inputs == "unsigned":
        offset = offset_of(of_weight, clip, clip_weight)
        bias = offset if bias is None else bias + offset
    clips = Clips(clip, clip_weight, clip_out, options.inputs == "unsigned")
    if clip_out is None:
        return widened(sums, clips, bias, unsound, x.dtype), Passed(
            (codes, beyond, of_weight, clip, clip_weight, None, None)
        )
    narrowed = narrow(sums, clips.factor, marked=True)
    y = widened(narrowed.codes, clips, bias, unsound, x.dtype)
    seen = _largest(sums) * (clip * clip_weight / MOST**2)
    return y, Passed((codes, beyond, of_weight, clip, clip_weight, narrowed.beyond, seen))


def _largest(sums: torch.Tensor) -> torch.Tensor:
    """(1,) float32, the largest of |sums|."""
    if not sums.numel():
        return torch.zeros(1, device=sums.device)
    low, high = torch.aminmax(sums)
    return torch.maximum(-low, high).float().reshape(1)


def _backward(
    slope: torch.Tensor, passed: Passed, geometry: Geometry, layer: Layer, wanted: tuple[bool, bool]
) -> Gradients:
    """Products in floating point of what was rounded; gradients pass where nothing was clipped."""
    codes, beyond, of_weight, clip, clip_weight, beyond_out, seen = passed.tensors
    assert codes is not None and beyond is not None and of_weight is not None
    assert clip is not None and clip_weight is not None
    unsigned = layer.options.inputs == "unsigned"
    if slope.dtype != torch.bfloat16:
        slope = slope.float()
    if beyond_out is not None:
        slope, _ = masked(slope, beyond_out)
    if seen is not None and bool(torch.isfinite(seen)) and bool(seen > 0):
        layer.kept["clip_out"] = torch.lerp(
            layer.kept["clip_out"].to(seen.device), seen.reshape(()), layer.options.speed
        )
    by_x = by_weight = None
    learned: dict[str, torch.Tensor] = {}
    if wanted[0]:
        by_x = (slope @ of_weight.to(slope.dtype)).float().mul_(clip_weight / MOST)
        by_x, ends = masked(geometry.back(by_x), beyond, codes, unsigned=unsigned)
        assert ends is not None
        learned["clip"] = ends.sum().reshape(1)
    if wanted[1]:
        by_weight = (slope.T @ geometry.matrix(codes).to(slope.dtype)).float()
        if unsigned:
            by_weight = (by_weight + MOST * slope.float().sum(0)[:, None]) / 2
        by_weight.mul_(clip / MOST)
    return by_x, by_weight, learned


def _arithmetic(layer: Layer, device: str) -> Arithmetic:
    forward = "int8 × int8 → int32" + (" → int8" if layer.options.outputs == "int8" else "")
    back = "float32 of rounded sides"
    return forward + lanes(device), back, back


def _learn(weight: torch.Tensor, options: Any) -> dict[str, torch.Tensor]:
    return {"clip": torch.zeros(1)}


LIGHTSEQ: Final = TrainingMethod(
    "lightseq",
    "Learned clips of what enters; sums become int8 before they leave; gradients in float where nothing was clipped.",
    "LightSeq, Wang et al., 2021, arXiv:2010.13887, and LightSeq2, 2022, arXiv:2110.05722",
    LightseqOptions,
    _forward,
    _backward,
    _arithmetic,
    _learn,
)
