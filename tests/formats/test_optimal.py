"""Optimal scalar quantizers against the published tables, quadrature and the optimality conditions themselves.

The tables were computed elsewhere (fixed-point and Newton iterations, checked by quadrature) and printed with a fixed
number of digits: we ask for agreement to 1e-6, or to half a unit of the last printed digit where fewer are printed.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from arrondi.errors import SchemeError
from arrondi.formats.optimal import aciq_alpha, ecsq, lloyd_max, optimal_uniform, rate_distortion_bound

SOURCES = {"gaussian": stats.norm(), "laplace": stats.laplace(scale=1 / math.sqrt(2))}
BOTH = pytest.mark.parametrize("distribution", list(SOURCES))

# bits: Lloyd-Max MSE, dB, entropy | even uniform MSE, dB, step, entropy | odd uniform (2^b - 1) MSE, dB, largest level
GAUSSIAN = """
1 0.3633802    4.396 1.0000 0.3633802    4.396 1.595769 1.0000 1            0     0
2 0.1174818    9.300 1.9111 0.1188461    9.250 0.995687 1.9037 0.1901740    7.208 1.22401
3 0.03454776  14.616 2.8249 0.03743966  14.267 0.586019 2.7606 0.04685997  13.292 1.95231
4 0.009501008 20.222 3.7653 0.01154288  19.377 0.335201 3.6024 0.01288939  18.898 2.47388
5 0.002504668 26.012 4.7298 0.003495211 24.565 0.188139 4.4493 0.003693220 24.326 2.89873
6 6.442397e-4 31.910 5.7101 1.040045e-3 29.829 0.104063 5.3087 1.069289e-3 29.709 3.27012
7 1.634782e-4 37.865 6.6996 3.043328e-4 35.167 0.056868 6.1823 3.086218e-4 35.106 3.60746
8 4.118508e-5 43.853 7.6941 8.768619e-5 40.571 0.030762 7.0694 8.830803e-5 40.540 3.92050
"""
# the same without entropies
LAPLACE = """
1 0.5000000    3.010 0.5000000    3.010 1.414214 1            0     0
2 0.1761949    7.540 0.1963023    7.071 1.087393 0.2642411    5.780 1.41421
3 0.05447599  12.638 0.07174780  11.442 0.730933 0.08308652  10.805 2.46526
4 0.01537253  18.133 0.02535097  15.960 0.460995 0.02739522  15.623 3.40819
5 0.004102180 23.870 0.008713221 20.598 0.279989 0.009085129 20.417 4.31196
6 0.001060952 29.743 0.002913431 25.356 0.165681 0.002979515 25.259 5.20331
7 2.698738e-4 35.688 9.485970e-4 30.229 0.096099 9.599429e-4 30.178 6.09373
8 6.806174e-5 41.671 3.014203e-4 35.208 0.054844 3.033017e-4 35.181 6.98809
"""
# positive half of the Lloyd-Max levels at 1 to 4 bits
LEVELS = {
    "gaussian": [
        "0.797885",
        "0.452780 1.510418",
        "0.245094 0.756005 1.343909 2.151946",
        "0.128395 0.388048 0.656759 0.942340 1.256231 1.618046 2.069017 2.732590",
    ],
    "laplace": [
        "0.707107",
        "0.419756 1.833969",
        "0.233401 0.832962 1.672473 3.086687",
        "0.123986 0.404839 0.728650 1.110984 1.577786 2.177347 3.016858 4.431072",
    ],
}
# optimal clipping of the closed-form model at 2 to 8 bits
ACIQ = {
    "laplace": "2.8307 3.8972 5.0286 6.2048 7.4131 8.6456 9.8968",
    "gaussian": "1.7106 2.1516 2.5591 2.9362 3.2869 3.6151 3.9240",
}
# rate: Gaussian step, centroid MSE, gaps to the bound in dB (midpoint, centroid) | the same for Laplace
ECSQ = """
0.5 3.45618 0.6173367   1.841 0.916 3.52216 0.4880347   1.306 0.523
1   2.42162 0.3483386   2.725 1.441 2.22349 0.2649921   1.672 0.881
2   1.08245 0.08894122  1.938 1.532 1.01071 0.07367494  1.718 1.343
3   0.52243 0.02223883  1.631 1.533 0.48795 0.01902037  1.606 1.483
4   0.25902 5.559723e-3 1.557 1.533 0.24129 4.795862e-3 1.555 1.520
5   0.12924 1.389931e-3 1.539 1.533 0.12027 1.201686e-3 1.539 1.529
6   0.06459 3.474827e-4 1.534 1.533 0.06008 3.006000e-4 1.535 1.532
8   0.01614 2.171767e-5 1.533 1.533 0.01502 1.879110e-5 1.533 1.533
"""


def agrees(value: float, printed: str) -> bool:
    """Within 1e-6 of the printed number, or within half a unit of its last digit where that is coarser."""
    mantissa, _, exponent = printed.partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(value - float(printed)) <= max(1e-6 * abs(float(printed)), 0.500001 * 10.0**-digits)


def decibels(mse: float) -> float:
    return -10 * math.log10(mse) + 0.0


def entropy_of(distribution: str, levels: tuple[float, ...]) -> float:
    """Bits per code of a nearest-level quantizer, from SciPy's distribution functions."""
    source = SOURCES[distribution]
    borders = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    lower = np.diff(np.concatenate(([0.0], source.cdf(borders[borders <= 0]))))  # each tail by its own function
    upper = -np.diff(np.concatenate((source.sf(borders[borders >= 0]), [0.0])))
    masses = np.concatenate((lower, [] if 0.0 in borders else [1 - lower.sum() - upper.sum()], upper))
    assert len(masses) == len(levels)
    return float(-np.sum(masses * np.log2(masses)))


