"""The compiled quantizers against their slow references: the same codes and scales to the last bit, or as close as each one says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError
from arrondi.formats import (
    FORMATS,
    PRESETS,
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    parse_scheme,
)
from arrondi.native import native
from arrondi.rounding import gptq, hqq, rtn
from arrondi.tensor import quantizers
from arrondi.tensor.nearest import quantize_tensor, quantize_with
from arrondi.tensor.packing import pack, pack_reference, unpack
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.ranges.grid import STORED, Grid
from arrondi.tensor.ranges.search import on_grid, search_grid, search_grid_reference
from arrondi.tensor.tiling import to_tiles
from tests.cases import each_once

pytestmark = pytest.mark.skipif(native is None, reason="arrondi was installed without its compiled kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    with mock.patch.object(quantizers, "native", None):
        yield


def scheme(text: str) -> Scheme:
    return parse_scheme(f"w={text}").weights


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Small numbers with a few large ones, and one row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 0.02
    x *= 1 + 20 * (torch.rand(shape, generator=generator) > 0.99)
    if len(shape) > 1 and shape[0] > 2:
        x[2] = 0
    return x.to(dtype)


def same(a: QTensor, b: QTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert a.codes.dtype == b.codes.dtype
    for mine, other in zip((a.scale, a.zero_point, a.offset), (b.scale, b.zero_point, b.offset), strict=True):
        if other is None:
            assert mine is None
        else:
            assert isinstance(mine, torch.Tensor)
            assert isinstance(other, torch.Tensor)
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)


SCHEMES = ["int4/g128", "int2/g16/bfloat16", "int3/g50/asym", "int8/channel/float16", "uint4/g32/asym/bfloat16", "int5/g20/offset",
           "uint8/token/offset/float16", "uint6/g7", "int7/tensor", "int4/tensor/asym", "ternary/g16/asym"]  # fmt: skip


@pytest.mark.parametrize("text", SCHEMES)
def test_quantize_equals_its_reference(path: str, text: str) -> None:
    for dtype in DTYPES:
        for shape in ((5, 256), (3, 117), (2, 3, 70), (40,), (4, 1)):
            x = weight(*shape, dtype=dtype)
            assert quantizers.knows(x, scheme(text))
            fast = quantize_tensor(x, scheme(text))
            restored = fast.dequantize(), fast.dequantize(torch.bfloat16)
            with reference_path():
                slow = quantize_tensor(x, scheme(text))
                assert all(torch.equal(r, slow.dequantize(r.dtype)) for r in restored)
            same(fast, slow)


@pytest.mark.parametrize("rule", ["full", "narrow", "extreme"])
@pytest.mark.parametrize("scale", STORED)
def test_every_rule_equals_its_reference(path: str, rule: str, scale: Any) -> None:
    for name in ("int2", "int4", "int8"):
        plan = Scheme(FORMATS[name], PerGroup(32), scale=scale)
        fast = quantize_tensor(weight(6, 200), plan, rule=rule)
        with reference_path():
            same(fast, quantize_tensor(weight(6, 200), plan, rule=rule))


GRANULARITIES: list[Granularity] = [PerGroup(3), PerGroup(16), PerGroup(40), PerChannel(), PerToken(), PerTensor()]
NUMBERS = st.one_of(
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3e38, -3e38, 65504.0]),
)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(NUMBERS, min_size=1, max_size=80),
    granularity=st.sampled_from(GRANULARITIES),
    format=st.sampled_from(["int2", "int4", "uint4", "int8", "uint8"]),
    zero=st.sampled_from(["none", "integer", "float"]),
    scale=st.sampled_from(sorted(STORED)),
)
@example([1e-45] * 5, PerGroup(3), "int4", "none", "float16")
@example([3e38, -3e38], PerToken(), "uint4", "integer", "float32")
def test_any_numbers_give_the_references_codes_or_its_error(
    values: list[float], granularity: Granularity, format: str, zero: Any, scale: Any
) -> None:
    x = torch.tensor(values).reshape(1, -1)
    plan = Scheme(FORMATS[format], granularity, zero, scale)

    def run() -> QTensor | str:
        try:
            return quantize_tensor(x, plan)
        except DataError as error:
            return str(error)

    fast = run()
    with reference_path():
        slow = run()
    if isinstance(slow, str) or isinstance(fast, str):
        assert fast == slow
    else:
        same(fast, slow)


@pytest.mark.parametrize(
    ("text", "bad"),
    each_once(["int4/g32", "int4/g32/asym", "int4/g32/offset", "int8/channel"], [torch.nan, torch.inf, -torch.inf]),
)
def test_nan_and_infinity_give_the_references_error(path: str, text: str, bad: float) -> None:
    for column in (0, 5, 37, 69):
        x = weight(4, 70)
        x[3, column] = bad
        for run in (quantize_tensor, partial(rtn, range="search")):
            with pytest.raises(DataError, match=r"^w: The values hold NaN or infinity"):
                run(x, scheme(text), name="w")
        good = quantize_tensor(weight(4, 70), scheme(text))
        with pytest.raises(DataError, match="NaN or infinity"):
            quantize_with(x, scheme(text), Grid(good.real_scale, good.zero_point, good.offset))


def test_a_scale_that_overflows_gives_the_references_error() -> None:
    with pytest.raises(DataError, match=r"^w: A scale of .* overflows float16"):
        quantize_tensor(torch.full((2, 32), 1e30), scheme("int4/g32/float16"), name="w")


def test_layouts_of_the_input_change_nothing() -> None:
    base = weight(96, 64)
    views = [base.T, base[::2], base[:, 3:50], base[:, ::3], base.reshape(2, 48, 64).transpose(0, 1), base[5]]
    for view in views:
        for part in (view, view.contiguous().requires_grad_()):
            same(quantize_tensor(part, scheme("int4/g16")), quantize_tensor(view.contiguous(), scheme("int4/g16")))
    before = base.clone()
    quantize_tensor(base, scheme("int3/g16/asym"))
    assert torch.equal(base, before)
    same(quantize_tensor(base.double(), scheme("int4/g16")), quantize_tensor(base, scheme("int4/g16")))


def test_what_the_kernels_leave_to_the_reference_path() -> None:
    x = weight(64, 64)
    assert not quantizers.knows(x, Scheme(FORMATS["int4"], PerBlock(16, 16)))
    assert not quantizers.knows(x, Scheme(FORMATS["int4"], PerChannel(1)))
    assert not quantizers.knows(x, scheme("nf4/g64"))
    assert not quantizers.knows(x, scheme("ternary/channel"))
    assert not quantizers.knows(x.double(), scheme("int4/g16"))
    assert not quantizers.knows(x.to("meta"), scheme("int4/g16"))
    assert not quantizers.knows(x[:, :0], scheme("int4/g16"))
    assert not quantizers.knows(x, PRESETS["NVFP4A16"].weights)


@pytest.mark.parametrize("text", ["int4/g32", "uint3/g20/asym", "int6/channel/offset", "int8/tensor"])
def test_rounding_on_a_given_grid_and_the_way_back(path: str, text: str) -> None:
    x = weight(7, 90)
    q = quantize_tensor(x * 0.7, scheme(text))
    grid = Grid(q.real_scale, q.zero_point, q.offset)
    fast = quantize_with(x, scheme(text), grid)
    with reference_path():
        same(fast, quantize_with(x, scheme(text), grid))
    sums = quantizers.lost(x.bfloat16(), fast.codes, scheme(text), grid)
    assert sums is not None
    wanted = (fast.dequantize() - x.bfloat16().float()).double().square().sum(), x.bfloat16().double().square().sum()
    assert sums == pytest.approx([float(w) for w in wanted], rel=1e-5)


def test_parts_of_a_grid_may_have_any_layout() -> None:
    # The kernels get copies, which must outlive the call: memory that is freed too early is soon something else's.
    x = weight(512, 256)
    plan = scheme("int4/g16/asym")
    q = quantize_tensor(x, plan)
    assert q.zero_point is not None
    scattered = Grid(q.real_scale.T.contiguous().T, q.zero_point.T.contiguous().T)
    loose = QTensor(q.codes.T.contiguous().T, scattered.scale, scattered.zero_point, None, plan)
    for _ in range(5):
        assert torch.equal(loose.dequantize(), q.dequantize())
        assert torch.equal(quantize_with(x.T.contiguous().T, plan, scattered).codes, q.codes)
        assert quantizers.lost(x, loose.codes, plan, scattered) == quantizers.lost(
            x, q.codes, plan, Grid(q.real_scale, q.zero_point)
        )


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_equals_its_reference(path: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 7, 8, 64, 509, 512, 1030):
        for word_bytes in (1, 4):
            codes = torch.randint(0, 2**bits, (3, columns), generator=generator).to(torch.uint8)
            packed = pack(codes, bits, word_bytes=word_bytes)
            assert torch.equal(packed, pack_reference(codes, bits, word_bytes=word_bytes))
            assert torch.equal(unpack(packed, bits, columns), codes)
            lowest = -(2 ** (bits - 1))
            signed = (codes.int() + lowest).to(torch.int8)
            assert torch.equal(pack(signed, bits, word_bytes=word_bytes, lowest=lowest), packed)
    wide = torch.randint(0, 2**bits, (6, 100), generator=generator).to(torch.uint8)
    assert torch.equal(pack(wide[1:, 1:98:2], bits), pack_reference(wide[1:, 1:98:2].contiguous(), bits))


@pytest.mark.parametrize("text", ["int4/g32", "int3/g20/asym/bfloat16", "uint8/channel", "int6/g64/offset"])
def test_rounding_straight_to_packed_bits(path: str, text: str) -> None:
    for shape in ((5, 100), (30, 64)):
        x = weight(*shape, dtype=torch.bfloat16)
        found = quantizers.round_packed(x, scheme(text), word_bytes=4)
        assert found is not None
        q = quantize_tensor(x, scheme(text))
        format = scheme(text).format
        assert torch.equal(found[0], pack(q.codes, format.bits, word_bytes=4, lowest=format.qmin))
        assert torch.equal(found[1].scale.reshape(-1), q.real_scale.reshape(-1))


# ── the search ────────────────────────────────────────────────────────────────────────────────────────────────────────


def loss_of(x: torch.Tensor, plan: Scheme, grid: Grid, importance: torch.Tensor | None, power: float) -> torch.Tensor:
    """(tiles,) float64; what a ragged tile is filled up with does not count."""
    tiles = to_tiles(x, (*(1 for _ in x.shape[:-1]), min(plan.granularity.size, x.shape[-1])))
    error = (on_grid(tiles, plan, grid) - tiles).abs().double().pow(power)
    return (error if importance is None else error * to_tiles(importance.expand_as(x), (1, tiles.shape[1]))).sum(dim=-1)


@pytest.mark.parametrize(
    ("text", "power"),
    each_once(
        ["int4/g32", "int2/g16/asym", "int3/g24/offset/bfloat16", "uint4/g16", "int4/g16/unsigned", "int8/g64/float16"],
        [2.0, 2.5, 4.0],
    ),
)
def test_search_takes_the_references_candidate_or_its_equal(path: str, text: str, power: float) -> None:
    for seed in range(2):
        x = weight(12, 192, seed=seed)
        if text.startswith("uint4"):
            x = x.abs()
        for importance in (None, torch.rand(192, generator=torch.Generator().manual_seed(seed))):
            fast = search_grid(x, scheme(text), importance, power=power)
            slow = search_grid_reference(x, scheme(text), importance, power=power)
            equal = (fast.scale == slow.scale).flatten()
            assert equal.float().mean() > 0.95
            mine, other = (loss_of(x, scheme(text), grid, importance, power) for grid in (fast, slow))
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)


def test_search_of_ragged_groups_counts_only_what_is_there(path: str) -> None:
    for text in ("int4/g50", "int4/g50/offset", "int4/channel/asym"):
        x = weight(6, 117)
        fast = search_grid(x, scheme(text), torch.ones(117))
        unweighted = search_grid(x, scheme(text))
        assert all(a is None or torch.equal(a, b) for a, b in zip(fast, unweighted, strict=True))
        whole = search_grid(x[:, :50].contiguous(), Scheme(scheme(text).format, PerGroup(50), scheme(text).zero_point))
        if "g50" in text:
            assert torch.equal(fast.scale.reshape(6, -1)[:, 0], whole.scale.flatten())


# ── half-quadratic splitting ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "options"),
    each_once(
        ["int4/g64/offset", "int3/g48/asym", "int4/g32", "int2/g96/offset/bfloat16"],
        [{}, {"normalize": True}, {"p": 0.5, "beta": 3.0, "normalize": True}, {"p": 1.0}],
    ),
    ids=str,
)
def test_hqq_is_as_good_as_its_reference(path: str, text: str, options: dict[str, Any]) -> None:
    x = weight(128, 384)
    fast = hqq(x, scheme(text), **options)
    with reference_path():
        slow = hqq(x, scheme(text), **options)
    # Measured in steps every group moves at every iteration, and whether the last one still helped is decided by the last bits.
    most_equal, near = (0.998, 3e-4) if options.get("normalize") else (0.999, 1e-4)
    assert (fast.codes == slow.codes).float().mean() > most_equal
    mine, other = ((q.dequantize() - x).abs().mean() for q in (fast, slow))
    torch.testing.assert_close(mine, other, rtol=near, atol=0)


def test_hqq_of_a_ragged_group_counts_only_what_is_there(path: str) -> None:
    # The reference repeats some elements of a ragged group, which moves its mean.
    x = weight(6, 117)
    for text in ("int4/g50/offset", "int4/g50/asym"):
        q, last = hqq(x, scheme(text)), hqq(x[:, 100:], scheme(text))
        assert torch.equal(q.codes[:, 100:], last.codes)
        assert torch.equal(q.real_scale[:, 2:], last.real_scale)


# ── GPTQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def moment(n: int) -> SecondMoment:
    generator = torch.Generator().manual_seed(1)
    made = SecondMoment(n)
    made.update(torch.randn(3 * n, n, generator=generator) @ torch.randn(n, n, generator=generator))
    return made


@pytest.mark.parametrize(
    ("order", "text"),
    each_once(["static", "dynamic", "none"], ["int4/g32", "int3/g24/asym/bfloat16", "int4/g40/offset"]),
)
def test_gptq_chooses_the_references_codes(path: str, order: Any, text: str) -> None:
    for rows in (16, 65, 90):
        for block in (32, 128):
            w = weight(rows, 144)
            fast = gptq(w, scheme(text), moment(144), order=order, range="absmax", block_size=block)
            with reference_path():
                slow = gptq(w, scheme(text), moment(144), order=order, range="absmax", block_size=block)
            same(fast, slow)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor(), PerBlock(16, 32), PerChannel(1)])
def test_gptq_of_other_granularities_chooses_the_references_codes(granularity: Granularity) -> None:
    plan = Scheme(FORMATS["int4"], granularity)
    fast = gptq(weight(40, 96), plan, moment(96), range="absmax")
    with reference_path():
        same(fast, gptq(weight(40, 96), plan, moment(96), range="absmax"))


# ── threads ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_threads_change_nothing() -> None:
    x = weight(96, 4096)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        q = quantize_tensor(x, scheme("int4/g128"))
        searched = rtn(x, scheme("int4/g128"), range="search")
        split = hqq(x, scheme("int4/g128/offset"), normalize=True)
        found.append(
            (q, searched, split, quantizers.lost(x, q.codes, q.scheme, Grid(q.real_scale)), pack(q.codes, 4, lowest=-8))
        )
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        if isinstance(one, QTensor):
            same(one, three)
        else:
            assert torch.equal(one, three) if isinstance(one, torch.Tensor) else one == three
