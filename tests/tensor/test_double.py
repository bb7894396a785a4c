"""Double quantization of block scales, as QLoRA defines it: bits, errors, and the numbers of a plain computation."""

from __future__ import annotations

import pytest
import torch

from arrondi.errors import SchemeError, ShapeError
from arrondi.formats import FORMATS, PRESETS, PerFlat, PerRun, parse_scheme, scale_shape, tile_shape
from arrondi.tensor.nearest import quantize_tensor
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.rows import rows_of

PLAIN = {"NF4_DQ": "NF4", "FP4_BNB_DQ": "FP4_BNB"}


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("name", PLAIN)
def test_bits_and_errors_are_the_published_ones(name: str) -> None:
    w = gaussian(256, 4096)
    q, plain = quantize_tensor(w, name), quantize_tensor(w, PLAIN[name])
    assert plain.bits_per_weight == 4.5
    # 4 + 8/64 + 32/(64·256), the mean, and a bit of sign for every block of scales, which packs to a byte.
    assert q.bits_per_weight == pytest.approx(4.127, abs=0.001)
    scale = w.reshape(256, 64, 64).abs().amax(-1)
    assert float((q.real_scale - scale).norm() / scale.norm()) == pytest.approx(0.0020, rel=0.05)
    errors = [float((each.dequantize() - w).square().sum()) for each in (q, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("columns", [64, 256, 1024, 64 * 256, 64 * 6, 64 * 43])
def test_the_scales_are_those_of_a_plain_computation(columns: int) -> None:
    """Flattened blocks of 256 scales less their mean, each over its largest magnitude, nearest of 256 log-spaced levels."""
    rows = 16 if columns > 1024 else 256
    w = gaussian(rows, columns)
    q = quantize_tensor(w, "NF4_DQ")
    scale = w.reshape(rows, -1, 64).abs().amax(-1)
    mean = scale.double().mean().float()
    blocks = (scale - mean).reshape(-1).split(256)
    levels = torch.tensor(FORMATS["dynamic8"].values)
    back = []
    for block in blocks:
        largest = block.abs().max()
        nearest = ((block / largest).unsqueeze(1) - levels).abs().argmin(1)
        back.append(levels[nearest] * largest + mean)
    torch.testing.assert_close(q.real_scale.reshape(-1), torch.cat(back), rtol=1e-5, atol=0)


def test_codes_are_chosen_with_the_scale_that_is_read_back() -> None:
    w = gaussian(64, 256)
    q = quantize_tensor(w, "NF4_DQ")
    levels = torch.tensor(FORMATS["nf4"].values)
    nearest = ((w / q.real_scale.repeat_interleave(64, 1)).unsqueeze(-1) - levels).abs().argmin(-1)
    assert torch.equal(q.codes.long(), nearest)


def test_extreme_scales_stay_positive_and_the_rest_of_the_tensor_keeps_its_own() -> None:
    w = gaussian(64, 1024)
    w[0] = 0
    w[1] *= 1e4
    q = quantize_tensor(w, "NF4_DQ")
    assert bool((q.real_scale > 0).all())
    assert float(q.dequantize()[0].abs().max()) < 1e-2
    constant = quantize_tensor(torch.full((8, 256), 0.25), "NF4_DQ")
    torch.testing.assert_close(constant.dequantize(), torch.full((8, 256), 0.25), rtol=1e-5, atol=0)


def test_blocks_of_the_flattened_tensor_run_across_rows() -> None:
    x = gaussian(7, 30)
    scheme = parse_scheme("w=int8/g10/s:(int8/flat8)").weights
    q = quantize_tensor(x, scheme)
    assert isinstance(q.scale, QTensor) and isinstance(q.scale.scale, torch.Tensor)
    assert q.scale.shape == (7, 3) and q.scale.scale.shape == (1, 3)
    plain = x.reshape(7, 3, 10).abs().amax(-1).reshape(-1)
    for block, (mine, real) in enumerate(zip(q.real_scale.reshape(-1).split(8), plain.split(8), strict=True)):
        step = float(q.scale.scale[0, block])
        assert float(mine.max()) <= 128 * step
        assert float((mine / mine.max() - real / real.max()).abs().max()) < 0.02
    with pytest.raises(ShapeError, match="blocks of 8 run across them"):
        rows_of(q, 2, 3)
    with pytest.raises(SchemeError, match="are for scales, not for weights"):
        parse_scheme("w=int8/flat256")
    assert tile_shape(PerFlat(8), (4, 16)) == (1, 8) and tile_shape(PerFlat(8), (6, 4)) == (2, 4)
    assert tile_shape(PerFlat(64), (3, 4)) == (3, 4) and scale_shape(PerFlat(8), (4, 2, 3)) == (1, 1, 3)


def test_runs_are_whole_rows_or_parts_of_one() -> None:
    assert tile_shape(PerRun(256), (100, 4)) == (64, 4)
    assert tile_shape(PerRun(256), (7, 300)) == (1, 256)
    assert tile_shape(PerRun(256), (3, 20, 100)) == (1, 2, 100)
    assert tile_shape(PerRun(8), (5,)) == (5,)
    assert parse_scheme("w=int8/run256").weights.granularity == PerRun(256)
    for name in PLAIN:
        assert parse_scheme(str(PRESETS[name])) == PRESETS[name]


def test_the_offset_of_all_blocks_is_one_number() -> None:
    q = quantize_tensor(gaussian(64, 1024), "NF4_DQ")
    assert isinstance(q.scale, QTensor)
    assert isinstance(q.scale.offset, QTensor)
    assert q.scale.offset.real_scale.numel() == 1
    assert len(q.scale.offset.dequantize().unique()) == 1