def grid(step: float, count: int) -> tuple[float, ...]:
    return tuple((np.arange(count) - (count - 1) / 2) * step)


def mse_by_quadrature(distribution: str, levels: tuple[float, ...]) -> float:
    source = SOURCES[distribution]
    borders = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]
    total = 0.0
    for level, low, high in zip(levels, borders, borders[1:], strict=False):
        cuts = [c for c in (-12.0, 0.0, 12.0) if low < c < high]  # the cusp, and where the tail ends
        pieces = [low, *cuts, high]
        for a, b in itertools.pairwise(pieces):
            total += integrate.quad(lambda x, r=level: (x - r) ** 2 * source.pdf(x), a, b, epsabs=1e-15, epsrel=1e-12)[
                0
            ]
    return total


def test_agrees_measures_the_last_printed_digit():
    assert agrees(0.03454776079, "0.03454776")
    assert not agrees(0.0345479, "0.03454776")
    assert agrees(9.7e-6, "9.70e-6") and not agrees(9.71e-6, "9.70e-6")


@pytest.mark.parametrize("row", GAUSSIAN.strip().splitlines(), ids=lambda row: f"{row[0]}bit")
def test_gaussian_table(row):
    bits, mse, sqnr, entropy, even_mse, even_sqnr, step, even_entropy, odd_mse, odd_sqnr, largest = row.split()
    count = 2 ** int(bits)
    best, even, odd = (
        lloyd_max("gaussian", int(bits)),
        optimal_uniform("gaussian", count),
        optimal_uniform("gaussian", count - 1),
    )
    assert agrees(best.mse, mse) and agrees(decibels(best.mse), sqnr)
    assert agrees(entropy_of("gaussian", best.levels), entropy)
    assert agrees(even.mse, even_mse) and agrees(decibels(even.mse), even_sqnr) and agrees(even.step, step)
    assert agrees(entropy_of("gaussian", grid(even.step, count)), even_entropy)
    assert agrees(odd.mse, odd_mse) and agrees(decibels(odd.mse), odd_sqnr) and agrees(odd.max_level, largest)


@pytest.mark.parametrize("row", LAPLACE.strip().splitlines(), ids=lambda row: f"{row[0]}bit")
def test_laplace_table(row):
    bits, mse, sqnr, even_mse, even_sqnr, step, odd_mse, odd_sqnr, largest = row.split()
    count = 2 ** int(bits)
    best, even, odd = (
        lloyd_max("laplace", int(bits)),
        optimal_uniform("laplace", count),
        optimal_uniform("laplace", count - 1),
    )
    assert agrees(best.mse, mse) and agrees(decibels(best.mse), sqnr)
    assert agrees(even.mse, even_mse) and agrees(decibels(even.mse), even_sqnr) and agrees(even.step, step)
    assert agrees(odd.mse, odd_mse) and agrees(decibels(odd.mse), odd_sqnr) and agrees(odd.max_level, largest)


@BOTH
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_max_levels_are_the_published_codebooks(distribution, bits):
    levels = lloyd_max(distribution, bits).levels
    printed = LEVELS[distribution][bits - 1].split()
    assert len(levels) == 2**bits
    assert all(agrees(v, p) for v, p in zip(levels[len(printed) :], printed, strict=True))


