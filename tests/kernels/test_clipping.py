"""Codes of a byte with a clip: compiled, on every instruction set of this CPU, against the slow reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arrondi.errors import ShapeError
from arrondi.kernels import clipping
from arrondi.native import native

SHAPES = [(1, 1), (3, 15), (40, 16), (65, 200), (7, 1030), (0, 4), (300, 257)]
PATHS = ["none"] if native is None else [name for name, reason in native.paths() if reason is None]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    before = None if native is None else native.path()
    if native is not None:
        native.use_path(request.param)
    yield request.param
    if native is not None:
        native.use_path(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_compiled_is_the_reference(path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES:
        x = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
        if columns > 3 and rows:
            x[0, 0], x[-1, 1], x[0, 2] = float("nan"), float("inf"), -float("inf")
        for clip in (torch.tensor(0.7), torch.tensor(127.0)):
            for unsigned in (False, True):
                for marked in (False, True):
                    how = {"unsigned": unsigned, "marked": marked}
                    one, two = clipping.clip_codes(x, clip, **how), clipping.clip_codes_reference(x, clip, **how)
                    assert torch.equal(one.codes, two.codes)
                    assert one.beyond is two.beyond is None or torch.equal(one.beyond, two.beyond)
        sums = torch.randint(-(2**20), 2**20, (rows, columns), dtype=torch.int32)
        for factor in (torch.tensor(2.0**-13), torch.tensor(1.7e-4)):
            one, two = clipping.narrow(sums, factor, marked=True), clipping.narrow_reference(sums, factor, marked=True)
            assert torch.equal(one.codes, two.codes) and torch.equal(one.beyond, two.beyond)
        row = torch.rand(rows)
        for bias in (None, torch.randn(columns)):
            parts = (one.codes, row, bias, dtype)
            assert torch.equal(clipping.widen(*parts), clipping.widen_reference(*parts))
        slope = torch.randn(rows, columns).to(dtype)
        for codes in (None, one.codes):
            for unsigned in (False, True):
                found = clipping.masked(slope, one.beyond, codes, unsigned=unsigned)
                wanted = clipping.masked_reference(slope, one.beyond, codes, unsigned=unsigned)
                assert torch.equal(found[0], wanted[0])
                assert found[1] is wanted[1] is None or torch.allclose(found[1], wanted[1].float(), atol=1e-4)


def test_every_tie_goes_up(path: str) -> None:
    codes = torch.arange(-130, 131)
    ties = torch.cat((codes + 0.5, torch.nextafter(codes + 0.5, torch.tensor(-999.0)), codes.float()))[None]
    expected = (ties.double() + 0.5).floor().clamp(-127, 127).to(torch.int8)
    assert torch.equal(clipping.clip_codes(ties, torch.tensor(127.0)).codes, expected)
    sums = torch.arange(-300, 301, dtype=torch.int32)[None]
    expected = (sums.double() / 2 + 0.5).floor().clamp(-127, 127).to(torch.int8)
    assert torch.equal(clipping.narrow(sums, torch.tensor(0.5)).codes, expected)


def test_what_is_not_finite_goes_through_marks() -> None:
    beyond = clipping.clip_codes(torch.tensor([[9.0, 0.0, 9.0]]), torch.tensor(1.0), marked=True).beyond
    y, _ = clipping.masked(torch.tensor([[float("nan"), float("inf"), 1.0]]), beyond)
    assert y[0, 0].isnan() and y[0, 1].isinf() and y[0, 2] == 0


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="matrix"):
        clipping.clip_codes(torch.zeros(3), torch.ones(()))
    with pytest.raises(ShapeError, match="marks"):
        clipping.masked(torch.zeros(2, 20), torch.zeros(2, 2, dtype=torch.uint8))
