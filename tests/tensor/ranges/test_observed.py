"""Static grids against compressed-tensors' own `calculate_qparams` and `generate_gparam`, and what their rounding gives."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam

from arrondi.calibration import OBSERVERS
from arrondi.errors import DataError, SchemeError
from arrondi.formats import PRESETS, ActivationScheme, Scheme, parse_scheme
from arrondi.tensor.nearest import fake_quantize
from arrondi.tensor.ranges.grid import Grid
from arrondi.tensor.ranges.observed import grid_from_range, static_grid

RANGES = [(-3.0, 5.0), (-7.25, 0.125), (0.0, 6.0), (-4.0, 0.0), (0.5, 2.0), (-3.0, -1.0), (-1e-6, 1e-6), (-1e4, 3e3)]


def inputs(text: str) -> ActivationScheme:
    found = parse_scheme(f"w=int8/channel,a={text}").inputs
    assert found is not None
    return found


def x_in(low: float, high: float, seed: int = 0) -> torch.Tensor:
    """(4, 64) values that reach both ends and, as later inputs do, lie beyond them."""
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    x[0, 0], x[0, 1], x[3, 0], x[3, 1] = low, high, 2 * low, 2 * high
    return x


THEIRS = {
    "int8/tensor/static": QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=True),
    "int8/tensor/asym/static": QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False),
    "int4/tensor/static": QuantizationArgs(num_bits=4, type="int", strategy="tensor", symmetric=True),
    "fp8/tensor/static": QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True),
}


@pytest.mark.parametrize("text", THEIRS)
def test_a_static_grid_is_that_of_compressed_tensors(text: str) -> None:
    for low, high in RANGES:
        scale, zero = calculate_qparams(torch.tensor([low]), torch.tensor([high]), THEIRS[text])
        grid = static_grid(low, high, inputs(text))
        assert grid.scale.shape == ()
        assert float(grid.scale) == pytest.approx(float(scale), rel=2e-7), (low, high)
        assert (grid.zero_point is None) == ("asym" not in text)
        if grid.zero_point is not None:
            assert int(grid.zero_point) == int(zero)
        theirs = their_fake_quantize(x_in(low, high), scale, zero, THEIRS[text])
        ours = fake_quantize(x_in(low, high), inputs(text), grid)
        # The package adds the zero point before it rounds, so a tie may fall to the other side: one step.
        step = float(scale) * (1.001 if "int" in text else 0)
        assert bool(((ours - theirs).abs() <= theirs.abs() * 1e-6 + step).all())
        assert float(((ours - theirs).abs() > theirs.abs() * 1e-6).float().mean()) < 0.02


def test_the_outer_scale_of_nvfp4_is_that_of_compressed_tensors() -> None:
    scheme = PRESETS["NVFP4"].inputs
    assert scheme is not None
    args = PRESET_SCHEMES["NVFP4"]["input_activations"]
    for low, high in RANGES:
        grid = static_grid(low, high, scheme)
        assert float(grid.scale) == pytest.approx(max(-low, high) / (448 * 6), rel=2e-7)
        stored = 1 / grid.scale.reshape(1)
        assert float(stored) == pytest.approx(
            float(generate_gparam(torch.tensor([low]), torch.tensor([high]))), rel=2e-7
        )
        assert torch.equal(1 / (1 / grid.scale), grid.scale), "it survives being stored as a reciprocal"
        x = x_in(low, high)
        x[2, :16] = 0.0
        theirs_scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=stored)
        theirs = their_fake_quantize(x, theirs_scale, zero, args, global_scale=stored)
        ours = fake_quantize(x, scheme, grid)
        apart = (ours - theirs).abs() > theirs.abs() * 1e-5
        assert float(apart.float().mean()) < 0.02, "a tie of the float32 products may fall to the other side"
        assert torch.equal(ours[2, :16], torch.zeros(16))


@pytest.mark.parametrize("kind", sorted(OBSERVERS))
def test_every_observer_leads_to_a_grid(kind: str) -> None:
    """The bridge: batches → range → grid → rounding no worse than half a step where nothing is clipped."""
    options = {"qmin": -128, "qmax": 127, "symmetric": True} if kind in ("mse", "kl", "cosine") else {}
    observer = OBSERVERS[kind](**options)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    for batch in x.split(16):
        observer.observe(batch)
    low, high = observer.range()
    grid = static_grid(low, high, inputs("int8/tensor/static"))
    reach = float(torch.maximum(-low, high))
    assert float(grid.scale) == pytest.approx(reach / 127.5, rel=1e-6)
    inside = x.abs() <= reach
    back = fake_quantize(x, inputs("int8/tensor/static"), grid)
    assert float((back - x)[inside].abs().max()) <= float(grid.scale) / 2 * 1.0001
    assert bool((back[~inside].abs() >= reach * 0.98).all()), "what lies beyond is clipped to the end"


def test_a_range_for_each_channel() -> None:
    observer = OBSERVERS["min-max"](axis=-1)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-3, 1, 5, 1e3, 0, 2])
    observer.observe(x)
    scheme = ActivationScheme(parse_scheme("w=uint4/channel1/asym").weights, dynamic=False)
    grid = static_grid(*observer.range(), scheme)
    assert grid.scale.shape == (6,)
    wanted = (x.amax(0).clamp(min=0) - x.amin(0).clamp(max=0)) / 15
    assert torch.allclose(grid.scale[:4], wanted[:4], rtol=1e-6)
    assert float(grid.scale[4]) == 1.0, "a channel of zeros"
    back = fake_quantize(x, scheme, grid)
    assert bool(((back - x).abs() <= grid.scale * 0.5001 * (x != 0)).all())


@pytest.mark.parametrize(
    ("text", "low", "high", "scale"),
    [
        ("uint8/tensor/static", -1.0, 510.0, 2.0),  # unsigned without a zero point: nothing below zero
        ("ternary/tensor/static", -2.0, 3.0, 3.0),  # the range, not least squares of its two ends
        ("fp8_e5m2/tensor/static", -57344.0, 1.0, 1.0),
        ("fp4/tensor/e8m0/static", -12.0, 1.0, 2.0),
        ("nf4/tensor/static", -0.5, 0.25, 0.5),
    ],
)
def test_grids_of_other_formats(text: str, low: float, high: float, scale: float) -> None:
    assert float(static_grid(low, high, inputs(text)).scale) == scale


def test_an_offset_for_a_codebook() -> None:
    grid = grid_from_range(-1.0, 5.0, parse_scheme("w=nf4/tensor/offset").weights)
    assert grid.offset is not None
    assert (float(grid.scale), float(grid.offset)) == (3.0, 2.0)


def test_scales_are_rounded_to_their_storage() -> None:
    scheme = parse_scheme("w=int8/tensor/bfloat16").weights
    scale = grid_from_range(-1.0, 1.0, scheme).scale
    assert float(scale) == float(torch.tensor(1 / 127.5).bfloat16())


@pytest.mark.parametrize(
    ("low", "high", "text", "error", "words"),
    [
        (1.0, -1.0, "int8/tensor/static", DataError, "low ≤ high"),
        (math.nan, 1.0, "int8/tensor/static", DataError, "low ≤ high"),
        (0.0, math.inf, "int8/tensor/asym/static", DataError, "NaN or infinity"),
        (0.0, 1.0, "int8/tensor", SchemeError, "follow each tensor"),
    ],
)
def test_what_gives_no_grid(low: float, high: float, text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        static_grid(low, high, inputs(text))


def test_scales_that_are_quantized_together_need_more_than_a_range() -> None:
    with pytest.raises(SchemeError, match="quantized together"):
        grid_from_range(0.0, 1.0, PRESETS["NVFP4"].weights)


def test_a_grid_of_the_wrong_size_is_refused() -> None:
    from arrondi.errors import ShapeError

    scheme = Scheme(parse_scheme("w=int8/tensor").weights.format, parse_scheme("w=int8/channel").weights.granularity)
    with pytest.raises(ShapeError, match=r"^layer: .*needs a grid of shape \(4, 1\).*got \(3,\)"):
        fake_quantize(torch.ones(4, 8), scheme, Grid(torch.ones(3)), name="layer")