@BOTH
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_ascend_and_are_symmetric(distribution, bits):
    levels = np.array(lloyd_max(distribution, bits).levels)
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_array_equal(levels, -levels[::-1])


@BOTH
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_errors_are_those_of_quadrature(distribution, bits):
    best = lloyd_max(distribution, bits)
    assert best.mse == pytest.approx(mse_by_quadrature(distribution, best.levels), rel=1e-9)
    for count in (2**bits, 2**bits + 1):
        even = optimal_uniform(distribution, count)
        levels = grid(even.step, count)
        assert even.max_level == pytest.approx(levels[-1], rel=1e-14)
        assert even.mse == pytest.approx(mse_by_quadrature(distribution, levels), rel=1e-9)


@BOTH
def test_every_lloyd_max_level_is_the_centroid_of_its_cell(distribution):
    source, levels = SOURCES[distribution], lloyd_max(distribution, 4).levels
    borders = [-np.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), np.inf]
    for level, low, high in zip(levels, borders, borders[1:], strict=False):
        low, high = max(low, -40.0), min(high, 40.0)
        mass = integrate.quad(source.pdf, low, high, epsabs=1e-16)[0]
        mean = integrate.quad(lambda x: x * source.pdf(x), low, high, epsabs=1e-16)[0] / mass
        assert level == pytest.approx(mean, rel=1e-8)


@BOTH
@pytest.mark.parametrize("count", [2, 3, 8, 15])
def test_uniform_step_is_the_minimum_of_a_direct_search(distribution, count):
    best = optimal_uniform(distribution, count)
    steps = np.linspace(0.3, 2.5, 23) * best.step  # away from the optimum nothing is lower, so it is the global one
    assert all(mse_by_quadrature(distribution, grid(s, count)) >= best.mse * (1 - 1e-9) for s in steps)
    found = optimize.minimize_scalar(
        lambda s: mse_by_quadrature(distribution, grid(s, count)),
        bounds=(0.8 * best.step, 1.2 * best.step),
        method="bounded",
    )
    assert found.x == pytest.approx(best.step, rel=1e-4)


@BOTH
def test_errors_fall_with_every_bit_and_stay_between_the_bounds(distribution):
    best = [lloyd_max(distribution, b).mse for b in range(1, 9)]
    even = [optimal_uniform(distribution, 2**b).mse for b in range(1, 9)]
    assert all(a > b for a, b in itertools.pairwise(best))
    assert all(a > b for a, b in itertools.pairwise(even))
    for bits, (free, uniform) in enumerate(zip(best, even, strict=True), start=1):
        assert rate_distortion_bound(distribution, bits) < free <= uniform * (1 + 1e-12)
        assert (free < uniform * 0.999) == (bits > 1)  # with two levels every symmetric quantizer is uniform


@pytest.mark.parametrize(
    "distribution, constant, at_8_bits", [("gaussian", math.sqrt(3) * math.pi / 2, 2.6991), ("laplace", 4.5, 4.4605)]
)
def test_panter_dite_asymptote(distribution, constant, at_8_bits):
    scaled = [lloyd_max(distribution, b).mse * 4**b for b in (8, 10, 12)]
    assert scaled[0] == pytest.approx(at_8_bits, abs=5e-5)
    gaps = [constant - s for s in scaled]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 1e-3 * constant


@BOTH
def test_a_million_samples_have_the_predicted_error(distribution):
    x = SOURCES[distribution].rvs(1_000_000, random_state=np.random.default_rng(5))
    levels, mse = lloyd_max(distribution, 3)
    nearest = np.array(levels)[np.searchsorted((np.array(levels[1:]) + np.array(levels[:-1])) / 2, x)]
    squared = (x - nearest) ** 2
    assert abs(squared.mean() - mse) < 4 * squared.std() / 1000
    product = (x - nearest) * nearest  # the error of a centroid quantizer is uncorrelated with its output
    assert abs(product.mean()) < 4 * product.std() / 1000


@pytest.mark.parametrize("row", ECSQ.strip().splitlines(), ids=lambda row: f"rate{row.split()[0]}")
@BOTH
def test_entropy_coded_table(row, distribution):
    rate, *columns = row.split()
    step, mse, gap_midpoint, gap_centroid = columns[:4] if distribution == "gaussian" else columns[4:]
    found = ecsq(distribution, float(rate))
    bound = rate_distortion_bound(distribution, float(rate))
    assert agrees(found.step, step) and agrees(found.mse_centroid, mse)
    assert agrees(10 * math.log10(found.mse_midpoint / bound), gap_midpoint)
    assert agrees(10 * math.log10(found.mse_centroid / bound), gap_centroid)


