"""HQQ: choose the grid of each group so that the error is sparse rather than small; needs no calibration data.

Owns: `hqq`. It minimises Σ |w - ŵ|^p, p < 1, by half-quadratic splitting: alternate a shrinkage of the error with a closed-form
update of the grid, which for the published method is the float zero point.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (technical report).
Ours beyond the paper: with an integer zero point, or none, the scale is what moves, updated by least squares (rounding the
best float zero point would nearly always give the first one back). The paper's shrinkage ignores the weights' magnitude,
so on typical weights (|w| ≈ 0.02) it never fires; `normalize=True` measures errors in steps, where it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch

from arrondi.arguments import Between, check_arguments
from arrondi.calibration import SecondMoment
from arrondi.errors import SchemeError
from arrondi.formats import Scheme, tile_shape
from arrondi.tensor.checks import SchemeLike, check_tensor, named, scheme_of
from arrondi.tensor.encoding import decode, encode
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.quantizers import split as split_compiled
from arrondi.tensor.ranges.fits import fit
from arrondi.tensor.ranges.grid import STORED, Grid, round_offset, round_scale
from arrondi.tensor.tiling import to_tiles

_CHUNK = 1 << 18


def refuse_hqq(scheme: Scheme, options: Mapping[str, Any] | None = None) -> str | None:
    """Why no weight can be rounded so; None if it can."""
    plain = scheme.scale in STORED and scheme.offset in STORED
    if scheme.format.kind == "integer" and plain and scheme.apart is None:
        return None
    return f"hqq optimises integer grids with plain scales and offsets, got {scheme}. Use rtn or gptq for this scheme."


def hqq(
    weight: torch.Tensor,
    scheme: SchemeLike,
    moment: SecondMoment | None = None,
    *,
    p: Annotated[float, Between(0.01, 1)] = 0.7,
    beta: Annotated[float, Between(1e-6, 1e6)] = 10.0,
    kappa: Annotated[float, Between(1, 100)] = 1.01,
    iterations: Annotated[int, Between(0, 100_000)] = 20,
    normalize: bool = False,
    name: str = "weight",
    facts: dict[str, Any] | None = None,
) -> QTensor:
    """Round with the grid that half-quadratic splitting finds for each group.

    Args:
        weight: (..., K), any float dtype, finite.
        scheme: an integer format; with zero_point="float" this is the published method.
        moment: not used; accepted so that every method is called alike.
        p: exponent of the error norm, in (0, 1].
        beta, kappa: weight of the quadratic coupling and its growth at every iteration.
        iterations: at most this many; a group stops when its mean absolute error no longer falls.
        normalize: measure errors in steps of the grid (see above); the default is the published behaviour.
        name: for messages.
        facts: not used; accepted so that every method is called alike.

    Raises:
        SchemeError: the format is not an integer one, or its scales are quantized or powers of two.
        DataError: NaN or infinity in the weight.
    """
    with named(name):
        check_arguments(hqq, {**locals(), "weight": check_tensor(weight, name), "scheme": scheme_of(scheme)})
    scheme = scheme_of(scheme)
    refusal = refuse_hqq(scheme)
    if refusal:
        raise SchemeError(f"{name}: {refusal}")
    if weight.numel() == 0:
        return quantize_tensor(weight, scheme, name=name)
    weight = weight.detach()
    grid = split_compiled(weight, scheme, p=p, beta=beta, kappa=kappa, iterations=iterations, normalize=normalize)
    if grid is None:
        with named(name):
            grid = split_reference(weight, scheme, _Solver(scheme, p, beta, kappa, iterations, normalize))
    return quantize_with(weight, scheme, grid, name=name)


def split_reference(weight: torch.Tensor, scheme: Scheme, solver: _Solver) -> Grid:
    """The slow reference of the compiled iteration; parts as (tiles, 1)."""
    tiles = to_tiles(weight, tile_shape(scheme.granularity, tuple(weight.shape)))
    step = max(_CHUNK // tiles.shape[1], 1)
    grids = [solver.solve(tiles[i : i + step].float()) for i in range(0, tiles.shape[0], step)]
    scale, zero, offset = (None if part[0] is None else torch.cat(part) for part in zip(*grids, strict=True))
    assert scale is not None
    return Grid(scale, zero, offset)


class _Solver:
    """The iteration on tiles (tiles, elements), each row by itself: the grid is ŵ = scale · (code - zero)."""

    def __init__(self, scheme: Scheme, p: float, beta: float, kappa: float, iterations: int, normalize: bool) -> None:
        self.scheme, self.p, self.beta, self.kappa, self.iterations, self.normalize = (
            scheme,
            p,
            beta,
            kappa,
            iterations,
            normalize,
        )

    def solve(self, tiles: torch.Tensor) -> Grid:
        first = fit(tiles, self.scheme)
        scale = first.scale
        if first.offset is not None:
            zero = -first.offset / scale
        else:
            zero = torch.zeros_like(scale) if first.zero_point is None else first.zero_point.float()
        best_scale, best_zero = scale.clone(), zero.clone()
        best = torch.full_like(scale, torch.inf)
        beta = self.beta
        active = torch.ones_like(scale, dtype=torch.bool)
        for _ in range(self.iterations + 1):
            codes = decode(encode((tiles / scale).add_(zero), self.scheme.format), self.scheme.format)
            residual = tiles - (codes - zero) * scale
            error = residual.abs().mean(dim=-1, keepdim=True)
            active &= error < best
            if not bool(active.any()):
                break
            best = torch.where(active, error, best)
            best_scale, best_zero = torch.where(active, scale, best_scale), torch.where(active, zero, best_zero)
            target = tiles - self._shrink(residual, scale, beta)
            if self.scheme.zero_point == "float":
                zero = (codes - target / scale).mean(dim=-1, keepdim=True)
            else:
                steps = codes - zero
                power = steps.square().sum(dim=-1, keepdim=True)
                fitted = (target * steps).sum(dim=-1, keepdim=True) / power.clamp(min=1)
                scale = torch.where((power > 0) & (fitted > 0), fitted, scale)
                scale = round_scale(scale, self.scheme.scale)
            beta *= self.kappa
        return self._grid(best_scale, best_zero)

    def _shrink(self, residual: torch.Tensor, scale: torch.Tensor, beta: float) -> torch.Tensor:
        """The proximal step of |·|^p: sign(d) · max(|d| - |d|^(p-1)/β, 0), zero at zero."""
        unit = scale if self.normalize else 1.0
        size = residual.abs() / unit
        threshold = size.clamp(min=1e-12).pow(self.p - 1) / beta
        return torch.sign(residual) * (size - threshold).clamp_(min=0) * unit

    def _grid(self, scale: torch.Tensor, zero: torch.Tensor) -> Grid:
        if self.scheme.symmetric:
            return Grid(scale)
        if self.scheme.zero_point == "float":
            return Grid(scale, offset=round_offset(-zero * scale, self.scheme.offset))
        return Grid(scale, zero_point=zero.int())
