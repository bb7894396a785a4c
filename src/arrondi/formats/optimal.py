"""The best scalar quantizers there are, and the limits no quantizer can pass: the yardstick for everything else.

Owns: `lloyd_max`, `optimal_uniform`, `ecsq`, `aciq_alpha`, `rate_distortion_bound`, for the two sources that weights
and activations resemble.  Uses: NumPy and SciPy, imported when a function is called; float64 throughout.

The source is always centred, of unit variance and independent from sample to sample; for another standard deviation s
multiply levels and steps by s and errors by s². Both densities are even, so everything is solved on the positive half
with the partial moments P = ∫f, M1 = ∫xf, M2 = ∫x²f of each cell.

Sources: Lloyd 1957/1982 and Max 1960 (nearest level, level = centroid of its cell); Panter and Dite 1951 (start and
asymptote: (∫f^⅓)³ / 12N²); Gish and Pierce 1968 (a uniform grid with an entropy coder loses 1.53 dB); Shannon 1959
(lower bound); Banner et al. 2018, arXiv:1810.05723 (clipping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from arrondi.errors import SchemeError, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

Distribution = Literal["gaussian", "laplace"]

_MAX_BITS: Final = 12
"""Largest size that the solvers are tested for; the error at 12 bits still has eight correct digits."""


class LloydMax(NamedTuple):
    """The least-squares quantizer of a given size."""

    levels: tuple[float, ...]  # 2^bits values, ascending, symmetric about zero; thresholds are the midpoints
    mse: float


class UniformGrid(NamedTuple):
    """The best evenly spaced levels, saturating at both ends."""

    step: float
    max_level: float  # the outermost level; the outermost cell has no outer end
    mse: float


class EntropyCoded(NamedTuple):
    """An endless even grid whose codes take `rate` bits on average after an ideal entropy coder."""

    step: float
    mse_midpoint: float  # decoding to the middle of the cell: plain rounding
    mse_centroid: float  # decoding to the mean of the cell: the best decoder


def lloyd_max(distribution: Distribution, bits: int) -> LloydMax:
    """The quantizer with 2^bits free levels that has the least mean squared error.

    Lloyd's alternation from the compander's levels, then Newton's method on its fixed-point equation: plain alternation
    needs four times as many steps for every further bit.

    Args:
        distribution: "gaussian" or "laplace", unit variance.
        bits: 1 to 12.

    Returns:
        (levels, mse): all 2^bits levels in ascending order, and the mean squared error relative to the variance.

    Raises:
        SchemeError: an unknown distribution, or bits out of range.

    Source: Lloyd 1957/1982; Max 1960. The optimum is unique because both densities are log-concave.

    >>> levels, mse = lloyd_max("gaussian", 2)
    >>> [round(v, 4) for v in levels], round(mse, 4)
    ([-1.5104, -0.4528, 0.4528, 1.5104], 0.1175)
    """
    import numpy as np
    from scipy.linalg import solveh_banded

    source = _source(distribution)
    count = 2 ** (_whole("bits", bits, 1, _MAX_BITS) - 1)
    levels = source.compander((np.arange(count) + 0.5) / count)

    for _ in range(300):
        mass, first, _second = source.moments(*_cells(levels))
        levels = first / mass

    for _ in range(50 if count > 1 else 0):  # a lone level is its cell's centroid already
        low, high = _cells(levels)
        mass, first, _second = source.moments(low, high)
        half_gap = np.diff(levels) / 4 * source.density(high[:-1])  # how far a threshold's move changes both residuals
        band = np.zeros((2, count))
        band[0, 1:] = -half_gap
        band[1] = mass
        band[1, 1:] -= half_gap
        band[1, :-1] -= half_gap
        step = solveh_banded(band, levels * mass - first)
        levels = levels - step
        if np.max(np.abs(step)) <= 1e-15 * levels[-1]:
            break

    mass, _first, _second = source.moments(*_cells(levels))
    return LloydMax((*(-levels[::-1]).tolist(), *levels.tolist()), 1 - 2 * float(np.sum(mass * levels**2)))


def optimal_uniform(distribution: Distribution, levels: int) -> UniformGrid:
    """The evenly spaced grid of `levels` values, symmetric about zero, that has the least mean squared error.

    An even count has no level at zero (mid-rise: ±½, ±1½ … steps), an odd count has one (mid-tread: the symmetric
    integer grid -qmax … qmax). Values beyond the ends saturate.

    Args:
        distribution: "gaussian" or "laplace", unit variance.
        levels: 1 to 4096; 1 is the lone level zero, whose error is the variance.

    Returns:
        (step, max_level, mse); the clipping point, half a step beyond the last level, is max_level + step / 2.

    Raises:
        SchemeError: an unknown distribution, or a number of levels out of range.

    >>> [round(v, 4) for v in optimal_uniform("gaussian", 15)]
    [0.3534, 2.4739, 0.0129]
    """
    import numpy as np
    from scipy.optimize import brentq

    source = _source(distribution)
    if _whole("levels", levels, 1, 2**_MAX_BITS) == 1:
        return UniformGrid(0.0, 0.0, 1.0)
    positions = np.arange(levels // 2) + (1.0 if levels % 2 else 0.5)  # of the positive levels, in steps

    def moments(step: float) -> tuple[Floats, Floats, Floats]:
        low = (positions - 0.5) * step
        return source.moments(low, np.append(low[1:], np.inf))

    def slope(step: float) -> float:  # ¼ of dMSE/dstep; moving thresholds contribute nothing, both sides err alike
        mass, first, _ = moments(step)
        return float(np.sum(positions * (positions * step * mass - first)))

    step = float(brentq(slope, 0.1 / levels, 4.0, xtol=1e-300, rtol=4 * np.finfo(float).eps))
    mass, first, second = moments(step)
    value = positions * step
    inner = source.moments(np.zeros(1), np.full(1, 0.5 * step))[2].sum() if levels % 2 else 0.0
    mse = 2 * float(inner + np.sum(second - 2 * value * first + value**2 * mass))
    return UniformGrid(step, float(value[-1]), mse)


def ecsq(distribution: Distribution, rate: float) -> EntropyCoded:
    """The endless even grid, zero among its levels, whose codes have an entropy of `rate` bits.

    Args:
        distribution: "gaussian" or "laplace", unit variance.
        rate: entropy of the codes in bits per value, 0.01 to 12.

    Returns:
        (step, mse_midpoint, mse_centroid).

    Raises:
        SchemeError: an unknown distribution, or a rate out of range.

    Source: Gish and Pierce 1968: at high rate the error is step² / 12, 1.533 dB above the bound.

    >>> [round(v, 4) for v in ecsq("laplace", 3)]
    [0.488, 0.0196, 0.019]
    """
    import numpy as np
    from scipy.optimize import brentq

    source = _source(distribution)
    if not 0.01 <= rate <= _MAX_BITS:
        raise SchemeError(f"The rate must lie between 0.01 and {_MAX_BITS} bits, got {rate}. Use another rate.")

    def moments(step: float) -> tuple[Floats, Floats, Floats, Floats]:
        """Level, P, M1, M2 of the cells at and above zero, the central one halved."""
        index = np.arange(math.ceil(source.support / step) + 1)
        return index * step, *source.moments(np.maximum(index - 0.5, 0) * step, (index + 0.5) * step)

    def entropy(step: float) -> float:
        mass = moments(step)[1]
        mass = np.append(
            mass[1:], mass[:1]
        )  # the outer cells come twice, the two halves of the central one are one cell
        nats = -2 * np.sum(_xlogx(mass[:-1])) - float(_xlogx(2 * mass[-1:])[0])
        return float(nats / math.log(2))

    log_step = brentq(lambda s: entropy(math.exp(s)) - rate, math.log(2.0 ** (-rate - 1)), math.log(64.0), xtol=1e-15)
    step = math.exp(float(log_step))
    level, mass, first, second = moments(step)
    midpoint = 2 * float(np.sum(second - 2 * level * first + level**2 * mass))
    kept = mass[1:] > 0
    centroid = 1 - 2 * float(np.sum(first[1:][kept] ** 2 / mass[1:][kept]))  # the central cell decodes to zero
    return EntropyCoded(step, midpoint, centroid)


def aciq_alpha(distribution: Distribution, bits: int) -> float:
    """The clipping point of the closed-form model: exact clipping error plus α² / (3·4^bits) of rounding noise.

    An approximation for a quick start; `optimal_uniform` is exact.

    Args:
        distribution: "gaussian" or "laplace".
        bits: 1 to 12.

    Returns:
        α in units of the density's own parameter, as the paper prints it: of σ for the Gaussian, and for the Laplace of
        b = E|x - mean| (**not** of its standard deviation √2·b).

    Raises:
        SchemeError: an unknown distribution, or bits out of range.

    Source: Banner et al. 2018, arXiv:1810.05723, equations 5 and 6.

    >>> round(aciq_alpha("laplace", 4), 4), round(aciq_alpha("gaussian", 4), 4)
    (5.0286, 2.5591)
    """
    return _source(distribution).clip(3.0 * 4.0 ** _whole("bits", bits, 1, _MAX_BITS))


def rate_distortion_bound(distribution: Distribution, rate: float) -> float:
    """Shannon's lower bound on the mean squared error at `rate` bits per value: 2^(2h) / (2πe) · 4^-rate.

    h is the differential entropy. For the Gaussian the bound is the rate-distortion function itself, 4^-rate; for the
    Laplace, 0.8653·4^-rate, it is approached as the rate grows and is not tight below about one bit.

    Args:
        distribution: "gaussian" or "laplace", unit variance.
        rate: bits per value, at least 0; fractions are fine.

    Raises:
        SchemeError: an unknown distribution, or a negative or non-finite rate.

    >>> rate_distortion_bound("gaussian", 4)
    0.00390625
    """
    source = _source(distribution)
    if not (math.isfinite(rate) and rate >= 0):
        raise SchemeError(f"The rate must be finite and at least 0, got {rate}. Give bits per value.")
    return source.entropy_power * 4.0**-rate


def _cells(levels: Floats) -> tuple[Floats, Floats]:
    """Both ends of each cell of the positive half: 0, the midpoints, infinity."""
    import numpy as np

    middles = (levels[1:] + levels[:-1]) / 2
    return np.concatenate(([0.0], middles)), np.concatenate((middles, [np.inf]))


def _gaussian_density(x: Floats) -> Floats:
    import numpy as np

    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _gaussian_moments(low: Floats, high: Floats) -> tuple[Floats, Floats, Floats]:
    import numpy as np
    from scipy.special import ndtr

    f_low, f_high = _gaussian_density(low), _gaussian_density(high)
    mass = ndtr(-low) - ndtr(-high)  # survival functions: the tail keeps its digits
    edge = low * f_low - np.where(np.isinf(high), 0.0, high) * f_high
    return mass, f_low - f_high, mass + edge


def _gaussian_compander(share: Floats) -> Floats:
    """Quantiles of |x| under f^⅓, a Gaussian √3 times as wide."""
    from scipy.special import ndtri

    return math.sqrt(3) * ndtri(0.5 + share / 2)


def _gaussian_clip(weight: float) -> float:
    from scipy.optimize import brentq
    from scipy.special import erfc

    def slope(alpha: float) -> float:  # half the derivative of the model error
        tail = erfc(alpha / math.sqrt(2))
        return float(alpha * tail - math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2) + alpha / weight)

    return float(brentq(slope, 1e-3, 20.0, xtol=1e-15))


_RATE: Final = math.sqrt(2)
"""Rate of the unit-variance Laplace density ½·√2·exp(-√2·|x|)."""


def _laplace_density(x: Floats) -> Floats:
    import numpy as np

    return _RATE / 2 * np.exp(-_RATE * x)


def _laplace_moments(low: Floats, high: Floats) -> tuple[Floats, Floats, Floats]:
    import numpy as np

    def tail(x: Floats) -> tuple[Floats, Floats, Floats]:
        """P, M1, M2 of everything beyond x."""
        e = np.exp(-_RATE * x) / 2
        x = np.where(np.isinf(x), 0.0, x)
        return e, e * (x + 1 / _RATE), e * (x**2 + 2 * x / _RATE + 2 / _RATE**2)

    (p, m1, m2), (q, n1, n2) = tail(low), tail(high)
    return p - q, m1 - n1, m2 - n2


def _laplace_compander(share: Floats) -> Floats:
    """Quantiles of |x| under f^⅓, a Laplace three times as wide."""
    import numpy as np

    return -3 / _RATE * np.log1p(-share)


def _laplace_clip(weight: float) -> float:
    """The minimum of 2·exp(-α) + α²/weight lies where α·exp(α) = weight."""
    from scipy.special import lambertw

    return float(lambertw(weight).real)


def _xlogx(p: Floats) -> Floats:
    from scipy.special import xlogy

    return xlogy(p, p)


@dataclass(frozen=True, slots=True)
class _Source:
    """A density on the positive half line (its mirror image is understood), as the functions that the solvers need."""

    density: Callable[[Floats], Floats]
    moments: Callable[[Floats, Floats], tuple[Floats, Floats, Floats]]  # (low, high) → P, M1, M2 of each cell
    compander: Callable[[Floats], Floats]  # quantile of |x| under the density f^⅓, share in (0, 1)
    clip: Callable[[float], float]  # minimum of the clipping error plus α²/weight
    entropy_power: float  # 2^(2h) / (2πe); the variance itself for a Gaussian
    support: float  # beyond it lies less than 1e-22 of the probability


_SOURCES: Final[Mapping[str, _Source]] = MappingProxyType(
    {
        "gaussian": _Source(_gaussian_density, _gaussian_moments, _gaussian_compander, _gaussian_clip, 1.0, 10.0),
        "laplace": _Source(
            _laplace_density, _laplace_moments, _laplace_compander, _laplace_clip, math.e / math.pi, 36.0
        ),
    }
)


def _source(distribution: str) -> _Source:
    if distribution not in _SOURCES:
        raise unknown("distribution", distribution, _SOURCES)
    return _SOURCES[distribution]


def _whole(what: str, value: int, low: int, high: int) -> int:
    if not (isinstance(value, int) and low <= value <= high):
        raise SchemeError(
            f"{what} must be a whole number from {low} to {high}, got {value!r}. Use a value in that range."
        )
    return value