@BOTH
@pytest.mark.parametrize("rate", [0.1, 1.5, 3.0])
def test_entropy_coded_grid_has_the_asked_rate_and_errors(distribution, rate):
    found = ecsq(distribution, rate)
    half = math.ceil(40 / found.step)
    levels = tuple(found.step * k for k in range(-half, half + 1))
    source = SOURCES[distribution]
    index = np.arange(half + 1)
    tail = source.sf((index - 0.5) * found.step)
    masses = tail[1:-1] - tail[2:]
    masses = np.concatenate((masses, masses, [1 - 2 * tail[1]]))
    masses = masses[masses > 0]
    assert -np.sum(masses * np.log2(masses)) == pytest.approx(rate, rel=1e-9)
    assert found.mse_midpoint == pytest.approx(mse_by_quadrature(distribution, levels), rel=1e-7)
    assert found.mse_centroid < found.mse_midpoint


@BOTH
def test_entropy_coding_approaches_a_gap_of_1_533_decibels(distribution):
    gap = 10 * math.log10(ecsq(distribution, 10).mse_centroid / rate_distortion_bound(distribution, 10))
    assert gap == pytest.approx(10 * math.log10(math.pi * math.e / 6), abs=1e-4)


@pytest.mark.parametrize("rate", [1, 2, 3, 4])
def test_entropy_coded_uniform_beats_fixed_rate_lloyd_max(rate):
    assert ecsq("gaussian", rate).mse_centroid < lloyd_max("gaussian", rate).mse


@BOTH
def test_aciq_table(distribution):
    assert all(agrees(aciq_alpha(distribution, b), p) for b, p in enumerate(ACIQ[distribution].split(), start=2))


@BOTH
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aciq_is_the_minimum_of_its_model(distribution, bits):
    """The clipping error by quadrature plus the paper's noise term, minimised blindly."""
    pdf = stats.norm().pdf if distribution == "gaussian" else stats.laplace().pdf

    def model(alpha: float) -> float:
        clipped = 2 * integrate.quad(lambda x: (x - alpha) ** 2 * pdf(x), alpha, alpha + 40, epsabs=1e-14)[0]
        return clipped + alpha**2 / (3 * 4**bits)

    found = optimize.minimize_scalar(model, bounds=(0.5, 15), method="bounded", options={"xatol": 1e-7})
    assert aciq_alpha(distribution, bits) == pytest.approx(found.x, rel=1e-4)


def test_aciq_approximates_the_exact_clipping_point_of_the_even_grid():
    exact = [2**b * optimal_uniform("gaussian", 2**b).step / 2 for b in range(2, 9)]
    assert [round(v, 3) for v in exact] == [1.991, 2.344, 2.682, 3.010, 3.330, 3.640, 3.938]
    assert all(aciq_alpha("gaussian", b) < a for b, a in enumerate(exact, start=2))
    assert aciq_alpha("gaussian", 8) == pytest.approx(exact[-1], rel=0.01)


@BOTH
def test_bound_is_the_entropy_power(distribution):
    entropy = float(SOURCES[distribution].entropy())  # nats
    for rate in (0, 0.5, 4):
        expected = math.exp(2 * entropy) / (2 * math.pi * math.e) * 4**-rate
        assert rate_distortion_bound(distribution, rate) == pytest.approx(expected, rel=1e-12)
    assert rate_distortion_bound("laplace", 0) == pytest.approx(0.8653, abs=5e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lloyd_max("gausian", 2), "Did you mean 'gaussian'"),
        (lambda: lloyd_max("gaussian", 0), "bits must be a whole number from 1 to 12, got 0"),
        (lambda: lloyd_max("gaussian", 2.5), "got 2.5"),
        (lambda: optimal_uniform("laplace", 5000), "levels must be a whole number from 1 to 4096"),
        (lambda: ecsq("laplace", 0.0), "rate must lie between 0.01 and 12 bits, got 0.0"),
        (lambda: ecsq("laplace", math.nan), "got nan"),
        (lambda: aciq_alpha("laplace", 40), "got 40"),
        (lambda: rate_distortion_bound("gaussian", -1.0), "at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(SchemeError, match=message):
        call()


def test_importing_the_module_loads_neither_numpy_nor_scipy():
    code = "import sys, arrondi.formats.optimal as m; sys.exit(bool({'scipy', 'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
