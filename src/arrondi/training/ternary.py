"""Weights of three values, with straight-through gradients: pure functions on tensors.

Owns: `Ternary`, `twn`, `absmean`, `twn_weight`, `bitnet_weight`, `terdit_weight`, `alpha_at_first`, `token_int8`.

Sources: Li, Zhang, Liu 2016, arXiv:1605.04711 (TWN); Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58); Lu et al. 2024,
arXiv:2405.14854 (TerDiT). Each gives scale · T exactly as the packed weight reads back: a weight of the format `ternary` whose
largest magnitudes are all equal keeps its codes and its scale when it is rounded again.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, NamedTuple

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.formats import ActivationScheme, PerToken, get_format
from arrondi.formats.scheme import Scheme
from arrondi.nn.straight import straight
from arrondi.tensor.checks import check_tensor
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.ranges.fits import FITS

EPS: Final = 1e-6
"""Added to a mean magnitude before anything is divided by it."""

TOKEN_INT8: Final = ActivationScheme(Scheme(get_format("int8"), PerToken()))
"""How BitNet rounds what enters a layer."""


class Ternary(NamedTuple):
    """A ternary tensor.

    Attributes:
        codes: -1, 0 and 1 in the shape and dtype of the weight.
        scale: (m, 1) for each row of a weight (m, …), flattened; (1, 1) for all of it.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """scale · codes."""
        return (self.codes.flatten(1) * self.scale).view_as(self.codes)


@torch.compiler.disable(reason="arguments are checked, and sorting is not worth a graph")
@torch.no_grad()
def twn(
    weight: torch.Tensor, threshold: Annotated[float, Between(0.0, 10.0)] | None = None, *, rows: bool = True
) -> Ternary:
    """{-a, 0, a} near a weight: 0 up to the threshold, and the mean magnitude of the others.

    Args:
        weight: (m, …), float.
        threshold: in mean magnitudes, 0.7 in the paper, 0.75 later; None: the k largest that maximise (their sum)²/k, which
            is the least squared error, by sorting.
        rows: a scale for each row; else one for all of the weight.

    Raises:
        DataError: the weight is no tensor of floats.
        SchemeError: the threshold is no number from 0 to 10.
    """
    check_arguments(twn, {**locals(), "weight": check_tensor(weight, "weight")})
    flat = weight.detach().flatten(1) if rows else weight.detach().reshape(1, -1)
    size = flat.abs()
    if threshold is None:
        scale = FITS["least-squares"](flat.float(), get_format("ternary")).to(weight.dtype)
        kept = size > scale / 2  # of the best k, exactly those: another would join or leave the sum otherwise
    else:
        kept = size > threshold * size.mean(dim=1, keepdim=True)
        count = kept.sum(dim=1, keepdim=True).clamp(min=1)
        scale = ((size * kept).sum(dim=1, keepdim=True, dtype=torch.float64) / count).to(weight.dtype)
    return Ternary((flat.sign() * kept).view_as(weight), scale)


@torch.no_grad()
def absmean(weight: torch.Tensor, eps: float = EPS) -> Ternary:
    """BitNet's and TerDiT's ternary weight: rn(w / (γ + eps)) held to ±1, times γ = mean |w| of the whole weight.

    Args:
        weight: any shape with at least one axis, float.
    """
    gamma = weight.detach().abs().mean(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
    codes = torch.round(weight.detach() / (gamma + eps)).clamp_(-1, 1).to(weight.dtype)
    return Ternary(codes, gamma.to(weight.dtype).reshape(1, 1))


def twn_weight(weight: torch.Tensor, threshold: float | None = None, *, rows: bool = True) -> torch.Tensor:
    """a·T of `twn`; gradients go to the weight as they are."""
    return straight(weight, twn(weight, threshold, rows=rows).value)


def bitnet_weight(weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """γ·T of `absmean`; gradients go to the weight as they are."""
    return straight(weight, absmean(weight, eps).value)


def terdit_weight(weight: torch.Tensor, alpha: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """α·T with T of `absmean` and a learned α of one number: ∂L/∂w = α·G, ∂L/∂α = ⟨G, T⟩."""
    return alpha * straight(weight, absmean(weight, eps).codes)


def alpha_at_first(weight: torch.Tensor) -> torch.Tensor:
    """What TerDiT's α starts from: mean |w|, or that of PyTorch's own initialisation, 1/(2·√n), where the weight is all zero.

    With α = 0 and T = 0, as γ would give for the modulation of adaLN-Zero, neither would ever have a gradient.
    """
    gamma = weight.detach().abs().mean()
    usual = 0.5 / math.sqrt(max(weight[0].numel(), 1))
    return torch.where(gamma > 0, gamma, torch.full_like(gamma, usual)).reshape(1)


def token_int8(x: torch.Tensor) -> torch.Tensor:
    """x (…, n) as int8 with a scale for each token reads back; gradients pass as they are.

    The step is max|x| / 127.5, as arrondi rounds the inputs of packed layers everywhere, so that training and inference agree bit for bit;
    the paper divides by 127.
    """
    return straight(x, fake_quantize(x.detach(), TOKEN_INT8.scheme, name="inputs"))
